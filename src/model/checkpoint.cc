#include "src/model/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <set>
#include <system_error>

#include "src/model/json_fields.h"

namespace tandem::model {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxIndexBytes = int64_t{100} << 20;

bool exists(const std::string& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

// An index comes from a stranger too: its file names may not lead out of the model folder.
bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name.find('/') == std::string_view::npos &&
         name.find("..") == std::string_view::npos && name.find('\0') == std::string_view::npos;
}

}  // namespace

Result<std::unique_ptr<Checkpoint>> Checkpoint::open(const std::string& directory) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint(directory));
  const std::string index_path = directory + "/model.safetensors.index.json";
  if (exists(directory + "/model.safetensors")) {
    TANDEM_TRY(checkpoint->add_file("model.safetensors"));
  } else if (exists(index_path)) {
    TANDEM_TRY(checkpoint->add_indexed_files(index_path));
  } else {
    TANDEM_TRY(checkpoint->add_all_files());
  }
  return checkpoint;
}

Status Checkpoint::add_file(const std::string& file_name) {
  TANDEM_ASSIGN(std::unique_ptr<MappedFile> file, MappedFile::open(directory_ + "/" + file_name));
  TANDEM_ASSIGN(std::vector<StoredTensor> tensors, parse_safetensors(file->bytes(), file->path()));
  for (StoredTensor& tensor : tensors) {
    tensor.file = file.get();
    const std::string name = tensor.name;
    const auto [place, is_new] = tensors_.try_emplace(name, std::move(tensor));
    if (!is_new) {
      return make_error(ErrorKind::kDataLoss, "{}: tensor \"{}\" is also in {}; remove the file that does not belong",
                        file->path(), printable(name), place->second.file->path());
    }
  }
  files_.push_back(std::move(file));
  return {};
}

Status Checkpoint::add_indexed_files(const std::string& index_path) {
  TANDEM_ASSIGN(JsonFields index, JsonFields::read(index_path, kMaxIndexBytes));
  JsonFields weight_map = index.object("weight_map");
  index.expect(index.has("weight_map"), "weight_map", "must map tensor names to files; fetch the file again");
  TANDEM_TRY(index.status());
  const std::vector<std::pair<std::string, std::string>> places = weight_map.text_items();
  TANDEM_TRY(index.status());
  std::set<std::string> file_names;
  for (const auto& [tensor, file] : places) {
    weight_map.expect(is_plain_file_name(file), tensor,
                      "must be the name of a file in the same folder, without '/' or '..'; fetch the file again");
    file_names.insert(file);
  }
  TANDEM_TRY(index.status());
  if (file_names.empty() || file_names.size() > kMaxShards) {
    return make_error(ErrorKind::kInvalidArgument, "{}: weight_map names {} files, must name 1 to {}; fetch it again",
                      index_path, file_names.size(), kMaxShards);
  }
  for (const std::string& name : file_names) {
    if (!exists(directory_ + "/" + name)) {
      return make_error(ErrorKind::kNotFound, "{}: is named by {} but missing; fetch the rest of the model",
                        directory_ + "/" + printable(name), index_path);
    }
    TANDEM_TRY(add_file(name));
  }
  for (const auto& [tensor, file] : places) {
    const StoredTensor* stored = find(tensor);
    const std::string path = directory_ + "/" + file;
    if (stored == nullptr || stored->file->path() != path) {
      return make_error(ErrorKind::kDataLoss,
                        "{}: puts tensor \"{}\" into {}, which does not hold it; fetch both again", index_path,
                        printable(tensor), path);
    }
  }
  return {};
}

Status Checkpoint::add_all_files() {
  std::vector<std::string> names;
  std::error_code code;
  for (fs::directory_iterator it(directory_, code), end; !code && it != end; it.increment(code)) {
    const std::string name = it->path().filename().string();
    if (name.ends_with(".safetensors") && !name.starts_with("consolidated")) names.push_back(name);
  }
  if (names.empty() || names.size() > kMaxShards) {
    return make_error(
        ErrorKind::kNotFound,
        "{}: holds {} .safetensors files, must hold model.safetensors, or an index and its files (at most "
        "{}); fetch the weights or use --load-format dummy",
        directory_, names.size(), kMaxShards);
  }
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) TANDEM_TRY(add_file(name));
  return {};
}

const StoredTensor* Checkpoint::find(std::string_view name) const {
  const std::map<std::string, StoredTensor, std::less<>>::const_iterator it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

Result<const StoredTensor*> Checkpoint::require(std::string_view name, std::span<const int64_t> shape) const {
  const StoredTensor* tensor = find(name);
  if (tensor == nullptr) {
    return make_error(ErrorKind::kInvalidArgument,
                      "{}: has no tensor \"{}\" of shape {}; check that config.json belongs to these weights and that "
                      "all files were fetched",
                      directory_, name, shape_text(shape));
  }
  if (!std::equal(shape.begin(), shape.end(), tensor->shape.begin(), tensor->shape.end())) {
    return make_error(ErrorKind::kInvalidArgument,
                      "{}: tensor \"{}\" has shape {}, but config.json asks for {}; check that config.json belongs to "
                      "these weights",
                      tensor->file->path(), name, shape_text(tensor->shape), shape_text(shape));
  }
  return tensor;
}

int64_t Checkpoint::last_layer() const {
  constexpr std::string_view kPrefix = "model.layers.";
  int64_t last = -1;
  for (const auto& [name, tensor] : tensors_) {
    if (!name.starts_with(kPrefix)) continue;
    int64_t layer = -1;
    std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), layer);
    last = std::max(last, layer);
  }
  return last;
}

}  // namespace tandem::model
