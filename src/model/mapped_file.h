// A file mapped read-only into memory.
//
// The size is taken once, when the file is opened. If somebody truncates the file while it is mapped, touching the lost
// pages raises SIGBUS and ends the process: a model folder must not be changed while it is being loaded. After loading
// nothing of it is touched again.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "src/base/result.h"

namespace tandem::model {

class MappedFile {
 public:
  static Result<std::unique_ptr<MappedFile>> open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return bytes_; }
  // Drops the pages that lie wholly inside `part` from this process; they are read again if touched again.
  void release(std::span<const std::byte> part) const;

 private:
  MappedFile(std::string path, std::span<const std::byte> bytes) : path_(std::move(path)), bytes_(bytes) {}
  std::string path_;
  std::span<const std::byte> bytes_;
};

}  // namespace tandem::model
