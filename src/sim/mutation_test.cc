// Deliberate bugs, put in at the seams between the production parts: the simulation must find each within a stated
// number of schedules, by an invariant that it breaks.
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "src/base/log.h"
#include "src/sim/runner.h"
#include "src/sim/wrappers.h"
#include "src/transfer/checksum.h"
#include "src/transfer/wire.h"

namespace tandem::sim {
namespace {

using transfer::Done;
using transfer::TransferId;

constexpr uint64_t kFirstSeed = 1;

template <typename Wrapper>
Seams with_agent() {
  Seams seams;
  seams.agent = [](std::unique_ptr<transfer::Agent> inner) { return std::make_unique<Wrapper>(std::move(inner)); };
  return seams;
}
template <typename Wrapper>
Seams with_messenger() {
  Seams seams;
  seams.messenger = [](std::unique_ptr<comm::Messenger> inner) { return std::make_unique<Wrapper>(std::move(inner)); };
  return seams;
}
template <typename Wrapper>
Seams with_handler() {
  Seams seams;
  seams.handler = [](comm::MessageHandler& inner) { return std::make_unique<Wrapper>(inner); };
  return seams;
}
template <typename Wrapper>
Seams with_legs() {
  Seams seams;
  seams.legs = [](Legs& inner) { return std::make_unique<Wrapper>(inner); };
  return seams;
}

// The mutation is found within `runs` schedules by one of `invariants`; without it the same schedules pass.
void expect_found(const Seams& seams, const std::string& faults, int64_t runs,
                  const std::set<std::string>& invariants) {
  init_log(LogLevel::kError, "");
  RunOptions options;
  options.faults = parse_fault_spec(faults).value();
  const Summary unchanged = run_many(kFirstSeed, runs, 1, options);
  EXPECT_FALSE(unchanged.violation.has_value()) << unchanged.violation->message;
  options.seams = seams;
  const Summary summary = run_many(kFirstSeed, runs, 1, options);
  ASSERT_TRUE(summary.violation.has_value()) << "not found in " << runs << " schedules";
  std::printf("found by schedule %ld of at most %ld: %s\n", static_cast<long>(summary.runs), static_cast<long>(runs),
              summary.violation->message.c_str());
  EXPECT_TRUE(invariants.contains(summary.violation->invariant)) << summary.violation->trace;
}

// ---- Reuse before the other side has everything ------------------------------------------------------------------

// An agent that makes up the Done of some transfers and keeps the true ones to itself.
class EarlyDone : public AgentWrapper {
 public:
  using AgentWrapper::AgentWrapper;
  std::vector<Done> take_done() override {
    std::vector<Done> done = inner_->take_done();
    std::erase_if(done, [this](const Done& d) { return early_.contains(d.id); });
    for (Done& d : std::exchange(forged_, {})) done.push_back(std::move(d));
    return done;
  }

 protected:
  void forge(Done done) {
    early_.insert(done.id);
    forged_.push_back(std::move(done));
  }

 private:
  std::set<TransferId> early_;
  std::vector<Done> forged_;
};

// Prefill's blocks are given back when the last layer is handed over, not when decode has it.
class DoneBeforeAck final : public EarlyDone {
 public:
  using EarlyDone::EarlyDone;
  void commit_send(TransferId id, const transfer::FirstToken& first_token) override {
    inner_->commit_send(id, first_token);
    forge({id, {}, std::nullopt, 0, 0});
  }
};

// An aborted transfer's blocks are given back at once, while the agent goes on.
class DoneBeforeAbort final : public EarlyDone {
 public:
  using EarlyDone::EarlyDone;
  void abort(TransferId id) override { forge({id, make_error(ErrorKind::kAborted, "forged"), std::nullopt, 0, 0}); }
};

TEST(Mutation, ReuseBeforeAck) { expect_found(with_agent<DoneBeforeAck>(), "none", 20, {"pinned-while-open"}); }
TEST(Mutation, ReuseBeforeAbort) {
  expect_found(with_agent<DoneBeforeAbort>(), "cancel=0.3", 50, {"pinned-while-open"});
}

// ---- Messages that vanish or lie
// --------------------------------------------------------------------------------------

class LoseAborts final : public MessengerWrapper {
 public:
  using MessengerWrapper::MessengerWrapper;
  comm::SendResult send(comm::ConnectionId connection, std::span<const std::byte> message,
                        std::span<const std::byte> payload, uint64_t token) override {
    const Result<transfer::Message> decoded = transfer::decode(message);
    if (decoded.ok() && std::holds_alternative<transfer::Abort>(*decoded)) return comm::SendResult::kSent;
    return inner_->send(connection, message, payload, token);
  }
};

// The last layer never leaves prefill, and the commit says that this is all.
class CommitWithoutLayer final : public MessengerWrapper {
 public:
  using MessengerWrapper::MessengerWrapper;
  comm::SendResult send(comm::ConnectionId connection, std::span<const std::byte> message,
                        std::span<const std::byte> payload, uint64_t token) override {
    Result<transfer::Message> decoded = transfer::decode(message);
    if (!decoded.ok()) return inner_->send(connection, message, payload, token);
    if (const transfer::Data* data = std::get_if<transfer::Data>(&*decoded); data != nullptr && data->layer == 2) {
      missing_[data->handle] += std::ssize(payload);
      return comm::SendResult::kSent;
    }
    transfer::Commit* commit = std::get_if<transfer::Commit>(&*decoded);
    if (commit == nullptr) return inner_->send(connection, message, payload, token);
    commit->num_bytes -= missing_[commit->handle];
    return inner_->send(connection, transfer::encode(*decoded), payload, token);
  }

 private:
  std::map<transfer::Handle, int64_t> missing_;
};

// Decode counts the last layer's parts but does not get their bytes.
class CountWithoutLayer final : public HandlerWrapper {
 public:
  using HandlerWrapper::HandlerWrapper;
  void on_message(comm::ConnectionId connection, std::span<const std::byte> message,
                  std::span<const std::byte> payload) override {
    Result<transfer::Message> decoded = transfer::decode(message);
    transfer::Data* data = decoded.ok() ? std::get_if<transfer::Data>(&*decoded) : nullptr;
    if (data == nullptr || data->layer != 2) return inner_.on_message(connection, message, payload);
    const std::vector<std::byte> stale(payload.size(), std::byte{0x5a});
    data->checksum = transfer::checksum(stale);
    inner_.on_message(connection, transfer::encode(*decoded), stale);
  }
};

TEST(Mutation, LostAbort) { expect_found(with_messenger<LoseAborts>(), "cancel=0.3", 100, {"end-is-told"}); }
TEST(Mutation, CommitWithoutOneLayer) {
  expect_found(with_messenger<CommitWithoutLayer>(), "none", 20, {"named-error"});
}
TEST(Mutation, CountWithoutOneLayer) {
  expect_found(with_handler<CountWithoutLayer>(), "none", 20, {"check", "exact"});
}

// ---- Handles -------------------------------------------------------------------------------------------------------

// A reservation is given the handle of the one before.
class RepeatHandles final : public AgentWrapper {
 public:
  using AgentWrapper::AgentWrapper;
  std::string expect(TransferId id, const transfer::BlockSpan& span, int64_t deadline_us) override {
    std::string handle = inner_->expect(id, span, deadline_us);
    if (++count_ % 8 != 0) return last_ = std::move(handle);
    return last_;
  }

 private:
  int64_t count_ = 0;
  std::string last_;
};

// A prefill leg is sent with the reservation of an earlier request.
class OldHandle final : public Legs {
 public:
  explicit OldHandle(Legs& inner) : inner_(inner) {}
  LegId open(int node, engine::TokenRequest request, engine::EventSink sink) override {
    if (request.kv_transfer && request.kv_transfer->do_remote_decode && !request.kv_transfer->remote_host.empty()) {
      if (++count_ % 8 == 0) request.kv_transfer->remote_request_id = last_;
      last_ = request.kv_transfer->remote_request_id;
    }
    return inner_.open(node, std::move(request), std::move(sink));
  }
  void cancel(LegId id) override { inner_.cancel(id); }
  void leave(LegId id) override { inner_.leave(id); }
  void release(int node, const transfer::KvTransferParams& publication) override { inner_.release(node, publication); }

 private:
  Legs& inner_;
  int64_t count_ = 0;
  std::string last_;
};

TEST(Mutation, ReusedNonce) {
  expect_found(with_agent<RepeatHandles>(), "none", 20, {"no-needless-failure", "deadline"});
}
TEST(Mutation, RetryWithOldHandle) {
  expect_found(with_legs<OldHandle>(), "none", 20, {"no-needless-failure", "deadline"});
}
TEST(Mutation, StaleEpochAccepted) {
  Seams seams;
  seams.repeat_incarnation = true;
  expect_found(seams, "kill=0.05", 50, {"handle-once"});
}

// ---- Leases, frees, counters, deadlines -----------------------------------------------------------------------------

// A publication's lease ends although a reader has come.
class LeaseIgnoresReader final : public HandlerWrapper {
 public:
  using HandlerWrapper::HandlerWrapper;
  void on_message(comm::ConnectionId connection, std::span<const std::byte> message,
                  std::span<const std::byte> payload) override {
    inner_.on_message(connection, message, payload);
    const Result<transfer::Message> decoded = transfer::decode(message);
    const transfer::Pull* pull = decoded.ok() ? std::get_if<transfer::Pull>(&*decoded) : nullptr;
    if (pull != nullptr) dynamic_cast<transfer::Agent&>(inner_).abort(TransferId(pull->handle.request));
  }
};

// One Done in eight is told twice.
class DoubleFree final : public AgentWrapper {
 public:
  using AgentWrapper::AgentWrapper;
  std::vector<Done> take_done() override {
    std::vector<Done> done = inner_->take_done();
    for (size_t i = 0, size = done.size(); i < size; ++i) {
      if (++count_ % 8 == 0) done.push_back(done[i]);
    }
    return done;
  }

 private:
  int64_t count_ = 0;
};

// The end of a failed transfer never reaches the engine, so its pins stay.
class CounterNotReleased final : public AgentWrapper {
 public:
  using AgentWrapper::AgentWrapper;
  std::vector<Done> take_done() override {
    std::vector<Done> done = inner_->take_done();
    std::erase_if(done, [](const Done& d) { return !d.status.ok(); });
    return done;
  }
};

// A staging buffer that the transport gives back late is forgotten.
class StagingNotReleased final : public MessengerWrapper {
 public:
  using MessengerWrapper::MessengerWrapper;
  comm::SendResult send(comm::ConnectionId connection, std::span<const std::byte> message,
                        std::span<const std::byte> payload, uint64_t token) override {
    const comm::SendResult result = inner_->send(connection, message, payload, token);
    return result == comm::SendResult::kSent && !payload.empty() && ++count_ % 8 == 0 ? comm::SendResult::kPending
                                                                                      : result;
  }

 private:
  int64_t count_ = 0;
};

// Each hop gives the request its whole time again.
class DeadlinePerHop final : public Legs {
 public:
  explicit DeadlinePerHop(Legs& inner) : inner_(inner) {}
  LegId open(int node, engine::TokenRequest request, engine::EventSink sink) override {
    request.deadline_us += 10'000'000;
    return inner_.open(node, std::move(request), std::move(sink));
  }
  void cancel(LegId id) override { inner_.cancel(id); }
  void leave(LegId id) override { inner_.leave(id); }
  void release(int node, const transfer::KvTransferParams& publication) override { inner_.release(node, publication); }

 private:
  Legs& inner_;
};

// The router keeps to itself that nobody comes for a publication.
class ForgetRelease final : public Legs {
 public:
  explicit ForgetRelease(Legs& inner) : inner_(inner) {}
  LegId open(int node, engine::TokenRequest request, engine::EventSink sink) override {
    return inner_.open(node, std::move(request), std::move(sink));
  }
  void cancel(LegId id) override { inner_.cancel(id); }
  void leave(LegId id) override { inner_.leave(id); }
  void release(int, const transfer::KvTransferParams&) override {}

 private:
  Legs& inner_;
};

// An answer that crosses the cancel of its leg is not looked at, and with it goes what it published.
class LoseCrossingAnswer final : public Legs {
 public:
  explicit LoseCrossingAnswer(Legs& inner) : inner_(inner) {}
  LegId open(int node, engine::TokenRequest request, engine::EventSink sink) override {
    return inner_.open(node, std::move(request), std::move(sink));
  }
  void cancel(LegId id) override { inner_.cancel(id); }
  void leave(LegId id) override { inner_.cancel(id); }
  void release(int node, const transfer::KvTransferParams& publication) override { inner_.release(node, publication); }

 private:
  Legs& inner_;
};

// Two workers that both take both legs wait for each other with all their blocks.
TEST(Mutation, CrossWait) {
  Seams seams;
  seams.no_room = true;
  expect_found(seams, "none", 100, {"standstill", "no-needless-wait"});
}
TEST(Mutation, ForgottenRelease) { expect_found(with_legs<ForgetRelease>(), "cancel=0.3", 200, {"end-is-told"}); }
TEST(Mutation, LostCrossingAnswer) {
  expect_found(with_legs<LoseCrossingAnswer>(), "cancel=0.3", 200, {"publication-is-known"});
}
TEST(Mutation, LeaseIgnoresReader) {
  expect_found(with_handler<LeaseIgnoresReader>(), "none", 20, {"no-needless-failure"});
}
TEST(Mutation, DoubleFree) { expect_found(with_agent<DoubleFree>(), "none", 20, {"check"}); }
TEST(Mutation, CounterNotReleased) {
  expect_found(with_agent<CounterNotReleased>(), "cancel=0.3", 50, {"at-rest", "deadline", "no-needless-failure"});
}
TEST(Mutation, StagingNotReleased) { expect_found(with_messenger<StagingNotReleased>(), "none", 20, {"at-rest"}); }
TEST(Mutation, DeadlineRestartedPerHop) {
  expect_found(with_legs<DeadlinePerHop>(), "none", 100, {"deadline", "no-needless-wait"});
}

}  // namespace
}  // namespace tandem::sim
