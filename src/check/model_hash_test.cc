#include "src/check/model_hash.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>

namespace tandem::check {
namespace {

namespace fs = std::filesystem;

// A copy of a golden model, in which one byte can be changed.
class ModelFolder {
 public:
  ModelFolder() : path_(fs::path(testing::TempDir()) / fmt::format("hash-{}", getpid())) {
    fs::remove_all(path_);
    fs::create_directories(path_);
    for (const fs::directory_entry& file : fs::directory_iterator(TANDEM_SOURCE_DIR "/models/demo")) {
      fs::copy_file(file.path(), path_ / file.path().filename());
    }
  }
  ~ModelFolder() { fs::remove_all(path_); }
  std::string path() const { return path_.string(); }
  void replace(const std::string& file, const std::string& old_text, const std::string& new_text) const {
    std::ostringstream text;
    text << std::ifstream(path_ / file).rdbuf();
    std::string changed = text.str();
    const size_t at = changed.find(old_text);
    ASSERT_NE(at, std::string::npos);
    std::ofstream(path_ / file) << changed.replace(at, old_text.size(), new_text);
  }
  void flip(const std::string& file, int64_t offset) const {
    std::fstream stream(path_ / file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekg(offset);
    const char changed = static_cast<char>(stream.peek() ^ 1);
    stream.seekp(offset);
    stream.put(changed);
  }
  void remove(const std::string& file) const { fs::remove(path_ / file); }
  int64_t size(const std::string& file) const { return static_cast<int64_t>(fs::file_size(path_ / file)); }

 private:
  fs::path path_;
};

TEST(ModelHash, EveryPartIsToldFromTheOthers) {
  const ModelFolder folder;
  const ModelHashes original = *hash_model(folder.path());
  const ModelHashes same = *hash_model(TANDEM_SOURCE_DIR "/models/demo");
  EXPECT_EQ(same.config, original.config);
  EXPECT_EQ(same.weights, original.weights);
  EXPECT_EQ(same.tokenizer, original.tokenizer);

  folder.replace("config.json", "10000.0", "10001.0");
  const ModelHashes config = *hash_model(folder.path());
  EXPECT_NE(config.config, original.config);
  EXPECT_EQ(config.weights, original.weights);

  folder.flip("tokenizer.json", folder.size("tokenizer.json") - 1);
  EXPECT_NE(hash_model(folder.path())->tokenizer, original.tokenizer);

  folder.flip("model.safetensors", folder.size("model.safetensors") - 1);  // the last sample ends with the file
  EXPECT_NE(hash_model(folder.path())->weights, original.weights);
}

TEST(ModelHash, MissingPartsAreEmptyAndAMissingConfigIsAnError) {
  const ModelFolder folder;
  folder.remove("model.safetensors");
  folder.remove("tokenizer.json");
  const Result<ModelHashes> hashes = hash_model(folder.path());
  ASSERT_TRUE(hashes.ok());
  EXPECT_EQ(hashes->weights, "");
  EXPECT_EQ(hashes->tokenizer, "");
  std::ofstream(folder.path() + "/model.safetensors") << "short";
  EXPECT_FALSE(hash_model(folder.path()).ok());
  folder.remove("config.json");
  EXPECT_FALSE(hash_model(folder.path()).ok());
}

}  // namespace
}  // namespace tandem::check
