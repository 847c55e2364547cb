#include "src/group/coordinator_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

namespace tandem::group {
namespace {

using testing::HasSubstr;

constexpr int64_t kTimeoutUs = 1'000'000;

JoinMessage make_join(int32_t rank, int32_t size, uint64_t incarnation, uint64_t attempt = 1) {
  return {.rank = rank,
          .shape = {size, 1},
          .incarnation = incarnation,
          .attempt = attempt,
          .pid = 100 + rank,
          .node = "here",
          .http_address = "",
          .rank_timeout_us = kTimeoutUs,
          .facts = {{"model", "m"}},
          .options = {}};
}

// The actions of a core, sorted by session.
class Driven {
 public:
  explicit Driven(int32_t size) : core({size, 1}, kTimeoutUs, 0) {}

  void connect(uint64_t session) { core.on_connected(SessionId(session), "peer", now_us), collect(); }
  void say(uint64_t session, const Message& message) { core.on_message(SessionId(session), message, now_us), collect(); }
  void join(uint64_t session, const JoinMessage& message) { connect(session), say(session, message); }
  void advance_us(int64_t us) { now_us += us, core.on_time(now_us), collect(); }
  template <typename T>
  std::optional<T> take(uint64_t session) {
    std::vector<Message>& messages = sent[session];
    for (size_t i = 0; i < messages.size(); ++i) {
      if (!std::holds_alternative<T>(messages[i])) continue;
      const T found = std::get<T>(messages[i]);
      messages.erase(messages.begin(), messages.begin() + static_cast<ptrdiff_t>(i) + 1);
      return found;
    }
    return std::nullopt;
  }
  void form(std::initializer_list<uint64_t> sessions) {
    const Epoch epoch = core.status(now_us).epoch;
    for (const uint64_t session : sessions) say(session, WindowMessage{epoch, {}});
    for (const uint64_t session : sessions) say(session, MappedMessage{epoch});
  }

  int64_t now_us = 0;
  CoordinatorCore core;
  std::map<uint64_t, std::vector<Message>> sent;
  std::set<uint64_t> closed;

 private:
  void collect() {
    for (const CoordinatorAction& action : core.take_actions()) {
      if (action.message) sent[action.session.value].push_back(*action.message);
      if (action.close) closed.insert(action.session.value);
    }
  }
};

TEST(CoordinatorCore, FormsWhenAllAreThereAndNotBefore) {
  Driven group(2);
  group.join(1, make_join(0, 2, 11));
  EXPECT_FALSE(group.take<FormMessage>(1).has_value());
  EXPECT_EQ(group.core.status(0).text, "waiting for rank 1");
  group.join(2, make_join(1, 2, 12));
  EXPECT_EQ(group.take<FormMessage>(1)->epoch, Epoch(1));
  EXPECT_EQ(group.take<FormMessage>(2)->nodes, (std::vector<std::string>{"here", "here"}));
  group.say(1, WindowMessage{Epoch(1), {{}, {}, 71, ""}});
  EXPECT_FALSE(group.take<MapMessage>(1).has_value());
  group.say(2, WindowMessage{Epoch(1), {{}, {}, 72, ""}});
  const std::optional<MapMessage> map = group.take<MapMessage>(1);
  ASSERT_TRUE(map.has_value());
  EXPECT_EQ(map->windows[0].stamp, 71U);
  EXPECT_EQ(map->windows[1].stamp, 72U);
  group.say(1, MappedMessage{Epoch(1)});
  EXPECT_FALSE(group.take<OpenMessage>(1).has_value());
  group.say(2, MappedMessage{Epoch(1)});
  EXPECT_TRUE(group.take<OpenMessage>(1).has_value());
  EXPECT_TRUE(group.take<OpenMessage>(2).has_value());
  EXPECT_TRUE(group.core.status(0).standing);
}

TEST(CoordinatorCore, WhatBelongsToAnotherEpochIsIgnored) {
  Driven group(1);
  group.join(1, make_join(0, 1, 11));
  group.say(1, WindowMessage{Epoch(7), {}});
  group.say(1, MappedMessage{Epoch(1)});  // before its time
  EXPECT_FALSE(group.take<MapMessage>(1).has_value());
  group.form({1});
  EXPECT_TRUE(group.core.status(0).standing);
  group.say(1, FaultMessage{Epoch(0), -1, "of the past"});
  EXPECT_TRUE(group.core.status(0).standing);
}

TEST(CoordinatorCore, NamesTheLateRankOfEachStage) {
  Driven group(2);
  group.join(1, make_join(0, 2, 11));
  group.join(2, make_join(1, 2, 12));
  group.say(1, WindowMessage{Epoch(1), {}});
  const auto keep_alive = [&](int64_t us) {
    for (int64_t passed = 0; passed < us; passed += kTimeoutUs / 5) {
      group.advance_us(kTimeoutUs / 5);
      for (const uint64_t session : {1UL, 2UL, 3UL}) group.say(session, BeatMessage{});
    }
  };
  keep_alive(kStageTimeouts * kTimeoutUs);
  const std::optional<EndedMessage> ended = group.take<EndedMessage>(1);
  ASSERT_TRUE(ended.has_value());
  EXPECT_FALSE(ended->fenced);
  EXPECT_EQ(ended->why, "rank 1 did not let go of the last epoch and make a window within 3.0 s");
  EXPECT_TRUE(group.closed.contains(2));
  EXPECT_FALSE(group.closed.contains(1));
  group.join(3, make_join(1, 2, 12, 2));
  keep_alive(kTimeoutUs);
  group.say(1, WindowMessage{Epoch(2), {}});
  group.say(3, WindowMessage{Epoch(2), {}});
  group.say(3, MappedMessage{Epoch(2)});
  keep_alive(kStageTimeouts * kTimeoutUs);
  EXPECT_EQ(group.take<EndedMessage>(3)->why, "rank 0 did not map the windows of the others within 3.0 s");
}

TEST(CoordinatorCore, ANewProcessReplacesOnlyASilentOne) {
  Driven group(1);
  group.join(1, make_join(0, 1, 11));
  group.form({1});
  group.join(2, make_join(0, 1, 12));
  EXPECT_THAT(group.take<RefusedMessage>(2)->why, HasSubstr("rank 0 is taken by process 100 of node \"here\""));
  EXPECT_TRUE(group.closed.contains(2));
  // Silent, but on_time() has not been called yet.
  group.now_us += kTimeoutUs;
  group.join(3, make_join(0, 1, 12));
  const std::optional<EndedMessage> ended = group.take<EndedMessage>(1);
  ASSERT_TRUE(ended.has_value());
  EXPECT_TRUE(ended->fenced);
  EXPECT_FALSE(group.closed.contains(3));
  EXPECT_EQ(group.core.status(0).members[0].incarnation, 12U);
}

TEST(CoordinatorCore, TheSameProcessReplacesItselfByALaterConnectionOnly) {
  Driven group(1);
  group.join(1, make_join(0, 1, 11, 5));
  group.join(2, make_join(0, 1, 11, 4));
  EXPECT_THAT(group.take<RefusedMessage>(2)->why, HasSubstr("later connection"));
  group.join(3, make_join(0, 1, 11, 6));
  EXPECT_TRUE(group.closed.contains(1));
  EXPECT_FALSE(group.closed.contains(3));
}

TEST(CoordinatorCore, RefusesWhatDoesNotBelong) {
  Driven group(2);
  JoinMessage first = make_join(0, 2, 11);
  first.options = {{"--seed", "0"}, {"--dtype", "auto"}, {"--block-size", "16"}};
  group.join(1, first);
  uint64_t session = 2;
  const auto refusal = [&](JoinMessage join) {
    group.join(++session, join);
    const std::optional<RefusedMessage> refused = group.take<RefusedMessage>(session);
    EXPECT_TRUE(refused.has_value() && refused->lasting);
    EXPECT_TRUE(group.closed.contains(session));
    return refused ? refused->why : "";
  };
  JoinMessage join = make_join(1, 2, 12);
  join.protocol = 9;
  EXPECT_THAT(refusal(join), HasSubstr("version 2 of the group protocol, this rank version 9"));
  EXPECT_THAT(refusal(make_join(2, 2, 12)), HasSubstr("rank 2 is not in 0 … 1"));
  EXPECT_THAT(refusal(make_join(-1, 2, 12)), HasSubstr("rank -1 is not in 0 … 1"));
  join = make_join(1, 2, 12);
  join.rank_timeout_us = 2'000'000;
  EXPECT_THAT(refusal(join), HasSubstr("--rank-timeout 2 s, the coordinator 1 s"));
  join = make_join(1, 2, 12);
  join.facts = {};
  EXPECT_THAT(refusal(join), HasSubstr("rank 1 has nothing as \"model\", rank 0 has \"m\""));
  join.facts = {{"model", "m"}, {"more", "x"}};
  EXPECT_THAT(refusal(join), HasSubstr("rank 1 has \"x\" as \"more\", rank 0 has nothing"));
  // A fact that is no option is explained by those that differ.
  join.facts = {{"model", "n"}};
  join.options = {{"--dtype", "float32"}, {"--seed", "5"}, {"--block-size", "16"}};
  EXPECT_THAT(refusal(join), HasSubstr("rank 1 and rank 0 differ in --dtype (\"float32\" and \"auto\"), --seed (\"5\" and "
                                       "\"0\"), and so in \"model\"; start all"));
  join.facts = {{"model", "m"}, {"--more", "x"}};
  EXPECT_THAT(refusal(join), HasSubstr("rank 1 has \"x\" as \"--more\", rank 0 has nothing"));
  for (int i = 0; i < 100; ++i) refusal(make_join(2, 2, 12));
  EXPECT_EQ(std::ssize(group.core.status(0).refusals), GroupStatus::kMaxRefusals);
}

TEST(CoordinatorCore, PausesBetweenFormationsThatFail) {
  Driven group(1);
  group.join(1, make_join(0, 1, 11));
  int64_t last_us = 0;
  for (int i = 0; i < 8; ++i) {
    ASSERT_TRUE(group.take<FormMessage>(1).has_value());
    group.say(1, FaultMessage{group.core.status(0).epoch, 0, "no memory"});
    const int64_t begin_us = group.now_us;
    while (group.sent[1].empty() || !std::holds_alternative<FormMessage>(group.sent[1].back())) {
      group.advance_us(10'000);
      group.say(1, BeatMessage{});
      ASSERT_LE(group.now_us - begin_us, 2 * kTimeoutUs);
    }
    EXPECT_GE(group.now_us - begin_us, std::min(2 * last_us - 20'000, kTimeoutUs));
    last_us = group.now_us - begin_us;
  }
  EXPECT_GE(last_us, kTimeoutUs);
}

// --- any order of events ---

// A process of a rank as the coordinator's peer: does what a membership does, unless it is stopped.
struct FakeRank {
  int32_t rank = 0;
  uint64_t incarnation = 0;
  uint64_t attempt = 0;
  uint64_t session = 0;  // 0: none
  uint64_t epoch = 0;    // standing in its eyes; 0: none
  bool is_stopped = false;
  std::vector<Message> inbox;
};

class Storm {
 public:
  Storm(uint64_t seed, int32_t size) : random_(seed), size_(size), core_({size, 1}, kTimeoutUs, 0) {
    for (int32_t r = 0; r < size; ++r) start(r);
  }

  void run(int64_t steps) {
    for (int64_t i = 0; i < steps && !testing::Test::HasFatalFailure(); ++i) step(/*harm=*/true);
    // Nothing is harmed any more: the group must stand soon.
    for (FakeRank& rank : ranks_) rank.is_stopped = false;
    const int64_t begin_us = now_us_;
    while (now_us_ - begin_us < 2 * kTimeoutUs) step(/*harm=*/false);  // the last harm still has its effect
    while (!all_stand()) {
      step(/*harm=*/false);
      ASSERT_LT(now_us_ - begin_us, 20 * kTimeoutUs) << core_.status(now_us_).text;
    }
    const uint64_t epoch = ranks_[0].epoch;
    const int64_t stood_us = now_us_;
    while (now_us_ - stood_us < 5 * kTimeoutUs) step(/*harm=*/false);
    for (const FakeRank& rank : ranks_) ASSERT_EQ(rank.epoch, epoch) << "it did not stay: " << last_end_;
    ASSERT_EQ(core_.num_sessions(), size_);
    formations = core_.status(now_us_).formations;
  }

  int64_t formations = 0;

 private:
  uint64_t draw(uint64_t below) { return random_() % below; }

  void start(int32_t r) {
    FakeRank fresh;
    fresh.rank = r;
    fresh.incarnation = random_();
    if (r < std::ssize(ranks_)) {
      ranks_[static_cast<size_t>(r)] = fresh;
    } else {
      ranks_.push_back(fresh);
    }
  }

  void step(bool harm) {
    now_us_ += static_cast<int64_t>(draw(kTimeoutUs / 50));
    FakeRank& rank = ranks_[draw(static_cast<uint64_t>(size_))];
    if (harm) do_harm(rank);
    for (FakeRank& each : ranks_) {
      if (!each.is_stopped && draw(2) == 0) act(each);
    }
    // Late news of connections that are closed, and late messages on those that are not.
    if (!closing_.empty() && draw(4) == 0) {
      const size_t i = draw(closing_.size());
      core_.on_closed(SessionId(closing_[i]), "its connection was closed", now_us_);
      closing_.erase(closing_.begin() + static_cast<ptrdiff_t>(i));
    }
    if (now_us_ >= core_.next_time_us()) core_.on_time(now_us_);
    deliver();
  }

  void do_harm(FakeRank& rank) {
    switch (draw(200)) {
      case 0:  // killed; its restart comes at once, the news of its end later
        if (rank.session != 0) closing_.push_back(rank.session);
        start(rank.rank);
        break;
      case 1: rank.is_stopped = true; break;
      case 2: rank.is_stopped = false; break;
      case 3: say(rank, FaultMessage{Epoch(rank.epoch + draw(2)), -1, "a step failed"}); break;
      case 4:  // its connection breaks
        if (rank.session != 0) closing_.push_back(rank.session);
        rank.session = 0;
        break;
      case 5: say(rank, WindowMessage{past_epoch(), {}}); break;
      case 6: say(rank, MappedMessage{past_epoch()}); break;
      case 7: {  // a stranger
        core_.on_connected(SessionId(++last_session_), "stranger", now_us_);
        if (draw(2) == 0) core_.on_message(SessionId(last_session_), BeatMessage{}, now_us_);
        break;
      }
      case 8: {  // a second process of the same rank
        core_.on_connected(SessionId(++last_session_), "twin", now_us_);
        core_.on_message(SessionId(last_session_), make_join(rank.rank, size_, random_()), now_us_);
        // If it takes the place of a silent one it answers nothing and is given up in its turn.
        break;
      }
      default: break;
    }
  }

  Epoch past_epoch() { return Epoch(draw(std::max<uint64_t>(1, core_.status(now_us_).epoch.value))); }

  void say(FakeRank& rank, const Message& message) {
    if (rank.session != 0) core_.on_message(SessionId(rank.session), message, now_us_);
  }

  void act(FakeRank& rank) {
    if (rank.session == 0) {
      rank.epoch = 0;
      rank.inbox.clear();
      rank.session = ++last_session_;
      core_.on_connected(SessionId(rank.session), "peer", now_us_);
      say(rank, make_join(rank.rank, size_, rank.incarnation, ++rank.attempt));
      return;
    }
    for (const Message& message : std::exchange(rank.inbox, {})) {
      if (const FormMessage* const form = std::get_if<FormMessage>(&message)) {
        say(rank, WindowMessage{form->epoch, {{}, {}, rank.incarnation, ""}});
      } else if (const MapMessage* const map = std::get_if<MapMessage>(&message)) {
        ASSERT_EQ(map->windows[static_cast<size_t>(rank.rank)].stamp, rank.incarnation) << "another process's window";
        maps_[map->epoch.value].push_back(*map);
        say(rank, MappedMessage{map->epoch});
      } else if (const OpenMessage* const open = std::get_if<OpenMessage>(&message)) {
        rank.epoch = open->epoch.value;
        check_members(rank);
      } else if (std::holds_alternative<EndedMessage>(message)) {
        rank.epoch = 0;
      }
    }
    say(rank, BeatMessage{});
  }

  // Whoever stands in an epoch stands in it with the same processes.
  void check_members(const FakeRank& opened) {
    const auto [seen, is_first] = members_.try_emplace({opened.epoch, opened.rank}, opened.incarnation);
    ASSERT_EQ(seen->second, opened.incarnation) << "two members with rank " << opened.rank << " in epoch " << opened.epoch;
    ASSERT_TRUE(is_first) << "epoch " << opened.epoch << " was opened twice";
    for (const MapMessage& map : maps_[opened.epoch]) {
      for (size_t r = 0; r < map.windows.size(); ++r) {
        ASSERT_EQ(map.windows[r].stamp, maps_[opened.epoch][0].windows[r].stamp) << "two lists of one epoch";
      }
    }
    ASSERT_EQ(std::ssize(maps_[opened.epoch]), size_) << "opened before all had mapped";
  }

  void deliver() {
    for (const CoordinatorAction& action : core_.take_actions()) {
      if (action.message && std::holds_alternative<EndedMessage>(*action.message)) {
        last_end_ = std::get<EndedMessage>(*action.message).why;
      }
      for (FakeRank& rank : ranks_) {
        if (rank.session != action.session.value) continue;
        if (action.message) rank.inbox.push_back(*action.message);
        if (action.close) rank.session = 0;
      }
    }
  }

  bool all_stand() const {
    for (const FakeRank& rank : ranks_) {
      if (rank.epoch == 0 || rank.epoch != ranks_[0].epoch || rank.session == 0) return false;
    }
    return core_.status(now_us_).standing;
  }

  std::mt19937_64 random_;
  int32_t size_;
  int64_t now_us_ = 0;
  CoordinatorCore core_;
  std::vector<FakeRank> ranks_;
  uint64_t last_session_ = 0;
  std::vector<uint64_t> closing_;
  std::string last_end_;
  std::map<std::pair<uint64_t, int32_t>, uint64_t> members_;
  std::map<uint64_t, std::vector<MapMessage>> maps_;
};

TEST(CoordinatorCore, AnyOrderOfEvents) {
  const uint64_t first_seed = std::random_device()();
  int64_t formations = 0;
  for (uint64_t i = 0; i < 200; ++i) {
    const uint64_t seed = first_seed + i;
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Storm storm(seed, static_cast<int32_t>(1 + i % 5));
    storm.run(5000);
    if (HasFatalFailure()) return;
    formations += storm.formations;
  }
  EXPECT_GE(formations, 2000) << "the storm is so strong that hardly anything is formed";
  std::printf("%lld epochs stood\n", static_cast<long long>(formations));
}

}  // namespace
}  // namespace tandem::group
