#include "src/model/safetensors.h"

#include "src/model/json_fields.h"
#include "src/model/test_support.h"

namespace tandem::model {
namespace {

Result<std::vector<StoredTensor>> parse(const std::string& image) {
  return parse_safetensors(std::as_bytes(std::span(image)), "dir/a.safetensors");
}

TEST(Safetensors, ReadsTensorsInTheOrderOfTheirBytes) {
  const std::string image = safetensors_image(
      R"({"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"__metadata__":{"format":"pt","\u00e9":"ü"},)"
      R"("a":{"shape":[],"data_offsets":[0,4],"dtype":"F32"},"none":{"dtype":"I8","shape":[0,7],"data_offsets":[4,4]},)"
      R"("half":{"dtype":"F4","shape":[2],"data_offsets":[16,17]}}   )",
      std::string(17, 'x'));
  const std::vector<StoredTensor> tensors = parse(image).value();
  ASSERT_EQ(tensors.size(), 4U);
  EXPECT_EQ(tensors[0].name, "a");
  EXPECT_EQ(tensors[0].elements(), 1);
  EXPECT_EQ(tensors[1].name, "none");
  EXPECT_EQ(tensors[1].elements(), 0);
  EXPECT_EQ(tensors[2].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(tensors[2].data.size(), 12U);
  EXPECT_EQ(reinterpret_cast<const char*>(tensors[2].data.data()), image.data() + image.size() - 13);
  EXPECT_EQ(tensors[2].kernel_dtype, kernels::DType::kBf16);
  EXPECT_FALSE(tensors[3].kernel_dtype.has_value());
}

TEST(Safetensors, ReadsAnEmptyFile) { EXPECT_EQ(parse(safetensors_image("{}", "")).value().size(), 0U); }

TEST(Safetensors, RefusesBadFiles) {
  const auto one = [](const std::string& fields) { return safetensors_image("{\"t\":{" + fields + "}}", "12345678"); };
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  ASSERT_TRUE(parse(one(good)).ok());
  const std::string max = std::to_string(UINT64_MAX);
  struct Case {
    std::string image;
    const char* message;
  };
  const auto two = [](const std::string& a, const std::string& b) {
    return safetensors_image(fmt::format(R"({{"a":{{"dtype":"U8","shape":[4],"data_offsets":{}}},)"
                                         R"("b":{{"dtype":"U8","shape":[4],"data_offsets":{}}}}})",
                                         a, b),
                             "12345678");
  };
  std::string lying = one(good);
  lying[0] = static_cast<char>(lying[0] + 100);
  std::string huge = one(good);
  std::memset(huge.data(), 0xFF, 8);
  std::string too_long = one(good);
  const uint64_t over_limit = kMaxSafetensorsHeaderBytes + 1;
  std::memcpy(too_long.data(), &over_limit, sizeof over_limit);
  const Case cases[] = {
      {"", "has 0 bytes"},
      {"1234567", "has 7 bytes"},
      {lying, "says its header has"},
      {huge, "says its header has 18446744073709551615 bytes"},
      {too_long, "says its header has 100000001 bytes"},
      {safetensors_image("", ""), "does not begin with '{'"},
      {safetensors_image(" {}", ""), "does not begin with '{'"},
      {safetensors_image("[]", ""), "does not begin with '{'"},
      {safetensors_image("{", ""), "not valid JSON"},
      {safetensors_image("{} x", ""), "not valid JSON"},
      {safetensors_image("{\"t\xFF\":{" + good + "}}", "12345678"), "not valid JSON"},
      {safetensors_image("{\"t\":{" + good + "},\"t\":{" + good + "}}", "12345678"), "has the name \"t\" twice"},
      {one(good + R"(,"dtype":"F32")"), "has the field \"dtype\" twice"},
      {one(good + R"(,"stride":[1])"), "has the unknown field \"stride\""},
      {one(R"("dtype":"F32","shape":[2])"), "lacks dtype, shape or data_offsets (tensor \"t\")"},
      {one(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])"), "unknown dtype \"F33\""},
      {one(R"("dtype":3,"shape":[2],"data_offsets":[0,8])"), "holds a number at a place where none may be"},
      {one(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), "holds a number at a place where none may be"},
      {one(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])"), "holds a list at a place where none may be"},
      {one(R"("dtype":"F32","shape":[null],"data_offsets":[0,8])"), "holds null"},
      {one(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), "holds the negative number -2"},
      {one(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), "holds the number 2.0"},
      {one(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8])"),
       "holds the number 18446744073709551616"},
      {one(R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8])"), "more than 8 dimensions"},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), "needs two data_offsets"},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), "more than 2 data_offsets"},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), "data_offsets [8, 0], must be ascending"},
      {one(R"("dtype":"F32","shape":[4],"data_offsets":[0,16])"), "within 8 bytes of data"},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[0,)" + max + "]"), "within 8 bytes of data"},
      {one(R"("dtype":"F32","shape":[)" + max + R"(,4],"data_offsets":[0,8])"), "overflows 64 bits"},
      {one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"), "overflows 64 bits"},
      {one(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), "is F32 [3] and needs 96 bits"},
      {one(R"("dtype":"F4","shape":[15],"data_offsets":[0,8])"), "needs 60 bits"},
      {one(R"("dtype":"F32","shape":[1],"data_offsets":[0,4])"),
       "holds 8 bytes of data, but its tensors account for 4"},
      {one(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"), "begins at byte 4 of the data, must be 0"},
      {two("[0,4]", "[2,6]"), "tensor \"b\" begins at byte 2 of the data, must be 4"},
      {two("[0,4]", "[0,4]"), "begins at byte 0 of the data, must be 4"},
      {safetensors_image(R"({"__metadata__":{"a":1}})", ""), "holds a number"},
      {safetensors_image(R"({"__metadata__":{"a":{}}})", ""), "holds an object"},
      {safetensors_image(R"({"t":[]})", ""), "holds a list"},
      {one(good) + "9", "holds 9 bytes of data, but its tensors account for 8"},
      {one(good).substr(0, one(good).size() - 1), "within 7 bytes of data"},
      {safetensors_image(std::string(100'000, '{'), ""), "not valid JSON"},
  };
  for (const Case& bad : cases) {
    const Result<std::vector<StoredTensor>> tensors = parse(bad.image);
    ASSERT_FALSE(tensors.ok()) << bad.message;
    EXPECT_THAT(tensors.error().message, testing::HasSubstr(bad.message));
    EXPECT_THAT(tensors.error().message, testing::StartsWith("dir/a.safetensors: "));
    EXPECT_THAT(tensors.error().message, testing::EndsWith("; fetch the file again"));
  }
}

// Whatever bytes a header holds, the parser answers with tensors inside the file or with an error.
TEST(Safetensors, SurvivesDamagedHeaders) {
  constexpr int kIterations = 2000;
  const uint64_t seed = std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  std::vector<FileTensor> tensors;
  for (int i = 0; i < 8; ++i)
    tensors.push_back({"layer." + std::to_string(i), "BF16", {i, 5}, std::string(static_cast<size_t>(i) * 10, 'x')});
  const std::string good = safetensors_image(tensors);
  const size_t header_end = good.rfind('}') + 1;
  int refused = 0;
  for (int i = 0; i < kIterations; ++i) {
    std::string image = good;
    const int changes = 1 + static_cast<int>(random() % 4);
    for (int c = 0; c < changes; ++c) {
      const char digits_and_noise[] = "0123456789[]{}\",:-.eE";
      const bool is_structural = random() % 2 == 0;
      const size_t at = random() % header_end;
      image[at] =
          is_structural ? digits_and_noise[random() % (sizeof digits_and_noise - 1)] : static_cast<char>(random());
    }
    if (random() % 8 == 0) image.resize(random() % image.size());
    const Result<std::vector<StoredTensor>> parsed = parse(image);
    if (!parsed.ok()) {
      ++refused;
      continue;
    }
    size_t bytes = 0;
    for (const StoredTensor& tensor : parsed.value()) {
      const char* begin = reinterpret_cast<const char*>(tensor.data.data());
      ASSERT_GE(begin, image.data());
      ASSERT_LE(begin + tensor.data.size(), image.data() + image.size());
      bytes += tensor.data.size();
    }
    ASSERT_LE(bytes, image.size());
  }
  EXPECT_GT(refused, kIterations / 4);
}

}  // namespace
}  // namespace tandem::model
