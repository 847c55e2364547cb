#include "src/engine/probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tandem::engine {
namespace {

using testing::HasSubstr;

// A transfer that failed is counted once, by what went wrong and with whom.
TEST(Probe, CountsFailedTransfersByCauseAndPeer) {
  Registry registry;
  Probe probe(registry, {"m", 16, 10, "bf16", true});
  Error expired = make_error(ErrorKind::kUnavailable, "late");
  expired.code = "kv_transfer_expired";
  probe.transfer_done(true, expired, 0, 0, "decode-a");
  probe.transfer_done(true, expired, 0, 0, "decode-a");
  probe.transfer_done(false, make_error(ErrorKind::kAborted, "left"), 0, 0, "prefill-b");
  probe.transfer_done(false, {}, 100, 5, "prefill-b");
  const std::string text = registry.expose();
  EXPECT_THAT(text, HasSubstr(R"(direction="send",cause="expired",peer="decode-a"} 2)"));
  EXPECT_THAT(text, HasSubstr(R"(direction="receive",cause="aborted",peer="prefill-b"} 1)"));
}

TEST(Probe, PeersBeyondTheBoundAreCountedTogether) {
  Registry registry;
  Probe probe(registry, {"m", 16, 10, "bf16", true});
  for (int turn = 0; turn < 2; ++turn) {
    for (size_t i = 0; i < Probe::kMaxPeers + 7; ++i) {
      probe.transfer_done(true, make_error(ErrorKind::kAborted, "left"), 0, 0, "peer-" + std::to_string(i));
    }
  }
  const std::string text = registry.expose();
  EXPECT_THAT(text, HasSubstr(R"(peer="peer-0"} 2)"));
  EXPECT_THAT(text, HasSubstr("peer=\"peer-" + std::to_string(Probe::kMaxPeers - 1) + "\"} 2"));
  EXPECT_THAT(text, testing::Not(HasSubstr("peer-" + std::to_string(Probe::kMaxPeers))));
  EXPECT_THAT(text, HasSubstr(R"(peer="other"} 14)"));
}

}  // namespace
}  // namespace tandem::engine
