#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <thread>
#include <vector>

#include "src/base/check.h"
#include "src/base/clock.h"
#include "src/base/hash.h"
#include "src/base/ids.h"
#include "src/base/result.h"

namespace tandem {
namespace {

TEST(Check, PrintsBothValues) {
  EXPECT_DEATH(CHECK_EQ(2 + 2, 5), "2 \\+ 2 == 5 \\(4 vs 5\\)");
  EXPECT_DEATH(CHECK_LT(BlockId(7), BlockId(3)), "7 vs 3");
}

Result<int> parse_even(int value) {
  if (value % 2 != 0) return invalid_argument("value", "value is {}, must be even", value);
  return value;
}

Result<int> half_of(int value) {
  TANDEM_ASSIGN(const int even, parse_even(value));
  return even / 2;
}

TEST(Result, CarriesValueOrError) {
  EXPECT_EQ(half_of(8).value(), 4);
  EXPECT_EQ(half_of(7).error().message, "value is 7, must be even");
  EXPECT_EQ(half_of(7).error().param, "value");
  EXPECT_DEATH((void)half_of(7).value(), "must be even");
}

TEST(Hash, MatchesKnownSha256) {
  // FIPS 180-2 example for "abc".
  EXPECT_EQ(Sha256().add("abc").finish().hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256().add("a").add("bc").finish(), Sha256().add("abc").finish());
}

TEST(RandomHex, HasTheAskedLengthAndDiffers) {
  EXPECT_EQ(random_hex(16).size(), 32U);
  EXPECT_NE(random_hex(16), random_hex(16));
}

TEST(RandomU64, NeverRepeatsNeitherHereNorInAnotherThread) {
  constexpr size_t kEach = 1'000;  // many of the batches that the numbers are drawn in
  std::vector<uint64_t> here(kEach), there(kEach);
  std::thread other([&there] { std::generate(there.begin(), there.end(), random_u64); });
  std::generate(here.begin(), here.end(), random_u64);
  other.join();
  std::set<uint64_t> all(here.begin(), here.end());
  all.insert(there.begin(), there.end());
  EXPECT_EQ(all.size(), 2 * kEach);
}

}  // namespace
}  // namespace tandem
