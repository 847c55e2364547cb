// Writes a checkpoint of one or several safetensors files with an index, tensor by tensor: sizes are declared first,
// since a file begins with them, and bytes follow in the declared order.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/base/result.h"

namespace tandem::model {

struct TensorHeader {
  std::string name;
  std::string dtype;  // as in the file, "BF16"
  std::vector<int64_t> shape;
  int64_t bytes = 0;
};

class SafetensorsWriter {
 public:
  // A file holds at most `max_file_bytes` of tensors, or one larger tensor.
  SafetensorsWriter(std::string directory, std::vector<TensorHeader> tensors, int64_t max_file_bytes);

  // The bytes of the next declared tensor, which must be that many.
  Status write(std::span<const std::byte> bytes);
  // After the last tensor: closes the last file and writes the index if there are several.
  Status finish();
  size_t num_files() const { return file_begins_.size(); }

 private:
  Status begin_file();
  Status end_file();
  std::string file_name(size_t index) const;
  Error failed(const std::string& path, const char* what) const;

  struct FileCloser {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::string directory_;
  std::vector<TensorHeader> tensors_;
  std::vector<size_t> file_begins_;  // index of each file's first tensor
  size_t next_file_ = 0;
  size_t next_tensor_ = 0;
  std::string path_;
  std::unique_ptr<std::FILE, FileCloser> file_;
};

}  // namespace tandem::model
