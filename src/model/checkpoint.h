// All tensors of a model folder, whether they lie in one file or in several with an index, found by name.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/result.h"
#include "src/model/mapped_file.h"
#include "src/model/safetensors.h"

namespace tandem::model {

constexpr size_t kMaxShards = 10'000;

class Checkpoint {
 public:
  // Uses <directory>/model.safetensors, else model.safetensors.index.json and the files that it names, else all
  // *.safetensors but consolidated*. Every header is checked; two tensors of one name are refused.
  static Result<std::unique_ptr<Checkpoint>> open(const std::string& directory);

  const std::string& directory() const { return directory_; }
  // Null if there is none.
  const StoredTensor* find(std::string_view name) const;
  // The tensor with exactly this shape; the error names file, tensor, and the found and the wanted shape.
  Result<const StoredTensor*> require(std::string_view name, std::span<const int64_t> shape) const;
  size_t num_tensors() const { return tensors_.size(); }
  // Largest i of all names "model.layers.<i>.…", or -1.
  int64_t last_layer() const;

 private:
  explicit Checkpoint(std::string directory) : directory_(std::move(directory)) {}
  Status add_file(const std::string& file_name);
  Status add_indexed_files(const std::string& index_path);
  Status add_all_files();

  std::string directory_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::map<std::string, StoredTensor, std::less<>> tensors_;
};

}  // namespace tandem::model
