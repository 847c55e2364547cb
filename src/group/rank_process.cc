// A rank without a model, for the tests of groups: its engine thread takes part in rounds of StepAgreement and in
// exchanges of bytes. It is told on stdin what to do and says on stdout what happens, one line each:
//
//   rank_process HOST PORT RANK SIZE TIMEOUT_US NODE NETWORK_HOST [FACT=VALUE …]
//   in:   work ROUNDS | hang | go | stop          out:  up EPOCH | down WHY | failed WHY | worked ROUNDS
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/comm/shared_region.h"
#include "src/group/membership.h"
#include "src/group/step_agreement.h"

namespace tandem::group {
namespace {

// Behind the part of StepAgreement each rank has a block from every other, in two places used in turn.
constexpr int64_t kBlockBytes = 3000;

void say(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

struct Orders {
  std::atomic<int64_t> rounds = 0;  // still to be begun by this rank
  std::atomic<bool> hangs = false;
  std::atomic<bool> stops = false;
};

// One epoch of one rank.
class Work {
 public:
  explicit Work(Fabric& fabric) : fabric_(fabric), agreement_(fabric) {}

  bool is_called() const { return agreement_.is_called(); }

  // One round: all ranks exchange blocks whose bytes tell epoch, round, sender and receiver.
  Status round(bool mine) {
    Result<std::vector<StepIntent>> intents =
        agreement_.agree({.rows = mine ? static_cast<int64_t>(fabric_.epoch().value) : 0});
    if (!intents.ok()) return intents.error();
    for (const StepIntent& intent : *intents) {
      if (intent.rows != 0) CHECK_EQ(intent.rows, static_cast<int64_t>(fabric_.epoch().value));
    }
    const uint64_t round = agreement_.rounds();
    std::vector<std::vector<std::byte>> blocks;
    for (int32_t r = 0; r < fabric_.size(); ++r) {
      blocks.emplace_back(kBlockBytes, tell(round, fabric_.rank(), RankId(r)));
      fabric_.put(RankId(r), offset(round, fabric_.rank()), blocks.back());
      fabric_.signal(RankId(r), Channel::kDispatch, round);
    }
    TANDEM_TRY(fabric_.flush());
    for (int32_t r = 0; r < fabric_.size(); ++r) {
      TANDEM_TRY(fabric_.wait(RankId(r), Channel::kDispatch, round));
      const std::byte expected = tell(round, RankId(r), fabric_.rank());
      for (const std::byte got : fabric_.window().subspan(static_cast<size_t>(offset(round, RankId(r))), kBlockBytes)) {
        CHECK_EQ(static_cast<int>(got), static_cast<int>(expected));
      }
    }
    return {};
  }

 private:
  std::byte tell(uint64_t round, RankId from, RankId to) const {
    return static_cast<std::byte>(fabric_.epoch().value * 101 + round * 31 + static_cast<uint64_t>(from.value) * 7 +
                                  static_cast<uint64_t>(to.value) + 1);
  }
  int64_t offset(uint64_t round, RankId from) const {
    return StepAgreement::window_bytes(fabric_.size()) + (2 * from.value + static_cast<int64_t>(round % 2)) * kBlockBytes;
  }

  Fabric& fabric_;
  StepAgreement agreement_;
};

void compute(Membership& membership, Orders& orders) {
  std::unique_ptr<Work> work;
  const Fabric* known = nullptr;
  std::string last_down;
  int64_t done = 0;
  while (!orders.stops) {
    comm::Bell& bell = membership.bell();
    const uint32_t rung = bell.count();
    if (orders.hangs) {
      bell.wait(rung, 60'000'000);
      continue;
    }
    Fabric* const fabric = membership.fabric();
    if (fabric != known) {
      known = fabric;
      work = fabric == nullptr ? nullptr : std::make_unique<Work>(*fabric);
      orders.rounds = 0;  // orders belong to an epoch
      done = 0;
      last_down.clear();
      if (fabric != nullptr) say(fmt::format("up {}", fabric->epoch()));
    }
    if (fabric == nullptr) {
      const Status status = membership.status();
      if (const std::string why = status.ok() ? "" : status.error().message; why != last_down) {
        last_down = why;
        if (!why.empty()) say(fmt::format("down {} {}", error_kind_name(status.error().kind), why));
      }
      bell.wait(rung, 60'000'000);
      continue;
    }
    const bool mine = orders.rounds > 0;
    if (!mine && !work->is_called()) {
      if (done > 0) say(fmt::format("worked {}", std::exchange(done, 0)));
      bell.wait(rung, 60'000'000);
      continue;
    }
    const Status status = work->round(mine);
    if (status.ok()) {
      ++done;
      if (mine) --orders.rounds;
    } else {
      say("failed " + status.error().message);
      membership.report(status.error(), std::nullopt);
      orders.rounds = 0;
      done = 0;
    }
  }
}

int run(int argc, char** argv) {
  if (argc < 8) return 2;
  init_log(LogLevel::kError, "");
  MembershipOptions options;
  options.coordinator_host = argv[1];
  options.coordinator_port = std::atoll(argv[2]);
  options.rank = RankId(std::atoi(argv[3]));
  options.shape = {.data = std::atoi(argv[4]), .tensor = 1};
  options.rank_timeout_us = std::atoll(argv[5]);
  options.node = argv[6];
  options.network_host = argv[7];
  options.http_address = fmt::format("127.0.0.1:{}", 8000 + options.rank.value);
  options.window_bytes =
      StepAgreement::window_bytes(options.shape.size()) + 2 * options.shape.size() * kBlockBytes;
  for (int i = 8; i < argc; ++i) {
    const std::string fact = argv[i];
    options.facts.push_back({fact.substr(0, fact.find('=')), fact.substr(fact.find('=') + 1)});
  }
  Result<std::unique_ptr<Membership>> membership = Membership::start(options);
  if (!membership.ok()) {
    say("failed " + membership.error().message);
    return 1;
  }
  Orders orders;
  std::thread engine([&] { compute(**membership, orders); });
  std::string line;
  while (std::getline(std::cin, line)) {
    if (line.starts_with("work ")) orders.rounds += std::atoll(line.c_str() + 5);
    if (line == "hang") orders.hangs = true;
    if (line == "go") orders.hangs = false;
    if (line == "stop") break;
    (*membership)->bell().ring();
  }
  orders.stops = true;
  (*membership)->bell().ring();
  engine.join();
  return 0;
}

}  // namespace
}  // namespace tandem::group

int main(int argc, char** argv) { return tandem::group::run(argc, argv); }
