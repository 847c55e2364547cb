#include "src/ep/all2all.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/ep/expert_map.h"

namespace tandem::ep {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(All2All, OwnNamesNeedNoNote) {
  for (const All2All backend :
       {All2All::kNaive, All2All::kAllGather, All2All::kHighThroughput, All2All::kLowLatency}) {
    const Result<All2AllChoice> choice = parse_all2all_backend(all2all_name(backend));
    ASSERT_TRUE(choice.ok());
    EXPECT_EQ(choice->backend, backend);
    EXPECT_EQ(choice->note, "");
  }
}

TEST(All2All, SaysWhatAnAliasBecame) {
  const Result<All2AllChoice> choice = parse_all2all_backend("pplx");
  ASSERT_TRUE(choice.ok());
  EXPECT_EQ(choice->backend, All2All::kLowLatency);
  EXPECT_EQ(choice->note, "all2all backend pplx: low_latency is used in its place");
  EXPECT_EQ(parse_all2all_backend("deepep_low_latency")->backend, All2All::kLowLatency);
  EXPECT_EQ(parse_all2all_backend("deepep_high_throughput")->backend, All2All::kHighThroughput);
  EXPECT_EQ(parse_all2all_backend("flashinfer_all2allv")->backend, All2All::kHighThroughput);
}

TEST(All2All, AnUnknownNameListsThePossible) {
  const Result<All2AllChoice> choice = parse_all2all_backend("nccl");
  ASSERT_FALSE(choice.ok());
  EXPECT_THAT(choice.error().message, HasSubstr("\"nccl\" is unknown"));
  EXPECT_THAT(choice.error().message, HasSubstr("low_latency, naive, deepep_high_throughput"));
}

TEST(ExpertMap, ContiguousRangesWithARest) {
  EXPECT_THAT(make_shard(0, 3, 8).slots, ElementsAre(0, 1, 2));
  EXPECT_THAT(make_shard(1, 3, 8).slots, ElementsAre(3, 4, 5));
  EXPECT_THAT(make_shard(2, 3, 8).slots, ElementsAre(6, 7));
  const ExpertMap map = ExpertMap::contiguous(3, 8);
  EXPECT_EQ(map.slots_per_rank(), 3);
  for (int32_t e = 0; e < 8; ++e) EXPECT_EQ(map.slot_of(e, 5), e);  // the empty slot is the last
  EXPECT_THAT(make_shard(3, 4, 5).slots, ElementsAre(4));
  EXPECT_EQ(ExpertMap::contiguous(4, 5).slot_of(2, 0), 2);
  EXPECT_EQ(ExpertMap::contiguous(4, 5).slot_of(3, 0), 4);
}

TEST(ExpertMap, CopiesShareTheLoad) {
  const ExpertMap map(std::vector<int32_t>{0, 1, 1, 2}, 2, 3);
  int64_t first = 0;
  for (int64_t key = 0; key < 10'000; ++key) {
    const int32_t slot = map.slot_of(1, key);
    ASSERT_TRUE(slot == 1 || slot == 2);
    first += slot == 1 ? 1 : 0;
  }
  EXPECT_NEAR(static_cast<double>(first), 5000, 100);
  EXPECT_DEATH(ExpertMap(std::vector<int32_t>{0, 1, 1, 1}, 2, 3), "0 vs 1");
}

}  // namespace
}  // namespace tandem::ep
