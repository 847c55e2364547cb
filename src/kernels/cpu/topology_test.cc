#include "src/kernels/cpu/topology.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace tandem::kernels::cpu {
namespace {

using testing::ElementsAre;

TEST(TopologyTest, CountsCoresNotTheirThreads) {
  const Topology machine("numa:2 core:4 pu:2", "");
  EXPECT_EQ(machine.num_nodes(), 2);
  EXPECT_EQ(machine.num_cores(), 8);
}

TEST(TopologyTest, LeavesOutWhatTheAffinityMaskLeavesOut) {
  // Both threads of core 0, one of core 1, on the first node; one core of the second.
  const Topology machine("numa:2 core:4 pu:2", "0-2,8");
  EXPECT_EQ(machine.num_nodes(), 2);
  EXPECT_EQ(machine.num_cores(), 3);
  const Topology half("numa:2 core:4 pu:2", "8-15");
  EXPECT_EQ(half.num_nodes(), 1);
  EXPECT_EQ(half.num_cores(), 4);
}

TEST(TopologyTest, DealsThreadsToNodesInTurn) {
  const Topology machine("numa:2 core:4 pu:2", "0-2,8");  // two cores and one
  EXPECT_THAT(machine.place_threads(1), ElementsAre(0));
  EXPECT_THAT(machine.place_threads(3), ElementsAre(0, 1, 0));
  EXPECT_THAT(machine.place_threads(5), ElementsAre(0, 1, 0, 0, 1));  // more threads than cores
}

TEST(TopologyTest, ThisMachineTakesBindingAndMemory) {
  const Topology& machine = Topology::of_this_machine();
  ASSERT_GE(machine.num_nodes(), 1);
  EXPECT_GE(machine.num_cores(), 1);
  EXPECT_GE(count_usable_cores(), 1);
  EXPECT_LE(count_usable_cores(), machine.num_cores());
  machine.bind_this_thread(machine.place_threads(1)[0]);
  std::vector<std::byte> memory(1 << 16);
  machine.interleave(memory.data(), std::ssize(memory));
}

}  // namespace
}  // namespace tandem::kernels::cpu
