#include "src/model/checkpoint.h"

#include "src/model/test_support.h"

namespace tandem::model {
namespace {

constexpr char kIndexName[] = "model.safetensors.index.json";

std::string file_with(const std::string& name) { return safetensors_image({{name, "U8", {2, 2}, "1234"}}); }

class CheckpointTest : public testing::Test {
 protected:
  std::string error() const { return Checkpoint::open(folder_.path()).error().message; }
  TempDir folder_;
};

TEST_F(CheckpointTest, FindsTensorsOfOneFile) {
  folder_.write("model.safetensors", file_with("model.layers.7.x"));
  folder_.write("other.safetensors", "not looked at");
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::open(folder_.path()).value();
  EXPECT_EQ(checkpoint->find("model.layers.7.x")->data.size(), 4U);
  EXPECT_EQ(checkpoint->find("model.layers.7"), nullptr);
  EXPECT_EQ(checkpoint->last_layer(), 7);
}

TEST_F(CheckpointTest, FindsTensorsOfShardsAlsoBehindLinks) {
  folder_.write("1.safetensors", file_with("a"));
  folder_.write("blob", file_with("b"));
  std::filesystem::create_symlink("blob", folder_.path() + "/2.safetensors");
  folder_.write(kIndexName, R"({"metadata":{},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})");
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::open(folder_.path()).value();
  EXPECT_EQ(checkpoint->num_tensors(), 2U);
  EXPECT_EQ(checkpoint->find("b")->file->path(), folder_.path() + "/2.safetensors");
  EXPECT_EQ(checkpoint->last_layer(), -1);
}

TEST_F(CheckpointTest, TakesAllFilesWithoutAnIndex) {
  folder_.write("x.safetensors", file_with("a"));
  folder_.write("y.safetensors", file_with("b"));
  folder_.write("consolidated.safetensors", file_with("a"));
  EXPECT_EQ(Checkpoint::open(folder_.path()).value()->num_tensors(), 2U);
}

TEST_F(CheckpointTest, RefusesAFolderWithoutWeights) {
  EXPECT_THAT(error(), testing::HasSubstr("holds 0 .safetensors files"));
  EXPECT_FALSE(Checkpoint::open(folder_.path() + "/nowhere").ok());
}

TEST_F(CheckpointTest, NamesTheDamagedFile) {
  folder_.write("model.safetensors", "short");
  EXPECT_THAT(error(), testing::StartsWith(folder_.path() + "/model.safetensors: has 5 bytes"));
  folder_.write("model.safetensors", "");
  EXPECT_THAT(error(), testing::StartsWith(folder_.path() + "/model.safetensors: has 0 bytes"));
}

TEST_F(CheckpointTest, RefusesFilesThatAreNotRegular) {
  std::filesystem::create_directory(folder_.path() + "/model.safetensors");
  EXPECT_THAT(error(), testing::HasSubstr("is not a regular file"));
}

TEST_F(CheckpointTest, RefusesATensorInTwoShards) {
  folder_.write("1.safetensors", file_with("a"));
  folder_.write("2.safetensors", file_with("a"));
  folder_.write(kIndexName, R"({"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})");
  EXPECT_THAT(error(),
              testing::HasSubstr("/2.safetensors: tensor \"a\" is also in " + folder_.path() + "/1.safetensors"));
  std::filesystem::remove(folder_.path() + "/" + kIndexName);
  EXPECT_THAT(error(), testing::HasSubstr("is also in"));
}

TEST_F(CheckpointTest, RefusesBadIndexes) {
  folder_.write("1.safetensors", file_with("a"));
  const std::pair<const char*, const char*> cases[] = {
      {R"({"weight_map":{"a":"../1.safetensors"}})", "without '/' or '..'"},
      {R"({"weight_map":{"a":"/etc/passwd"}})", "weight_map.a is \"/etc/passwd\", must be the name of a file"},
      {R"({"weight_map":{"a":".."}})", "without '/' or '..'"},
      {R"({"weight_map":{"a":""}})", "must be the name of a file"},
      {R"({"weight_map":{"a":"1.safetensors\u0000"}})", "must be the name of a file"},
      {R"({"weight_map":{"a":1}})", "weight_map.a is 1"},
      {R"({"weight_map":[]})", "weight_map is [], must be an object"},
      {R"({"weight_map":{}})", "weight_map names 0 files"},
      {R"({})", "weight_map is missing"},
      {R"([])", "holds array"},
      {R"({"weight_map":{"a":"1.safetensors","a":"1.safetensors"}})", "has the key \"a\" twice"},
      {R"({"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})", "2.safetensors: is named by"},
      {R"({"weight_map":{"a":"1.safetensors","b":"1.safetensors"}})", "puts tensor \"b\" into"},
  };
  for (const auto& [index, message] : cases) {
    folder_.write(kIndexName, index);
    ASSERT_FALSE(Checkpoint::open(folder_.path()).ok()) << index;
    EXPECT_THAT(error(), testing::HasSubstr(message));
    EXPECT_THAT(error(), testing::StartsWith(folder_.path()));
  }
}

TEST_F(CheckpointTest, NamesFileTensorAndBothShapes) {
  folder_.write("model.safetensors", file_with("a"));
  const std::unique_ptr<Checkpoint> checkpoint = Checkpoint::open(folder_.path()).value();
  EXPECT_TRUE(checkpoint->require("a", std::vector<int64_t>{2, 2}).ok());
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{4}, {2, 3}, {2, 2, 1}, {}}) {
    EXPECT_EQ(
        checkpoint->require("a", shape).error().message,
        fmt::format("{}/model.safetensors: tensor \"a\" has shape [2, 2], but config.json asks for {}; check that "
                    "config.json belongs to these weights",
                    folder_.path(), shape_text(shape)));
  }
  EXPECT_THAT(checkpoint->require("b", std::vector<int64_t>{3}).error().message,
              testing::HasSubstr(folder_.path() + ": has no tensor \"b\" of shape [3]"));
}

}  // namespace
}  // namespace tandem::model
