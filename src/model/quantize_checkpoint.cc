#include "src/model/quantize_checkpoint.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "src/base/log.h"
#include "src/kernels/integer.h"
#include "src/model/decoder.h"
#include "src/model/read_weights.h"
#include "src/model/safetensors_writer.h"
#include "src/model/sources.h"

namespace tandem::model {
namespace {

namespace fs = std::filesystem;
using kernels::DType;
using kernels::WeightFormat;
using kernels::WeightType;
using Json = nlohmann::ordered_json;

constexpr uintmax_t kMaxCopiedFileBytes = uintmax_t{256} << 20;
constexpr std::string_view kWeight = ".weight";

bool is_bytes_layout(const WeightFormat& format) {
  return format.type == WeightType::kInt8 && format.activation_bits == 8;
}

// Rows [first, first + count) of a matrix of the source, as the weight of a module of the target.
struct Part {
  std::string module;
  MatrixRef ref;
  int64_t first = 0;
  int64_t count = 0;
  WeightFormat format;

  int64_t codes_per_word() const { return format.type == WeightType::kInt8 ? 4 : 8; }
  int64_t words_per_row() const { return (ref.k + codes_per_word() - 1) / codes_per_word(); }
  int64_t groups() const { return kernels::count_groups(ref.k, format); }
};

// Stacked experts ("….experts.gate_up_proj", slice e) become one module for each expert and projection.
std::vector<Part> parts_of(const MatrixRef& ref, const WeightFormat& format) {
  const std::string_view name = ref.tensor;
  if (ref.slices == 0) return {{std::string(name.substr(0, name.size() - kWeight.size())), ref, 0, ref.n, format}};
  const std::string_view stack = name.substr(0, name.rfind('.') + 1);
  const std::string expert = fmt::format("{}{}.", stack, ref.slice);
  if (!name.ends_with("gate_up_proj")) {
    return {{expert + std::string(name.substr(stack.size())), ref, 0, ref.n, format}};
  }
  return {{expert + "gate_proj", ref, 0, ref.n / 2, format}, {expert + "up_proj", ref, ref.n / 2, ref.n / 2, format}};
}

Json scheme_json(const WeightFormat& format, const std::vector<std::string>& targets) {
  Json weights{{"num_bits", format.type == WeightType::kInt8 ? 8 : 4},     {"type", "int"},         {"symmetric", true},
               {"strategy", format.group_size == 0 ? "channel" : "group"}, {"group_size", nullptr}, {"dynamic", false}};
  if (format.group_size != 0) weights["group_size"] = format.group_size;
  Json activations;
  if (format.activation_bits == 8) {
    activations = {{"num_bits", 8}, {"type", "int"}, {"symmetric", true}, {"strategy", "token"}, {"dynamic", true}};
  }
  return {{"targets", targets},
          {"format", is_bytes_layout(format) ? "int-quantized" : "pack-quantized"},
          {"weights", weights},
          {"input_activations", activations},
          {"output_activations", nullptr}};
}

class Quantizer {
 public:
  Quantizer(kernels::Ops& ops, const QuantizeOptions& options) : ops_(ops), options_(options) {}

  Result<QuantizedFiles> run();

 private:
  Status check_target() const;
  Status open();
  void declare();
  void declare_copy(const std::string& tensor, const MatrixRef* ref);
  void declare_part(const Part& part);
  Status write_tensors(SafetensorsWriter& writer);
  Status write_copy(SafetensorsWriter& writer, const std::string& tensor, const MatrixRef* ref);
  Status write_matrix(SafetensorsWriter& writer, const MatrixRef& ref, const WeightFormat& format);
  Status write_part(SafetensorsWriter& writer, const Part& part, const IntegerRows& rows);
  Status write_config(const std::string& folder) const;
  Status copy_other_files(const std::string& folder) const;
  Status move_into_place(const std::string& folder) const;
  std::string absolute_target() const {
    std::string path = fs::absolute(options_.target).lexically_normal().string();
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    return path;
  }

  kernels::Ops& ops_;
  const QuantizeOptions& options_;
  WeightFormats formats_;
  const Checkpoint* checkpoint_ = nullptr;  // owned by source_
  std::unique_ptr<WeightSource> source_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<WeightPlan> plan_;
  std::vector<TensorHeader> headers_;
  IntegerBuffer integers_;
  QuantizedFiles result_;
};

Status Quantizer::check_target() const {
  if (options_.target.empty()) {
    return make_error(ErrorKind::kInvalidArgument, "the folder to write has an empty name; give another");
  }
  const std::string target = absolute_target();
  std::error_code ignored;
  if (!fs::exists(target, ignored)) return {};
  if (fs::equivalent(target, options_.source, ignored)) {
    return make_error(ErrorKind::kInvalidArgument, "{}: is the source itself; give another folder", target);
  }
  if (!fs::is_directory(target, ignored)) {
    return make_error(ErrorKind::kInvalidArgument,
                      "{}: is a file, and a model is a folder; --force replaces folders of models only; give another "
                      "name",
                      target);
  }
  if (!options_.may_replace) {
    return make_error(ErrorKind::kInvalidArgument, "{}: exists; give another folder, or --force to replace it", target);
  }
  if (fs::exists(target + "/config.json", ignored) || fs::is_empty(target, ignored)) return {};
  return make_error(ErrorKind::kInvalidArgument,
                    "{}: is not empty and holds no config.json, so --force does not replace it; give another folder",
                    target);
}

Status Quantizer::open() {
  TANDEM_ASSIGN(ModelConfig config, load_config(options_.source));
  TANDEM_ASSIGN(formats_, choose_formats(options_.quantization, config.quant, false, !config.tied_embeddings,
                                         kernels::kBf16Weights));
  if (!formats_.linear) {
    return invalid_argument("quantization", "--quantization is {}, must be wint8, wint4, w8a8 or w4a8",
                            options_.quantization.name);
  }
  TANDEM_ASSIGN(std::unique_ptr<Checkpoint> checkpoint, open_matching_checkpoint(options_.source, config));
  checkpoint_ = checkpoint.get();
  source_ = make_checkpoint_source(std::move(checkpoint), config.quant);
  decoder_ = std::make_unique<Decoder>(ops_, std::move(config));
  plan_ = std::make_unique<WeightPlan>(ops_, decoder_->stream(), *source_, formats_);
  decoder_->list_weights(*plan_);
  result_.formats = plan_->describe_formats();
  return plan_->status();
}

void Quantizer::declare_copy(const std::string& tensor, const MatrixRef* ref) {
  const StoredTensor& stored = *checkpoint_->find(tensor);
  if (stored.kernel_dtype == DType::kF8E4M3) {
    headers_.push_back({tensor, "F32", stored.shape, ref->n * ref->k * int64_t{sizeof(float)}});
    return;
  }
  headers_.push_back({tensor, std::string(stored.dtype), stored.shape, static_cast<int64_t>(stored.data.size())});
}

void Quantizer::declare_part(const Part& part) {
  const int64_t rows = part.count;
  if (is_bytes_layout(part.format)) {
    headers_.push_back({part.module + ".weight", "I8", {rows, part.ref.k}, rows * part.ref.k});
  } else {
    headers_.push_back(
        {part.module + ".weight_packed", "I32", {rows, part.words_per_row()}, rows * part.words_per_row() * 4});
    headers_.push_back({part.module + ".weight_shape", "I64", {2}, 2 * int64_t{sizeof(int64_t)}});
  }
  headers_.push_back({part.module + ".weight_scale", "F32", {rows, part.groups()}, rows * part.groups() * 4});
  const int64_t group = part.format.group_size;
  if (group != 0 && part.ref.k % group != 0) result_.has_ragged_groups = true;
}

void Quantizer::declare() {
  for (const WeightPlan::Task& task : plan_->tasks()) {
    if (task.vector != nullptr) declare_copy(task.tensor, nullptr);
    for (const MatrixRef& ref : task.refs) {
      if (!task.format.is_integer()) {
        declare_copy(ref.tensor, &ref);
        continue;
      }
      for (const Part& part : parts_of(ref, task.format)) declare_part(part);
    }
  }
  for (const TensorHeader& header : headers_) result_.bytes += header.bytes;
}

Status Quantizer::write_copy(SafetensorsWriter& writer, const std::string& tensor, const MatrixRef* ref) {
  const StoredTensor& stored = *checkpoint_->find(tensor);
  if (stored.kernel_dtype == DType::kF8E4M3) {
    TANDEM_TRY(source_->check_values(*ref));
    const DenseMatrices dense = read_dense(*source_, std::span(ref, 1), 1, DType::kF32, ops_.num_threads());
    return writer.write({dense.bytes.get(), static_cast<size_t>(ref->n * ref->k) * sizeof(float)});
  }
  const Status status = writer.write(stored.data);
  stored.file->release(stored.data);
  return status;
}

Status Quantizer::write_part(SafetensorsWriter& writer, const Part& part, const IntegerRows& rows) {
  const IntegerRows mine = rows.from(part.first);
  const size_t count = static_cast<size_t>(part.count);
  const std::span<const std::byte> codes(mine.codes, count * static_cast<size_t>(mine.code_bytes));
  if (is_bytes_layout(part.format)) {
    TANDEM_TRY(writer.write(codes));
  } else {
    // The same bytes, in whole words, counted from half the range.
    const size_t row_bytes = static_cast<size_t>(part.words_per_row()) * 4;
    const std::byte flip{part.format.type == WeightType::kInt8 ? uint8_t{0x80} : uint8_t{0}};
    std::vector<std::byte> words(count * row_bytes);
    for (size_t row = 0; row < count; ++row) {
      const std::span<const std::byte> source = codes.subspan(row * static_cast<size_t>(mine.code_bytes));
      for (int64_t i = 0; i < mine.code_bytes; ++i) {
        words[row * row_bytes + static_cast<size_t>(i)] = source[static_cast<size_t>(i)] ^ flip;
      }
    }
    TANDEM_TRY(writer.write(words));
    const int64_t shape[] = {part.count, part.ref.k};
    TANDEM_TRY(writer.write(std::as_bytes(std::span(shape))));
  }
  return writer.write(std::as_bytes(std::span(mine.scales, count * static_cast<size_t>(mine.groups))));
}

Status Quantizer::write_matrix(SafetensorsWriter& writer, const MatrixRef& ref, const WeightFormat& format) {
  TANDEM_TRY(source_->check_values(ref));
  if (!read_integers(*source_, std::span(&ref, 1), format, ops_.num_threads(), &integers_)) {
    return make_error(
        ErrorKind::kDataLoss,
        "{}: tensor \"{}\" holds a value that is not finite and cannot be quantised; fetch the file again",
        options_.source, printable(ref.tensor));
  }
  for (const Part& part : parts_of(ref, format)) TANDEM_TRY(write_part(writer, part, integers_.rows()));
  return {};
}

Status Quantizer::write_tensors(SafetensorsWriter& writer) {
  const std::span<const WeightPlan::Task> tasks = plan_->tasks();
  for (size_t i = 0; i < tasks.size(); ++i) {
    const WeightPlan::Task& task = tasks[i];
    if (task.vector != nullptr) TANDEM_TRY(write_copy(writer, task.tensor, nullptr));
    for (const MatrixRef& ref : task.refs) {
      TANDEM_TRY(task.format.is_integer() ? write_matrix(writer, ref, task.format)
                                          : write_copy(writer, ref.tensor, &ref));
    }
    if (options_.on_progress) options_.on_progress(static_cast<double>(i + 1) / static_cast<double>(tasks.size()));
  }
  return writer.finish();
}

Status Quantizer::write_config(const std::string& folder) const {
  TANDEM_ASSIGN(const std::string text, read_small_file(options_.source + "/config.json", int64_t{16} << 20));
  Json config = Json::parse(text);  // read before, so it is valid
  const bool has_head = !decoder_->config().tied_embeddings;
  Json groups{{"group_0", scheme_json(*formats_.linear, {"Linear"})}};
  if (has_head && *formats_.head != *formats_.linear) groups["group_1"] = scheme_json(*formats_.head, {"lm_head"});
  Json ignored{R"(re:.*\.mlp\.gate$)"};
  if (decoder_->config().mla.kv_lora_rank > 0) ignored.push_back(R"(re:.*\.kv_b_proj$)");
  if (!has_head) ignored.push_back("lm_head");
  const Json& first = groups["group_0"]["format"];
  const bool is_uniform =
      std::all_of(groups.begin(), groups.end(), [&](const Json& g) { return g["format"] == first; });
  Json quantization{{"quant_method", "compressed-tensors"},
                    {"format", is_uniform ? first : Json("mixed-precision")},
                    {"quantization_status", "compressed"},
                    {"config_groups", groups},
                    {"ignore", ignored},
                    {"kv_cache_scheme", nullptr}};
  if (result_.has_ragged_groups) quantization["tandem_ragged_groups"] = true;
  config["quantization_config"] = quantization;
  std::ofstream file(folder + "/config.json", std::ios::binary);
  file << config.dump(2) << "\n";
  if (file.flush().good()) return {};
  return make_error(ErrorKind::kDataLoss, "{}/config.json: writing it failed; check the free space there", folder);
}

// Tokenizer, templates, licence: everything that is neither weights nor says how they are stored.
Status Quantizer::copy_other_files(const std::string& folder) const {
  constexpr std::string_view kWeightEndings[] = {".safetensors", ".index.json", ".bin",     ".pt",  ".pth",
                                                 ".gguf",        ".h5",         ".msgpack", ".onnx"};
  constexpr std::string_view kReplaced[] = {"config.json", "quantize_config.json", "quant_model_description.json"};
  std::error_code code;
  for (fs::directory_iterator it(options_.source, code), end; !code && it != end; it.increment(code)) {
    const std::string name = it->path().filename().string();
    const bool is_weight = std::any_of(std::begin(kWeightEndings), std::end(kWeightEndings),
                                       [&](std::string_view ending) { return name.ends_with(ending); });
    const bool is_replaced = std::find(std::begin(kReplaced), std::end(kReplaced), name) != std::end(kReplaced);
    if (is_weight || is_replaced || !it->is_regular_file(code)) continue;
    if (it->file_size(code) > kMaxCopiedFileBytes) {
      log_info("quantize", "{} is not copied: it has more than {} bytes", it->path().string(), kMaxCopiedFileBytes);
      continue;
    }
    if (!code) fs::copy_file(it->path(), folder + "/" + name, code);
    if (code) break;
  }
  if (!code) return {};
  return make_error(ErrorKind::kDataLoss, "{}: copying the other files to {} failed ({})", options_.source, folder,
                    code.message());
}

// The old folder, if any, is moved aside first, so that at every moment one of the two is whole.
Status Quantizer::move_into_place(const std::string& folder) const {
  const std::string target = absolute_target();
  const std::string old = fmt::format("{}.old-{}", target, getpid());
  std::error_code code;
  const bool exists = fs::exists(target, code);
  if (exists) fs::rename(target, old, code);
  if (!code) fs::rename(folder, target, code);
  if (code) {
    std::error_code ignored;
    if (exists && !fs::exists(target, ignored)) fs::rename(old, target, ignored);
    return make_error(ErrorKind::kDataLoss, "{}: moving the finished folder here failed ({})", target, code.message());
  }
  if (exists) fs::remove_all(old, code);
  return {};
}

Result<QuantizedFiles> Quantizer::run() {
  TANDEM_TRY(check_target());
  TANDEM_TRY(open());
  declare();
  log_info("quantize", "{}: {}", options_.source, result_.formats);
  const std::string folder = fmt::format("{}.partial-{}", absolute_target(), getpid());
  std::error_code code;
  if (!fs::create_directory(folder, code) || code) {
    return make_error(ErrorKind::kInvalidArgument, "{}: creating it failed ({}); check that its parent is writable",
                      folder, code ? code.message() : "exists");
  }
  SafetensorsWriter writer(folder, headers_, options_.max_file_bytes);
  Status status = write_tensors(writer);
  if (status.ok()) status = write_config(folder);
  if (status.ok()) status = copy_other_files(folder);
  if (status.ok()) status = move_into_place(folder);
  if (!status.ok()) {
    fs::remove_all(folder, code);
    return status.error();
  }
  result_.files = writer.num_files();
  return result_;
}

}  // namespace

Result<QuantizedFiles> quantize_checkpoint(kernels::Ops& ops, const QuantizeOptions& options) {
  return Quantizer(ops, options).run();
}

}  // namespace tandem::model
