#include "src/check/targets.h"

#include <gtest/gtest.h>

namespace tandem::check {
namespace {

cluster::ProcessSpec make_process(const std::string& name, const std::string& role, const std::string& host,
                                  int64_t port, int64_t kv_port) {
  cluster::ProcessSpec process;
  process.name = name;
  process.role = role;
  process.host = host;
  process.port = port;
  process.kv_port = kv_port;
  return process;
}

bool is_here(const std::string& host) { return is_loopback(host) || host == "10.0.0.1"; }

TEST(Targets, NamesOfThisMachineAreOneHost) {
  cluster::ClusterPlan plan;
  plan.processes = {make_process("p", "prefill", "10.0.0.1", 8100, 14579),
                    make_process("d", "decode", "h2", 8200, 14580),
                    make_process("router", "router", "127.0.0.1", 8000, 0)};
  const std::vector<Target> targets = list_targets(plan, is_here);
  ASSERT_EQ(targets.size(), 2U);
  EXPECT_EQ(targets[0].host, "10.0.0.1");
  EXPECT_TRUE(targets[0].is_here);
  EXPECT_EQ(targets[0].endpoints, (std::vector<Endpoint>{{"10.0.0.1", 8100, "p's port", false},
                                                         {"10.0.0.1", 14579, "p's kv_port", true},
                                                         {"127.0.0.1", 8000, "router's port", false},
                                                         {"10.0.0.1", 0, "a data port", false}}));
  EXPECT_EQ(targets[1].host, "h2");
  EXPECT_FALSE(targets[1].is_here);
  EXPECT_EQ(targets[1].processes.size(), 1U);
  EXPECT_TRUE(judge_addresses(targets).empty());
}

TEST(Targets, OneHostNeedsNoDataPort) {
  cluster::ClusterPlan plan;
  plan.processes = {make_process("w", "both", "127.0.0.1", 8000, 0)};
  const std::vector<Target> targets = list_targets(plan, is_here);
  ASSERT_EQ(targets.size(), 1U);
  EXPECT_EQ(targets[0].endpoints, (std::vector<Endpoint>{{"127.0.0.1", 8000, "w's port", false}}));
  EXPECT_TRUE(judge_addresses(targets).empty());
}

TEST(Targets, AWorkerAtLoopbackBesideOtherHostsIsAnError) {
  cluster::ClusterPlan plan;
  plan.processes = {make_process("p", "prefill", "127.0.0.1", 8100, 14579),
                    make_process("d", "decode", "h2", 8200, 14580)};
  EXPECT_EQ(judge_addresses(list_targets(plan, is_here)),
            (std::vector<Finding>{{State::kError, Category::kNames, "p", "address", "127.0.0.1",
                                   "an address that the other hosts reach",
                                   "give p the address of this machine as `host` in the cluster file"}}));
}

}  // namespace
}  // namespace tandem::check
