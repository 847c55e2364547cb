#include "src/group/coordinator_core.h"

#include <algorithm>
#include <utility>

namespace tandem::group {
namespace {

constexpr int32_t kMostListed = 16;  // ranks named in one sentence

double seconds(int64_t us) { return static_cast<double>(us) * 1e-6; }

// "rank 2", "ranks 2, 3".
std::string list_ranks(const std::vector<int32_t>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (i == kMostListed) return text + fmt::format(" and {} more", ranks.size() - i);
    text += fmt::format("{}{}", i == 0 ? "" : ", ", ranks[i]);
  }
  return text;
}

// The options of two ranks that differ: `--dtype ("float32" and "auto"), --seed ("5" and "0")`; "" if none does.
std::string describe_options(const JoinMessage& one, const JoinMessage& other) {
  std::string text;
  for (const Fact& option : one.options) {
    const auto same = std::find_if(other.options.begin(), other.options.end(),
                                   [&](const Fact& o) { return o.name == option.name; });
    if (same == other.options.end() || same->value == option.value) continue;
    text += fmt::format("{}{} (\"{}\" and \"{}\")", text.empty() ? "" : ", ", option.name, option.value, same->value);
  }
  return text;
}

}  // namespace

CoordinatorCore::CoordinatorCore(GroupShape shape, int64_t rank_timeout_us, int64_t now_us)
    : shape_(shape), rank_timeout_us_(rank_timeout_us), next_beat_us_(now_us + rank_timeout_us / kBeatsPerTimeout) {
  CHECK_GE(shape.size(), 1);
  CHECK_LE(shape.size(), kMaxRanks);
  CHECK_GE(beat_us(), 1);
  for (int32_t r = 0; r < size(); ++r) missing_since_us_[r] = now_us;
}

void CoordinatorCore::on_connected(SessionId session, std::string peer, int64_t now_us) {
  const bool is_new = sessions_.emplace(session, Session{std::move(peer), now_us, std::nullopt}).second;
  CHECK(is_new);
}

void CoordinatorCore::on_message(SessionId id, const Message& message, int64_t now_us) {
  const auto found = sessions_.find(id);
  if (found == sessions_.end()) return;
  Session& session = found->second;
  if (session.rank) {
    Member& member = members_.at(*session.rank);
    member.heard_us = now_us;
    handle(session, member, message, now_us);
  } else if (const JoinMessage* const joining = std::get_if<JoinMessage>(&message)) {
    join(id, *joining, now_us);
  } else {
    refuse(id, -1, {true, fmt::format("a {} message before a join", message_name(message))}, now_us);
  }
  check_stage(now_us);
}

void CoordinatorCore::handle(Session& session, Member& member, const Message& message, int64_t now_us) {
  const int32_t rank = *session.rank;
  if (const WindowMessage* const window = std::get_if<WindowMessage>(&message)) {
    if (stage_ == Stage::kWindows && window->epoch.value == epoch_) member.window = window->address;
  } else if (const MappedMessage* const mapped = std::get_if<MappedMessage>(&message)) {
    if (stage_ == Stage::kMapping && mapped->epoch.value == epoch_) member.has_mapped = true;
  } else if (const FaultMessage* const fault = std::get_if<FaultMessage>(&message)) {
    // Of an older epoch: that one has ended already.
    if (stage_ == Stage::kWaiting || fault->epoch.value != epoch_) return;
    const std::string blame = fault->suspect >= 0 && fault->suspect != rank ? fmt::format(", blaming rank {}", fault->suspect) : "";
    end_epoch(fmt::format("rank {} reports{}: {}", rank, blame, fault->why), now_us);
  } else if (const LeaveMessage* const leave = std::get_if<LeaveMessage>(&message)) {
    remove(rank, fmt::format("rank {} has left: {}", rank, leave->why), /*tell_it=*/false, now_us);
  } else if (!std::holds_alternative<BeatMessage>(message)) {
    remove(rank, fmt::format("rank {} sent a {} message as a member", rank, message_name(message)), /*tell_it=*/true,
           now_us);
  }
}

void CoordinatorCore::on_closed(SessionId id, const std::string& why, int64_t now_us) {
  const auto found = sessions_.find(id);
  if (found == sessions_.end()) return;
  const std::optional<int32_t> rank = found->second.rank;
  if (rank) {
    remove(*rank, fmt::format("rank {} is gone: {}", *rank, why), /*tell_it=*/false, now_us);
  } else {
    close(id);
  }
}

// --- joining ---

void CoordinatorCore::join(SessionId id, const JoinMessage& join, int64_t now_us) {
  if (std::optional<RefusedMessage> objection = find_objection(join, now_us)) {
    refuse(id, join.rank, *std::move(objection), now_us);
    return;
  }
  if (const auto former = members_.find(join.rank); former != members_.end()) {
    const bool same = former->second.join.incarnation == join.incarnation;
    remove(join.rank, fmt::format("rank {} {}", join.rank, same ? "has joined again" : "was replaced by a new process"),
           /*tell_it=*/true, now_us);
  }
  sessions_.at(id).rank = join.rank;
  members_[join.rank] = Member{id, join, now_us, std::nullopt, false};
  missing_since_us_.erase(join.rank);
  epoch_ = std::max(epoch_, join.last_epoch);
  has_changed_ = true;
  send(id, BeatMessage{describe()});
}

std::optional<RefusedMessage> CoordinatorCore::find_objection(const JoinMessage& join, int64_t now_us) const {
  if (join.protocol != kProtocolVersion) {
    return RefusedMessage{true, fmt::format("the coordinator speaks version {} of the group protocol, this rank version "
                                            "{}; start the same program everywhere",
                                            kProtocolVersion, join.protocol)};
  }
  if (join.shape != shape_) {
    return RefusedMessage{true, fmt::format("rank {} belongs to a group of {} x {} ranks (data x tensor), this one has "
                                            "{} x {}; give all the same --data-parallel-size and --tensor-parallel-size",
                                            join.rank, join.shape.data, join.shape.tensor, shape_.data, shape_.tensor)};
  }
  if (join.rank < 0 || join.rank >= size()) {
    return RefusedMessage{true, fmt::format("rank {} is not in 0 … {}; look at --data-parallel-start-rank and "
                                            "--data-parallel-size-local",
                                            join.rank, size() - 1)};
  }
  if (join.rank_timeout_us != rank_timeout_us_) {
    return RefusedMessage{true, fmt::format("rank {} has --rank-timeout {} s, the coordinator {} s; give all the same",
                                            join.rank, seconds(join.rank_timeout_us), seconds(rank_timeout_us_))};
  }
  if (std::optional<std::string> difference = find_difference(join)) return RefusedMessage{true, *std::move(difference)};
  const auto holder = members_.find(join.rank);
  if (holder == members_.end()) return std::nullopt;
  const Member& former = holder->second;
  if (former.join.incarnation == join.incarnation) {
    if (join.attempt > former.join.attempt) return std::nullopt;
    return RefusedMessage{false, fmt::format("rank {} has joined by a later connection", join.rank)};
  }
  const int64_t silent_us = now_us - former.heard_us;
  if (silent_us >= silence_us()) return std::nullopt;
  return RefusedMessage{false, fmt::format("rank {} is taken by process {} of node \"{}\", heard {:.1f} s ago; stop that "
                                           "one, or give this one another rank",
                                           join.rank, former.join.pid, former.join.node, seconds(silent_us))};
}

// Compared with any member that is there (they agree): another program or model can come when the last one has gone.
std::optional<std::string> CoordinatorCore::find_difference(const JoinMessage& join) const {
  const auto other = std::find_if(members_.begin(), members_.end(), [&](const auto& m) { return m.first != join.rank; });
  if (other == members_.end()) return std::nullopt;
  const auto find = [](const std::vector<Fact>& facts, const std::string& name) {
    const auto fact = std::find_if(facts.begin(), facts.end(), [&](const Fact& f) { return f.name == name; });
    return fact == facts.end() ? std::string("nothing") : fmt::format("\"{}\"", fact->value);
  };
  const std::vector<Fact>& theirs = other->second.join.facts;
  for (const std::vector<Fact>* const list : {&theirs, &join.facts}) {
    for (const Fact& fact : *list) {
      const std::string expected = find(theirs, fact.name);
      const std::string got = find(join.facts, fact.name);
      if (got == expected) continue;
      const std::string options = describe_options(join, other->second.join);
      if (fact.name.find("--") == std::string::npos && !options.empty()) {
        return fmt::format("rank {} and rank {} differ in {}, and so in \"{}\"; start all ranks with the same program, "
                           "model and options",
                           join.rank, other->first, options, fact.name);
      }
      return fmt::format("rank {} has {} as \"{}\", rank {} has {}; start all ranks with the same program, model and "
                         "options",
                         join.rank, got, fact.name, other->first, expected);
    }
  }
  return std::nullopt;
}

void CoordinatorCore::refuse(SessionId id, int32_t rank, RefusedMessage refusal, int64_t now_us) {
  refusal.why = clip_text(std::move(refusal.why));
  refusals_.push_back({sessions_.at(id).peer, rank, refusal.why, now_us});
  if (std::ssize(refusals_) > GroupStatus::kMaxRefusals) refusals_.pop_front();
  has_changed_ = true;
  send(id, std::move(refusal));
  close(id);
}

// --- losing ---

void CoordinatorCore::remove(int32_t rank, const std::string& why, bool tell_it, int64_t now_us) {
  const SessionId session = members_.at(rank).session;
  members_.erase(rank);
  missing_since_us_[rank] = now_us;
  if (tell_it) send(session, EndedMessage{Epoch(epoch_), /*fenced=*/true, clip_text(why)});
  close(session);
  has_changed_ = true;
  if (stage_ == Stage::kWaiting) {
    last_end_ = why;
  } else {
    end_epoch(why, now_us);
  }
}

void CoordinatorCore::end_epoch(const std::string& why, int64_t now_us) {
  const bool lasted = stage_ == Stage::kStanding && now_us - stands_since_us_ >= rank_timeout_us_;
  pause_us_ = lasted ? 0 : std::clamp(2 * pause_us_, kMinPauseUs, std::max(kMinPauseUs, rank_timeout_us_));
  may_form_us_ = now_us + pause_us_;
  stage_ = Stage::kWaiting;
  last_end_ = why;
  has_changed_ = true;
  for (auto& [rank, member] : members_) {
    member.window.reset();
    member.has_mapped = false;
    send(member.session, EndedMessage{Epoch(epoch_), /*fenced=*/false, clip_text(why)});
  }
}

void CoordinatorCore::give_up_silent(int64_t now_us) {
  std::vector<int32_t> silent;
  for (const auto& [rank, member] : members_) {
    if (now_us - member.heard_us >= silence_us()) silent.push_back(rank);
  }
  for (const int32_t rank : silent) {
    remove(rank, fmt::format("rank {} is gone: silent for {:.1f} s", rank, seconds(now_us - members_.at(rank).heard_us)),
           /*tell_it=*/true, now_us);
  }
}

void CoordinatorCore::give_up_late(int64_t now_us) {
  if ((stage_ != Stage::kWindows && stage_ != Stage::kMapping) || now_us < stage_deadline_us_) return;
  std::vector<int32_t> late;
  for (const auto& [rank, member] : members_) {
    if (stage_ == Stage::kWindows ? !member.window.has_value() : !member.has_mapped) late.push_back(rank);
  }
  const std::string why = fmt::format("{} did not {} within {:.1f} s", list_ranks(late),
                                      stage_ == Stage::kWindows ? "let go of the last epoch and make a window"
                                                                : "map the windows of the others",
                                      seconds(kStageTimeouts * rank_timeout_us_));
  end_epoch(why, now_us);
  for (const int32_t rank : late) remove(rank, why, /*tell_it=*/true, now_us);
}

// --- forming ---

void CoordinatorCore::try_form(int64_t now_us) {
  if (stage_ != Stage::kWaiting || std::ssize(members_) != size() || now_us < may_form_us_) return;
  ++epoch_;
  stage_ = Stage::kWindows;
  stage_deadline_us_ = now_us + kStageTimeouts * rank_timeout_us_;
  has_changed_ = true;
  FormMessage form{Epoch(epoch_), {}};
  for (const auto& [rank, member] : members_) form.nodes.push_back(member.join.node);
  for (const auto& [rank, member] : members_) send(member.session, form);
}

void CoordinatorCore::check_stage(int64_t now_us) {
  try_form(now_us);
  const auto all = [this](auto&& holds) {
    return std::all_of(members_.begin(), members_.end(), [&](const auto& m) { return holds(m.second); });
  };
  if (stage_ == Stage::kWindows && all([](const Member& m) { return m.window.has_value(); })) {
    stage_ = Stage::kMapping;
    stage_deadline_us_ = now_us + kStageTimeouts * rank_timeout_us_;
    MapMessage map{Epoch(epoch_), {}};
    for (const auto& [rank, member] : members_) map.windows.push_back(*member.window);
    for (const auto& [rank, member] : members_) send(member.session, map);
  }
  if (stage_ == Stage::kMapping && all([](const Member& m) { return m.has_mapped; })) {
    stage_ = Stage::kStanding;
    stands_since_us_ = now_us;
    ++formations_;
    last_end_.clear();
    has_changed_ = true;
    for (const auto& [rank, member] : members_) send(member.session, OpenMessage{Epoch(epoch_)});
  }
}

// --- time ---

void CoordinatorCore::on_time(int64_t now_us) {
  give_up_silent(now_us);
  give_up_late(now_us);
  std::vector<SessionId> speechless;
  for (const auto& [id, session] : sessions_) {
    if (!session.rank && now_us - session.opened_us >= rank_timeout_us_) speechless.push_back(id);
  }
  for (const SessionId id : speechless) close(id);
  if (now_us >= next_beat_us_) {
    next_beat_us_ = now_us + beat_us();
    const std::string text = describe();
    for (const auto& [rank, member] : members_) send(member.session, BeatMessage{text});
  }
  check_stage(now_us);
}

int64_t CoordinatorCore::next_time_us() const {
  int64_t next_us = next_beat_us_;
  for (const auto& [rank, member] : members_) next_us = std::min(next_us, member.heard_us + silence_us());
  for (const auto& [id, session] : sessions_) {
    if (!session.rank) next_us = std::min(next_us, session.opened_us + rank_timeout_us_);
  }
  if (stage_ == Stage::kWindows || stage_ == Stage::kMapping) next_us = std::min(next_us, stage_deadline_us_);
  if (stage_ == Stage::kWaiting && std::ssize(members_) == size()) next_us = std::min(next_us, may_form_us_);
  return next_us;
}

// --- telling ---

void CoordinatorCore::send(SessionId session, Message message) {
  actions_.push_back({session, std::move(message), false});
}

void CoordinatorCore::close(SessionId session) {
  actions_.push_back({session, std::nullopt, true});
  sessions_.erase(session);
}

std::vector<CoordinatorAction> CoordinatorCore::take_actions() { return std::exchange(actions_, {}); }

bool CoordinatorCore::take_changed() { return std::exchange(has_changed_, false); }

std::string CoordinatorCore::list_missing() const {
  std::vector<int32_t> missing;
  for (const auto& [rank, since_us] : missing_since_us_) missing.push_back(rank);
  return list_ranks(missing);
}

std::string CoordinatorCore::describe() const {
  if (stage_ == Stage::kStanding) return fmt::format("epoch {} stands", epoch_);
  const std::string now = !missing_since_us_.empty() ? "waiting for " + list_missing()
                          : stage_ == Stage::kWaiting ? fmt::format("epoch {} is about to be formed", epoch_ + 1)
                                                      : fmt::format("epoch {} is being formed", epoch_);
  return clip_text(last_end_.empty() ? now : fmt::format("{}; {}", last_end_, now));
}

GroupStatus CoordinatorCore::status(int64_t now_us) const {
  GroupStatus status;
  status.standing = stage_ == Stage::kStanding;
  status.epoch = Epoch(epoch_);
  status.text = describe();
  for (const auto& [rank, member] : members_) {
    status.members.push_back({RankId(rank), member.join.http_address, member.join.node, member.join.pid,
                              member.join.incarnation});
  }
  for (const auto& [rank, since_us] : missing_since_us_) status.missing.push_back({RankId(rank), now_us - since_us});
  for (Refusal refusal : refusals_) {
    refusal.age_us = now_us - refusal.age_us;
    status.refusals.push_back(std::move(refusal));
  }
  status.formations = formations_;
  return status;
}

}  // namespace tandem::group
