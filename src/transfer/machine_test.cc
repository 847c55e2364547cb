// Both state machines by hand-made sequences: every state times every kind of event.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/transfer/receive_machine.h"
#include "src/transfer/send_machine.h"
#include "src/transfer/test_support.h"

namespace tandem::transfer {
namespace {

using testing::HasSubstr;
using Receive = ReceiveMachine::State;
using Send = SendMachine::State;

constexpr int64_t kTokens = 10;  // 3 blocks of 4
constexpr int64_t kIdleUs = 1000;

// What came out of a machine, by kind.
struct Seen {
  std::vector<Message> told;
  std::vector<Write> written;
  std::vector<Finish> finished;

  void add(Actions&& actions) {
    for (Action& action : actions) {
      EXPECT_TRUE(finished.empty()) << "an action after Finish";
      if (Tell* tell = std::get_if<Tell>(&action)) told.push_back(tell->message);
      if (const Write* write = std::get_if<Write>(&action)) written.push_back(*write);
      if (Finish* finish = std::get_if<Finish>(&action)) finished.push_back(*finish);
    }
  }
  bool ended_with(ErrorKind kind) const {
    return finished.size() == 1 && !finished[0].status.ok() && finished[0].status.error().kind == kind;
  }
  bool ended_well() const { return finished.size() == 1 && finished[0].status.ok(); }
  template <typename M>
  const M* last_told() const {
    return told.empty() ? nullptr : std::get_if<M>(&told.back());
  }
  bool told_fault(FaultCode code) const {
    const Fault* fault = last_told<Fault>();
    return fault != nullptr && fault->code == code;
  }
};

class Receiver {
 public:
  explicit Receiver(bool pull, int64_t first_block = 0, int64_t deadline_us = 0)
      : grid(make_layout(), kTokens),
        first(first_block),
        machine(ReceiveSpec{handle, pull, kTokens, std::min(first_block * grid.block_tokens, kTokens), deadline_us,
                            kIdleUs},
                0) {
    machine.set_sender_grid(grid);
    if (!pull) return;
    Actions actions;
    machine.start(0, actions);
    seen.add(std::move(actions));
  }
  void get(const Message& message, int64_t payload_bytes = 0, bool intact = true) {
    const Data* data = std::get_if<Data>(&message);
    const std::optional<Write> place = data != nullptr ? machine.find_place(*data, payload_bytes) : std::nullopt;
    Actions actions;
    machine.receive(message, payload_bytes, intact, now_us, actions);
    expect_same(place, actions, intact);
    seen.add(std::move(actions));
  }
  // A borrowed payload is written to where find_place() says, before receive() decides: both must mean the same.
  static void expect_same(const std::optional<Write>& place, const Actions& actions, bool intact) {
    std::optional<Write> written;
    for (const Action& action : actions) {
      if (const Write* write = std::get_if<Write>(&action)) written = *write;
    }
    ASSERT_EQ(place.has_value() && intact, written.has_value());
    if (!written.has_value()) return;
    EXPECT_EQ(place->layer, written->layer);
    EXPECT_EQ(place->first_part, written->first_part);
    EXPECT_EQ(place->num_parts, written->num_parts);
  }
  void begin() { get(Begin{handle, kTokens, 0, 0}); }
  void data(int64_t layer, int64_t part, int64_t count, bool intact = true) {
    get(Data{handle, layer, part, count, std::nullopt}, count * grid.block_bytes, intact);
  }
  void all_data() {
    for (int64_t layer = 0; layer < grid.num_layers; ++layer) data(layer, first, grid.num_blocks - first);
  }
  void commit(bool with_token) {
    get(Commit{handle, kTokens, grid.bytes_from(first),
               with_token ? std::optional(FirstToken{5, 0, {}, 0}) : std::nullopt});
  }
  void abort() {
    Actions actions;
    machine.abort(actions);
    seen.add(std::move(actions));
  }
  void lose_peer() {
    Actions actions;
    machine.lose_peer(make_error(ErrorKind::kUnavailable, "p:1 is gone"), actions);
    seen.add(std::move(actions));
  }
  void wait(int64_t us) {
    now_us += us;
    Actions actions;
    machine.expire(now_us, actions);
    seen.add(std::move(actions));
  }

  Handle handle = make_handle(1);
  PartGrid grid;
  int64_t first;
  int64_t now_us = 0;
  ReceiveMachine machine;
  Seen seen;
};

TEST(ReceiveMachine, PushCompletes) {
  Receiver r(false);
  EXPECT_EQ(r.machine.state(), Receive::kExpecting);
  r.begin();
  EXPECT_EQ(r.seen.last_told<Accept>()->first_token, 0);
  r.data(0, 0, 2);
  r.data(1, 0, 3);
  r.data(0, 2, 1);
  r.data(2, 0, 3);
  EXPECT_TRUE(r.seen.finished.empty());
  r.commit(true);
  ASSERT_TRUE(r.seen.ended_well());
  EXPECT_EQ(r.seen.finished[0].first_token->token, 5);
  EXPECT_EQ(r.seen.finished[0].bytes, r.grid.bytes_from(0));
  EXPECT_EQ(r.seen.last_told<Ack>()->num_bytes, r.grid.bytes_from(0));
  EXPECT_EQ(r.seen.written.size(), 4U);
}

TEST(ReceiveMachine, CommitMayComeFirstAndDataInAnyOrder) {
  Receiver r(false);
  r.begin();
  r.commit(true);
  for (int64_t layer = 2; layer >= 0; --layer) {
    for (int64_t part = 2; part >= 0; --part) {
      EXPECT_TRUE(r.seen.finished.empty());
      r.data(layer, part, 1);
    }
  }
  EXPECT_TRUE(r.seen.ended_well());
  EXPECT_EQ(r.seen.written.size(), 9U);
}

TEST(ReceiveMachine, OneMissingPartNeverCommits) {
  for (int64_t missing = 0; missing < 9; ++missing) {
    Receiver r(false);
    r.begin();
    for (int64_t i = 0; i < 9; ++i) {
      if (i != missing) r.data(i / 3, i % 3, 1);
    }
    r.commit(true);
    EXPECT_TRUE(r.seen.finished.empty());
    r.wait(kIdleUs);
    EXPECT_TRUE(r.seen.ended_with(ErrorKind::kUnavailable));
    EXPECT_NE(r.seen.last_told<Abort>(), nullptr);
  }
}

TEST(ReceiveMachine, OnlyMissingBlocksAreAskedForAndTaken) {
  Receiver r(false, 2);
  r.begin();
  EXPECT_EQ(r.seen.last_told<Accept>()->first_token, 8);
  r.all_data();
  r.commit(true);
  EXPECT_TRUE(r.seen.ended_well());
  EXPECT_EQ(r.seen.finished[0].bytes, 3 * r.grid.block_bytes);

  Receiver low(false, 2);  // a block that decode has in its prefix cache is never written
  low.begin();
  low.data(0, 1, 1);
  EXPECT_TRUE(low.seen.written.empty());
  EXPECT_TRUE(low.seen.told_fault(FaultCode::kOutOfRange));

  Receiver full(true, 3);  // everything is here already
  full.commit(false);
  EXPECT_TRUE(full.seen.ended_well());
  EXPECT_EQ(full.seen.finished[0].bytes, 0);
}

TEST(ReceiveMachine, RepetitionsAreIgnored) {
  Receiver r(false);
  r.begin();
  r.begin();
  r.data(0, 0, 3);
  r.data(0, 0, 3);
  r.data(0, 1, 1);
  EXPECT_EQ(r.seen.written.size(), 1U);
  r.commit(true);
  r.commit(true);
  r.data(1, 0, 3);
  r.data(2, 0, 3);
  EXPECT_TRUE(r.seen.ended_well());
  EXPECT_EQ(r.seen.written.size(), 3U);
  r.data(0, 0, 3);  // after the end
  r.commit(true);
  r.begin();
  r.abort();
  r.lose_peer();
  r.wait(1'000'000);
  EXPECT_EQ(r.seen.finished.size(), 1U);
  EXPECT_EQ(r.machine.next_expiry_us(), kNever);
}

TEST(ReceiveMachine, DamagedDataIsNeverWritten) {
  Receiver r(false);
  r.begin();
  r.data(1, 0, 3, /*intact=*/false);
  EXPECT_TRUE(r.seen.written.empty());
  EXPECT_TRUE(r.seen.told_fault(FaultCode::kChecksum));
  EXPECT_TRUE(r.seen.ended_with(ErrorKind::kDataLoss));
}

TEST(ReceiveMachine, WrongDataEndsTheTransfer) {
  struct Case {
    Data data;
    int64_t payload;
    FaultCode code;
  };
  const int64_t block = make_layout().block_bytes();
  for (const Case& c :
       {Case{{{}, 3, 0, 1, {}}, block, FaultCode::kOutOfRange}, Case{{{}, 0, 3, 1, {}}, block, FaultCode::kOutOfRange},
        Case{{{}, 0, 2, 2, {}}, 2 * block, FaultCode::kOutOfRange}, Case{{{}, 0, 0, 0, {}}, 0, FaultCode::kOutOfRange},
        Case{{{}, 0, int64_t{1} << 47, int64_t{1} << 47, {}}, block, FaultCode::kOutOfRange},
        Case{{{}, 0, 0, 1, {}}, block - 1, FaultCode::kWrongLength},
        Case{{{}, 0, 0, 1, {}}, 2 * block, FaultCode::kWrongLength},
        Case{{{}, 0, 0, 2, {}}, block, FaultCode::kWrongLength}, Case{{{}, 0, 0, 1, {}}, 0, FaultCode::kWrongLength}}) {
    Receiver r(false);
    r.begin();
    r.get(c.data, c.payload);
    EXPECT_TRUE(r.seen.told_fault(c.code));
    EXPECT_TRUE(r.seen.ended_with(ErrorKind::kInternal));
    EXPECT_TRUE(r.seen.written.empty());
  }
  Receiver overlap(false);
  overlap.begin();
  overlap.data(0, 0, 2);
  overlap.data(0, 1, 2);
  EXPECT_TRUE(overlap.seen.told_fault(FaultCode::kProtocol));
  EXPECT_EQ(overlap.seen.written.size(), 1U);
}

// Whatever the size of its own blocks: what it lacks begins in the middle of one of the sender's, which comes whole.
TEST(ReceiveMachine, LacksTokensFromTheMiddleOfASendersBlockOn) {
  const PartGrid grid(make_layout(3, 8), 20);  // blocks of 8: 0 … 7, 8 … 15, 16 … 19
  const Handle handle = make_handle(1);
  ReceiveMachine machine(ReceiveSpec{handle, false, 20, 12, 0, kIdleUs}, 0);
  machine.set_sender_grid(grid);
  machine.set_sender_grid(grid);  // again, with every word of the sender
  Actions actions;
  machine.receive(Begin{handle, 20, 8, 0}, 0, true, 0, actions);
  EXPECT_EQ(std::get<Accept>(std::get<Tell>(actions.back()).message).first_token, 12);
  EXPECT_FALSE(machine.find_place(Data{handle, 0, 0, 1, {}}, grid.block_bytes).has_value());
  for (int64_t layer = 0; layer < 3; ++layer) {
    machine.receive(Data{handle, layer, 1, 2, {}}, 2 * grid.block_bytes, true, 0, actions);
  }
  machine.receive(Commit{handle, 20, 6 * grid.block_bytes, FirstToken{}}, 0, true, 0, actions);
  EXPECT_TRUE(std::get<Finish>(actions.back()).status.ok());

  ReceiveMachine all_there(ReceiveSpec{handle, false, 20, 20, 0, kIdleUs}, 0);  // also the unfinished block
  all_there.set_sender_grid(grid);
  actions.clear();
  all_there.receive(Begin{handle, 20, 16, 0}, 0, true, 0, actions);
  all_there.receive(Commit{handle, 20, 0, FirstToken{}}, 0, true, 0, actions);
  EXPECT_TRUE(std::get<Finish>(actions.back()).status.ok());
}

TEST(ReceiveMachine, WrongBeginAndCommit) {
  Receiver tokens(false);
  tokens.get(Begin{tokens.handle, kTokens + 1, 0, 0});
  EXPECT_TRUE(tokens.seen.told_fault(FaultCode::kWrongLength));
  Receiver blocks(false, 1);
  blocks.get(Begin{blocks.handle, kTokens, 8, 0});
  EXPECT_TRUE(blocks.seen.told_fault(FaultCode::kOutOfRange));
  Receiver early_data(false);
  early_data.data(0, 0, 1);
  EXPECT_TRUE(early_data.seen.told_fault(FaultCode::kProtocol));
  EXPECT_TRUE(early_data.seen.written.empty());
  Receiver early_commit(false);
  early_commit.commit(true);
  EXPECT_TRUE(early_commit.seen.told_fault(FaultCode::kProtocol));
  Receiver no_token(false);
  no_token.begin();
  no_token.all_data();
  no_token.commit(false);
  EXPECT_TRUE(no_token.seen.told_fault(FaultCode::kProtocol));
  for (const Commit& wrong :
       {Commit{{}, kTokens - 1, 3 * 3 * 96, FirstToken{}}, Commit{{}, kTokens, 3 * 3 * 96 - 1, FirstToken{}}}) {
    Receiver r(false);
    r.begin();
    r.all_data();
    r.get(wrong);
    EXPECT_TRUE(r.seen.told_fault(FaultCode::kWrongLength));
    EXPECT_TRUE(r.seen.ended_with(ErrorKind::kInternal));
  }
  Receiver pull_token(true);
  pull_token.all_data();
  pull_token.commit(true);
  EXPECT_TRUE(pull_token.seen.told_fault(FaultCode::kProtocol));
  Receiver pull_begin(true);
  pull_begin.begin();
  EXPECT_TRUE(pull_begin.seen.told_fault(FaultCode::kProtocol));
  Receiver sender_message(false);
  sender_message.get(Ack{sender_message.handle, 1});
  EXPECT_TRUE(sender_message.seen.told_fault(FaultCode::kProtocol));
}

// Brings a receiver into each of its states.
Receiver make_receiver(Receive state, bool pull = false, int64_t deadline_us = 0) {
  Receiver r(pull, 0, deadline_us);
  if (state == Receive::kReceiving) {
    if (!pull) r.begin();
    r.data(0, 0, 1);
  }
  EXPECT_EQ(r.machine.state(), state);
  r.seen = {};
  return r;
}

TEST(ReceiveMachine, AbortLossAndFaultInEachState) {
  for (const auto& [state, pull] : {std::pair(Receive::kExpecting, false), std::pair(Receive::kRequested, true),
                                    std::pair(Receive::kReceiving, false), std::pair(Receive::kReceiving, true)}) {
    Receiver aborted = make_receiver(state, pull);
    aborted.abort();
    EXPECT_TRUE(aborted.seen.ended_with(ErrorKind::kAborted));
    EXPECT_EQ(aborted.seen.last_told<Abort>() != nullptr, state != Receive::kExpecting);
    aborted.data(1, 0, 1);  // late data is not written
    EXPECT_TRUE(aborted.seen.written.empty());

    Receiver lost = make_receiver(state, pull);
    lost.lose_peer();
    EXPECT_TRUE(lost.seen.ended_with(ErrorKind::kUnavailable));
    EXPECT_THAT(lost.seen.finished[0].status.error().message, HasSubstr("p:1 is gone"));

    Receiver told = make_receiver(state, pull);
    told.get(Abort{told.handle, Side::kReceiver, "client left"});
    EXPECT_TRUE(told.seen.ended_with(ErrorKind::kAborted));
    EXPECT_THAT(told.seen.finished[0].status.error().message, HasSubstr("client left"));
    EXPECT_NE(told.seen.last_told<AbortAck>(), nullptr);

    Receiver repeated = make_receiver(state, pull);  // the handle was aborted here and presented again
    repeated.get(AbortAck{repeated.handle, Side::kReceiver});
    EXPECT_EQ(repeated.machine.state(), state);
    EXPECT_TRUE(repeated.seen.told.empty());

    Receiver refused = make_receiver(state, pull);
    refused.get(Fault{refused.handle, Side::kReceiver, FaultCode::kConsumed, "used"});
    EXPECT_TRUE(refused.seen.ended_with(ErrorKind::kInvalidArgument));
    EXPECT_EQ(refused.seen.finished[0].status.error().code, "kv_transfer_consumed");
    EXPECT_TRUE(refused.seen.told.empty());
  }
}

TEST(ReceiveMachine, WaitsAreBounded) {
  Receiver unasked = make_receiver(Receive::kExpecting);  // without deadline: the idle time-out
  unasked.wait(kIdleUs - 1);
  EXPECT_TRUE(unasked.seen.finished.empty());
  unasked.wait(1);
  EXPECT_TRUE(unasked.seen.ended_with(ErrorKind::kUnavailable));

  Receiver queued = make_receiver(Receive::kExpecting, false, 50 * kIdleUs);  // with one: prefill may queue so long
  queued.wait(49 * kIdleUs);
  EXPECT_TRUE(queued.seen.finished.empty());
  queued.wait(kIdleUs);
  EXPECT_TRUE(queued.seen.ended_with(ErrorKind::kDeadlineExceeded));

  Receiver idle = make_receiver(Receive::kReceiving, false, 50 * kIdleUs);
  for (int i = 0; i < 20; ++i) {
    idle.wait(kIdleUs - 1);
    idle.get(Heartbeat{idle.handle, Side::kReceiver});
  }
  EXPECT_TRUE(idle.seen.finished.empty());
  idle.wait(kIdleUs);
  EXPECT_TRUE(idle.seen.ended_with(ErrorKind::kUnavailable));
  EXPECT_TRUE(idle.seen.finished[0].peer_silent);

  Receiver quiet = make_receiver(Receive::kReceiving);  // heartbeats alone do not keep it for ever
  int64_t rounds = 0;
  while (quiet.seen.finished.empty() && rounds < 2 * kMaxQuietUs / kIdleUs) {
    quiet.wait(kIdleUs / 2);
    quiet.get(Heartbeat{quiet.handle, Side::kReceiver});
    ++rounds;
  }
  EXPECT_TRUE(quiet.seen.ended_with(ErrorKind::kUnavailable));

  Receiver shorter = make_receiver(Receive::kExpecting, false, 50 * kIdleUs);  // the sender's deadline counts too
  shorter.get(Begin{shorter.handle, kTokens, 0, kIdleUs / 2});
  shorter.wait(kIdleUs / 2);
  EXPECT_TRUE(shorter.seen.ended_with(ErrorKind::kDeadlineExceeded));
}

class Sender {
 public:
  explicit Sender(bool pull, int64_t first_block = 0, int64_t deadline_us = 0,
                  const model::KvLayout& layout = make_layout())
      : grid(layout, kTokens),
        machine(SendSpec{handle, pull, grid, kTokens, first_block, deadline_us, kIdleUs, 10 * kIdleUs}, 0) {
    if (pull) return;
    Actions actions;
    machine.start(0, actions);
    seen.add(std::move(actions));
  }
  void get(const Message& message) {
    Actions actions;
    machine.receive(message, now_us, actions);
    seen.add(std::move(actions));
  }
  void accept(int64_t first_block = 0) { get(Accept{handle, std::min(first_block * grid.block_tokens, kTokens)}); }
  void pull(int64_t first_block = 0) { get(Pull{handle, kTokens, first_block * grid.block_tokens, 0}); }
  void add(int64_t layer, int64_t first, int64_t count) { machine.add_blocks(layer, first, count, now_us); }
  void add_all() {
    for (int64_t layer = 0; layer < grid.num_layers; ++layer) add(layer, 0, grid.num_blocks);
  }
  // Sends all that can be sent; the transport takes it at once.
  int64_t drain() {
    int64_t parts = 0;
    while (const std::optional<PartRange> range = machine.next_data(now_us)) {
      sent.push_back(*range);
      parts += range->num_parts;
      machine.data_sent(now_us);
    }
    Actions actions;
    machine.advance(now_us, actions);
    seen.add(std::move(actions));
    return parts;
  }
  void wait(int64_t us) {
    now_us += us;
    Actions actions;
    machine.expire(now_us, actions);
    seen.add(std::move(actions));
  }
  void abort() {
    Actions actions;
    machine.abort(actions);
    seen.add(std::move(actions));
  }
  void lose_peer() {
    Actions actions;
    machine.lose_peer(make_error(ErrorKind::kUnavailable, "d:1 is gone"), actions);
    seen.add(std::move(actions));
  }

  Handle handle = make_handle(1);
  PartGrid grid;
  int64_t now_us = 0;
  SendMachine machine;
  Seen seen;
  std::vector<PartRange> sent;
};

TEST(SendMachine, PushStreamsLayersAndChunks) {
  Sender s(false);
  EXPECT_NE(s.seen.last_told<Begin>(), nullptr);
  s.add(0, 0, 2);  // computed before the decode side answers
  EXPECT_EQ(s.drain(), 0);
  s.accept();
  EXPECT_EQ(s.drain(), 2);
  s.add(1, 0, 2);
  s.add(2, 0, 2);
  s.add(0, 2, 1);
  EXPECT_EQ(s.drain(), 5);
  s.add(1, 2, 1);
  s.add(2, 2, 1);
  s.machine.commit(FirstToken{9, 0, {}, 0}, s.now_us);
  EXPECT_EQ(s.machine.state(), Send::kStreaming);
  EXPECT_EQ(s.drain(), 2);
  EXPECT_EQ(s.machine.state(), Send::kCommitted);
  ASSERT_NE(s.seen.last_told<Commit>(), nullptr);
  EXPECT_EQ(s.seen.last_told<Commit>()->num_bytes, s.grid.bytes_from(0));
  EXPECT_EQ(s.seen.last_told<Commit>()->first_token->token, 9);
  EXPECT_TRUE(s.seen.finished.empty());
  s.get(Ack{s.handle, s.grid.bytes_from(0)});
  EXPECT_TRUE(s.seen.ended_well());
  s.abort();
  s.lose_peer();
  s.wait(1'000'000);
  EXPECT_EQ(s.seen.finished.size(), 1U);
}

TEST(SendMachine, SendsOnlyWhatIsWanted) {
  Sender s(false, 1);
  s.add_all();  // below the span's first block: skipped
  s.accept(2);  // and below the receiver's
  EXPECT_EQ(s.drain(), 3);
  for (const PartRange& range : s.sent) EXPECT_EQ(range.first_part, 2);
  s.machine.commit(FirstToken{}, s.now_us);
  s.drain();
  EXPECT_EQ(s.seen.last_told<Commit>()->num_bytes, 3 * s.grid.block_bytes);

  Sender low(false, 1);
  low.accept(0);
  EXPECT_TRUE(low.seen.told_fault(FaultCode::kOutOfRange));
  Sender high(false, 1);
  high.get(Accept{high.handle, kTokens + 1});
  EXPECT_TRUE(high.seen.told_fault(FaultCode::kOutOfRange));
  Sender nothing(false, 0);
  nothing.add_all();
  nothing.machine.commit(FirstToken{}, 0);
  nothing.accept(3);
  EXPECT_EQ(nothing.drain(), 0);
  EXPECT_EQ(nothing.seen.last_told<Commit>()->num_bytes, 0);
}

TEST(SendMachine, SendsTheBlockInWhichTheWantedTokensBegin) {
  Sender s(false);  // blocks of 4
  s.add_all();
  s.get(Accept{s.handle, 7});
  EXPECT_EQ(s.drain(), 6);
  s.machine.commit(FirstToken{}, s.now_us);
  s.drain();
  EXPECT_EQ(s.seen.last_told<Commit>()->num_bytes, 6 * s.grid.block_bytes);
  Sender none(false);
  none.add_all();
  none.get(Accept{none.handle, kTokens});  // also not the unfinished one
  EXPECT_EQ(none.drain(), 0);
}

TEST(SendMachine, LargeBlocksAreCut) {
  Sender s(true, 0, 0, make_layout(2, 4, 40'000));  // blocks of 160,000 bytes
  s.pull();
  EXPECT_EQ(s.drain(), 2 * 3 * 3);
  int64_t bytes = 0;
  for (const PartRange& range : s.sent) {
    EXPECT_EQ(range.num_parts, 1);
    EXPECT_LE(s.grid.bytes_of(range.first_part), comm::kMaxPayloadBytes);
    bytes += s.grid.bytes_of(range.first_part);
  }
  EXPECT_EQ(bytes, 2 * 3 * 160'000);
}

TEST(SendMachine, SmallBlocksShareAMessage) {
  Sender s(true);
  s.pull();
  EXPECT_EQ(s.drain(), 9);
  EXPECT_EQ(s.sent.size(), 3U);  // one per layer
}

TEST(SendMachine, BytesInFlightAreBounded) {
  Sender s(true, 0, 0, make_layout(kMaxDataInFlight + 8, 4, 24));
  s.pull();
  int64_t in_flight = 0;
  while (s.machine.next_data(0).has_value()) ++in_flight;
  EXPECT_EQ(in_flight, kMaxDataInFlight);
  s.machine.data_sent(0);
  EXPECT_TRUE(s.machine.next_data(0).has_value());
  EXPECT_FALSE(s.machine.next_data(0).has_value());
}

TEST(SendMachine, APublicationIsUsedOnceAndSurvivesWrongRequests) {
  Sender s(true);
  s.get(Pull{s.handle, kTokens + 1, 0, 0});
  EXPECT_TRUE(s.seen.told_fault(FaultCode::kWrongLength));
  s.get(Pull{s.handle, kTokens, kTokens + 1, 0});
  EXPECT_TRUE(s.seen.told_fault(FaultCode::kOutOfRange));
  EXPECT_EQ(s.machine.state(), Send::kPublished);
  EXPECT_TRUE(s.seen.finished.empty());
  s.pull(1);
  s.pull(0);  // a repetition changes nothing
  EXPECT_EQ(s.drain(), 6);
  EXPECT_EQ(s.seen.last_told<Commit>()->num_bytes, 6 * s.grid.block_bytes);
  EXPECT_FALSE(s.seen.last_told<Commit>()->first_token.has_value());
  s.get(Ack{s.handle, 6 * s.grid.block_bytes});
  EXPECT_TRUE(s.seen.ended_well());
}

TEST(SendMachine, LeaseIsExtendedByHeartbeatsAndNeverEndsUnderAReader) {
  Sender unread(true);
  unread.wait(10 * kIdleUs - 1);
  EXPECT_TRUE(unread.seen.finished.empty());
  unread.wait(1);
  EXPECT_TRUE(unread.seen.ended_with(ErrorKind::kDeadlineExceeded));

  Sender renewed(true);
  for (int i = 0; i < 10; ++i) {
    renewed.wait(9 * kIdleUs);
    renewed.get(Heartbeat{renewed.handle, Side::kSender});
  }
  EXPECT_TRUE(renewed.seen.finished.empty());

  Sender read(true, 0, 0, make_layout(40, 4, 24));
  read.wait(10 * kIdleUs - 1);
  read.pull();
  for (int i = 0; i < 40; ++i) {  // slower than the lease, but never silent
    ASSERT_TRUE(read.machine.next_data(read.now_us).has_value());
    read.machine.data_sent(read.now_us);
    read.wait(kIdleUs / 2);
    ASSERT_TRUE(read.seen.finished.empty());
  }
}

Sender make_sender(Send state, int64_t deadline_us = 0) {
  Sender s(state == Send::kPublished, 0, deadline_us);
  if (state == Send::kStreaming || state == Send::kCommitted) {
    s.accept();
    s.add_all();
    s.drain();
  }
  if (state == Send::kCommitted) {
    s.machine.commit(FirstToken{}, 0);
    s.drain();
  }
  EXPECT_EQ(s.machine.state(), state);
  s.seen = {};
  return s;
}

TEST(SendMachine, AbortLossAndFaultInEachState) {
  for (Send state : {Send::kPublished, Send::kOffered, Send::kStreaming, Send::kCommitted}) {
    Sender aborted = make_sender(state);
    aborted.abort();
    EXPECT_TRUE(aborted.seen.ended_with(ErrorKind::kAborted));
    EXPECT_EQ(aborted.seen.last_told<Abort>() != nullptr, state != Send::kPublished);
    EXPECT_FALSE(aborted.machine.next_data(0).has_value());
    aborted.add(0, 0, 1);  // the engine may not know yet
    aborted.machine.commit(FirstToken{}, 0);
    EXPECT_EQ(aborted.drain(), 0);

    Sender lost = make_sender(state);
    lost.lose_peer();
    EXPECT_TRUE(lost.seen.ended_with(ErrorKind::kUnavailable));

    Sender told = make_sender(state);
    told.get(Abort{told.handle, Side::kSender, "client left"});
    EXPECT_TRUE(told.seen.ended_with(ErrorKind::kAborted));
    EXPECT_NE(told.seen.last_told<AbortAck>(), nullptr);

    // A pull that was refused here knows the handle, but another prompt.
    Sender foreign = make_sender(state);
    const bool is_pull = state == Send::kPublished;
    foreign.get(Abort{foreign.handle, Side::kSender, "client left", {1}});
    EXPECT_EQ(foreign.machine.state() == state, is_pull);
    EXPECT_NE(foreign.seen.last_told<AbortAck>(), nullptr);

    Sender repeated = make_sender(state);
    repeated.get(AbortAck{repeated.handle, Side::kSender});
    EXPECT_EQ(repeated.machine.state(), state);
    EXPECT_TRUE(repeated.seen.told.empty());

    Sender refused = make_sender(state);
    refused.get(Fault{refused.handle, Side::kSender, FaultCode::kExpired, "late"});
    EXPECT_TRUE(refused.seen.ended_with(ErrorKind::kUnavailable));
    EXPECT_EQ(refused.seen.finished[0].status.error().code, "kv_transfer_expired");

    Sender confused = make_sender(state);
    confused.get(Data{confused.handle, 0, 0, 1, std::nullopt});
    EXPECT_TRUE(confused.seen.told_fault(FaultCode::kProtocol));
  }
  Sender early_ack = make_sender(Send::kStreaming);
  early_ack.get(Ack{early_ack.handle, early_ack.grid.bytes_from(0)});
  EXPECT_TRUE(early_ack.seen.ended_with(ErrorKind::kInternal));
  Sender short_ack = make_sender(Send::kCommitted);
  short_ack.get(Ack{short_ack.handle, 1});
  EXPECT_TRUE(short_ack.seen.ended_with(ErrorKind::kInternal));
}

TEST(SendMachine, WaitsAreBounded) {
  for (Send state : {Send::kOffered, Send::kCommitted}) {
    Sender s = make_sender(state);
    s.wait(kIdleUs);
    EXPECT_TRUE(s.seen.ended_with(ErrorKind::kUnavailable));
    EXPECT_TRUE(s.seen.finished[0].peer_silent);
    EXPECT_NE(s.seen.last_told<Abort>(), nullptr);
  }
  Sender stuck = make_sender(Send::kOffered);  // data is with a transport that does not take it
  stuck.accept();
  stuck.add(0, 0, 1);
  EXPECT_TRUE(stuck.machine.next_data(0).has_value());
  stuck.wait(kIdleUs);
  EXPECT_TRUE(stuck.seen.ended_with(ErrorKind::kUnavailable));

  Sender late = make_sender(Send::kStreaming, 5 * kIdleUs);
  late.wait(5 * kIdleUs);
  EXPECT_TRUE(late.seen.ended_with(ErrorKind::kDeadlineExceeded));
  EXPECT_FALSE(late.seen.finished[0].peer_silent);
}

TEST(SendMachine, HeartbeatsWhileTheEngineComputes) {
  Sender s = make_sender(Send::kOffered);
  s.accept();
  s.machine.set_peer_idle_timeout(kIdleUs);
  for (int i = 0; i < 100; ++i) s.wait(kIdleUs / kHeartbeatsPerIdle);
  EXPECT_TRUE(s.seen.finished.empty());  // the wait is our engine's, not the peer's
  EXPECT_EQ(s.seen.told.size(), 100U);
  EXPECT_NE(s.seen.last_told<Heartbeat>(), nullptr);
  s.add(0, 0, 1);  // now the peer's time counts, from here
  s.wait(kIdleUs - 1);
  EXPECT_TRUE(s.seen.finished.empty());
  s.wait(1);
  EXPECT_TRUE(s.seen.ended_with(ErrorKind::kUnavailable));
}

using SendMachineDeathTest = testing::Test;

TEST(SendMachineDeathTest, EngineMistakesAreCaught) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  EXPECT_DEATH(
      {
        Sender s(false);
        s.add(0, 0, 2);
        s.add(0, 1, 1);
      },
      "added_");
  EXPECT_DEATH(
      {
        Sender s(false);
        s.add(0, 0, 3);
        s.machine.commit(FirstToken{}, 0);
      },
      "3 vs 9");
  EXPECT_DEATH(Sender(false).add(3, 0, 1), "3 vs 3");
  EXPECT_DEATH(Sender(false).add(0, 2, 2), "4 vs 3");
}

}  // namespace
}  // namespace tandem::transfer
