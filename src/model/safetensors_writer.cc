#include "src/model/safetensors_writer.h"

#include <unistd.h>

#include <cerrno>
#include <nlohmann/json.hpp>
#include <system_error>

namespace tandem::model {

SafetensorsWriter::SafetensorsWriter(std::string directory, std::vector<TensorHeader> tensors, int64_t max_file_bytes)
    : directory_(std::move(directory)), tensors_(std::move(tensors)) {
  int64_t bytes = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (i == 0 || bytes + tensors_[i].bytes > max_file_bytes) {
      file_begins_.push_back(i);
      bytes = 0;
    }
    bytes += tensors_[i].bytes;
  }
}

std::string SafetensorsWriter::file_name(size_t index) const {
  if (file_begins_.size() == 1) return "model.safetensors";
  return fmt::format("model-{:05}-of-{:05}.safetensors", index + 1, file_begins_.size());
}

Error SafetensorsWriter::failed(const std::string& path, const char* what) const {
  return make_error(ErrorKind::kDataLoss, "{}: {} failed ({}); check the free space and the permissions there", path,
                    what, std::generic_category().message(errno));
}

Status SafetensorsWriter::begin_file() {
  const size_t end = next_file_ + 1 < file_begins_.size() ? file_begins_[next_file_ + 1] : tensors_.size();
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  int64_t offset = 0;
  for (size_t i = file_begins_[next_file_]; i < end; ++i) {
    const TensorHeader& tensor = tensors_[i];
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + tensor.bytes}}};
    offset += tensor.bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that tensors are aligned
  path_ = directory_ + "/" + file_name(next_file_);
  file_.reset(std::fopen(path_.c_str(), "wbx"));
  if (file_ == nullptr) return failed(path_, "creating it");
  const uint64_t size = text.size();
  const bool is_written = std::fwrite(&size, sizeof size, 1, file_.get()) == 1 &&
                          std::fwrite(text.data(), text.size(), 1, file_.get()) == 1;
  if (!is_written) return failed(path_, "writing its header");
  ++next_file_;
  return {};
}

Status SafetensorsWriter::end_file() {
  if (file_ == nullptr) return {};
  const bool is_safe = std::fflush(file_.get()) == 0 && ::fsync(fileno(file_.get())) == 0;
  if (!is_safe || std::fclose(file_.release()) != 0) return failed(path_, "writing it");
  return {};
}

Status SafetensorsWriter::write(std::span<const std::byte> bytes) {
  CHECK_LT(next_tensor_, tensors_.size());
  CHECK_EQ(static_cast<int64_t>(bytes.size()), tensors_[next_tensor_].bytes);
  if (next_file_ < file_begins_.size() && file_begins_[next_file_] == next_tensor_) {
    TANDEM_TRY(end_file());
    TANDEM_TRY(begin_file());
  }
  ++next_tensor_;
  if (!bytes.empty() && std::fwrite(bytes.data(), bytes.size(), 1, file_.get()) != 1) {
    return failed(path_, "writing a tensor");
  }
  return {};
}

Status SafetensorsWriter::finish() {
  CHECK_EQ(next_tensor_, tensors_.size());
  TANDEM_TRY(end_file());
  if (file_begins_.size() <= 1) return {};
  nlohmann::ordered_json index;
  int64_t total = 0;
  nlohmann::ordered_json places;
  size_t file = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (file + 1 < file_begins_.size() && file_begins_[file + 1] == i) ++file;
    places[tensors_[i].name] = file_name(file);
    total += tensors_[i].bytes;
  }
  index["metadata"] = {{"total_size", total}};
  index["weight_map"] = std::move(places);
  const std::string text = index.dump(2) + "\n";
  const std::string path = directory_ + "/model.safetensors.index.json";
  const std::unique_ptr<std::FILE, FileCloser> out(std::fopen(path.c_str(), "wbx"));
  if (out == nullptr || std::fwrite(text.data(), text.size(), 1, out.get()) != 1 || std::fflush(out.get()) != 0) {
    return failed(path, "writing it");
  }
  return {};
}

}  // namespace tandem::model
