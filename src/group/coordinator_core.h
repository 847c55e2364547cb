// What the coordinator of a group decides, without sockets or a clock: events in, actions out.
//
// A group is waiting (some rank is missing), or being formed (windows are made, then mapped), or it stands. Whatever
// ends an epoch leads back to waiting; all members that are still there take part in the next one.
//
//   waiting --all ranks are members--> windows --all have made theirs--> mapping --all have mapped all--> standing
//
// A member is a session: one connection of one process. A rank that was given up, and a process that has been replaced,
// have no session any more; what they still say is heard by nobody.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "src/group/coordinator.h"
#include "src/group/messages.h"

namespace tandem::group {

// A connection; never reused while the coordinator lives.
using SessionId = StrongId<struct SessionIdTag, uint64_t>;

// The beats of a silent rank that are waited for: it is given up after kSilentBeats / kBeatsPerTimeout of the rank
// time-out, so that every other rank has heard of it within the whole.
inline constexpr int64_t kBeatsPerTimeout = 5;
inline constexpr int64_t kSilentBeats = 4;
// A stage of the formation of an epoch lasts at most this many rank time-outs.
inline constexpr int64_t kStageTimeouts = 3;
// Formations that fail, or epochs that end within a rank time-out, are followed by a pause that doubles from this up to
// the rank time-out.
inline constexpr int64_t kMinPauseUs = 50'000;

struct CoordinatorAction {
  SessionId session;
  std::optional<Message> message;  // to be sent
  bool close = false;              // then closed; no event of this session is wanted any more
};

class CoordinatorCore {
 public:
  CoordinatorCore(GroupShape shape, int64_t rank_timeout_us, int64_t now_us);

  void on_connected(SessionId session, std::string peer, int64_t now_us);
  void on_message(SessionId session, const Message& message, int64_t now_us);
  // The connection is gone: "its connection was closed".
  void on_closed(SessionId session, const std::string& why, int64_t now_us);
  // At next_time_us() or later.
  void on_time(int64_t now_us);
  int64_t next_time_us() const;

  // What has to be done, in order.
  std::vector<CoordinatorAction> take_actions();
  // Whether status() has changed since the last call, ages apart.
  bool take_changed();
  GroupStatus status(int64_t now_us) const;
  // Sessions that are open.
  int64_t num_sessions() const { return std::ssize(sessions_); }

 private:
  enum class Stage : uint8_t { kWaiting, kWindows, kMapping, kStanding };

  struct Session {
    std::string peer;
    int64_t opened_us = 0;
    std::optional<int32_t> rank;  // once it is a member
  };
  struct Member {
    SessionId session;
    JoinMessage join;
    int64_t heard_us = 0;
    std::optional<WindowAddress> window;  // of the epoch being formed
    bool has_mapped = false;
  };

  void handle(Session& session, Member& member, const Message& message, int64_t now_us);
  void join(SessionId id, const JoinMessage& join, int64_t now_us);
  std::optional<RefusedMessage> find_objection(const JoinMessage& join, int64_t now_us) const;
  std::optional<std::string> find_difference(const JoinMessage& join) const;
  void refuse(SessionId id, int32_t rank, RefusedMessage refusal, int64_t now_us);
  void remove(int32_t rank, const std::string& why, bool tell_it, int64_t now_us);
  void end_epoch(const std::string& why, int64_t now_us);
  void try_form(int64_t now_us);
  void check_stage(int64_t now_us);
  void give_up_late(int64_t now_us);
  void give_up_silent(int64_t now_us);
  void send(SessionId session, Message message);
  void close(SessionId session);
  std::string describe() const;
  std::string list_missing() const;
  int64_t beat_us() const { return rank_timeout_us_ / kBeatsPerTimeout; }
  int64_t silence_us() const { return beat_us() * kSilentBeats; }
  int32_t size() const { return shape_.size(); }

  const GroupShape shape_;
  const int64_t rank_timeout_us_;
  std::map<SessionId, Session> sessions_;
  std::map<int32_t, Member> members_;
  std::map<int32_t, int64_t> missing_since_us_;
  std::deque<Refusal> refusals_;  // age_us holds the time instead
  Stage stage_ = Stage::kWaiting;
  uint64_t epoch_ = 0;
  int64_t stage_deadline_us_ = 0;
  int64_t stands_since_us_ = 0;
  int64_t formations_ = 0;
  int64_t pause_us_ = 0;  // before the next formation …
  int64_t may_form_us_ = 0;  // … hence not before this time
  int64_t next_beat_us_ = 0;
  std::string last_end_;  // why the last epoch ended; empty while one stands
  std::vector<CoordinatorAction> actions_;
  bool has_changed_ = true;
};

}  // namespace tandem::group
