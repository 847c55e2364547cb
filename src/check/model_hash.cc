#include "src/check/model_hash.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <vector>

#include "src/base/hash.h"
#include "src/model/config.h"
#include "src/model/safetensors.h"

namespace tandem::check {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxTokenizerBytes = int64_t{256} << 20;

Status add_range(std::ifstream& file, const fs::path& path, int64_t begin, int64_t bytes, Sha256& hash) {
  std::vector<char> piece(static_cast<size_t>(bytes));
  file.seekg(begin);
  if (!file.read(piece.data(), bytes)) return make_error(ErrorKind::kDataLoss, "{}: cannot be read", path.string());
  hash.add(std::string_view(piece.data(), piece.size()));
  return {};
}

Status add_weights(const fs::path& path, Sha256& hash) {
  std::ifstream file(path, std::ios::binary);
  std::error_code fault;
  const int64_t size = static_cast<int64_t>(fs::file_size(path, fault));
  uint64_t header = 0;
  if (fault || !file.read(reinterpret_cast<char*>(&header), sizeof header) ||
      header > model::kMaxSafetensorsHeaderBytes || static_cast<int64_t>(header) + 8 > size) {
    return make_error(ErrorKind::kDataLoss, "{}: not a readable safetensors file", path.string());
  }
  hash.add(path.filename().string()).add_value(size);
  TANDEM_TRY(add_range(file, path, 0, static_cast<int64_t>(header) + 8, hash));
  const int64_t data = static_cast<int64_t>(header) + 8;
  const int64_t bytes = std::min(kSampleBytes, size - data);
  for (int i = 0; i < kSamples; ++i) {
    TANDEM_TRY(add_range(file, path, data + (size - data - bytes) * i / (kSamples - 1), bytes, hash));
  }
  return {};
}

}  // namespace

Result<ModelHashes> hash_model(const std::string& folder) {
  ModelHashes hashes;
  TANDEM_ASSIGN(const model::ModelConfig config, model::load_config(folder));
  hashes.config = Sha256().add(config.canonical_json).finish().hex();
  std::vector<fs::path> files;
  std::error_code ignored;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, ignored)) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  Sha256 weights;
  for (const fs::path& file : files) TANDEM_TRY(add_weights(file, weights));
  if (!files.empty()) hashes.weights = weights.finish().hex();
  const fs::path tokenizer = fs::path(folder) / "tokenizer.json";
  const int64_t size = fs::exists(tokenizer, ignored) ? static_cast<int64_t>(fs::file_size(tokenizer, ignored)) : 0;
  if (size > kMaxTokenizerBytes) {
    return make_error(ErrorKind::kTooLarge, "{}: {} bytes are more than {}", tokenizer.string(), size,
                      kMaxTokenizerBytes);
  }
  if (size > 0) {
    std::ifstream file(tokenizer, std::ios::binary);
    Sha256 hash;
    TANDEM_TRY(add_range(file, tokenizer, 0, size, hash));
    hashes.tokenizer = hash.finish().hex();
  }
  return hashes;
}

}  // namespace tandem::check
