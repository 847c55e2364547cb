#include "src/model/quant_config.h"

#include <sys/stat.h>

#include <algorithm>

#include "src/kernels/integer.h"
#include "src/model/config.h"

namespace tandem::model {
namespace {

using kernels::WeightType;

constexpr int64_t kMaxFileBytes = int64_t{100} << 20;
constexpr size_t kMaxExpression = 256;
constexpr size_t kMaxRules = 4096;
constexpr const char* kUseOther = "use another release of the model";

bool is_file(const std::string& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

// -1 and absence stand for the whole row.
int64_t read_group_size(JsonFields& fields, const char* key) {
  const int64_t size = fields.integer_or(key, -1, -1, kMaxDim);
  fields.expect(
      size == -1 || (size > 0 && size % kernels::kGroupMultiple == 0), key,
      fmt::format("must be -1 (one group per row) or a multiple of {}; {}", kernels::kGroupMultiple, kUseOther));
  return std::max<int64_t>(size, 0);
}

void add_patterns(JsonFields& fields, const char* key, ModulePattern::Kind kind, std::vector<ModulePattern>& out) {
  for (const std::string& text : fields.texts(key)) out.emplace_back(kind, text);
  fields.expect(out.size() <= kMaxRules, key, fmt::format("must have at most {} entries", kMaxRules));
}

void read_fp8(JsonFields& fields, QuantConfig& quant) {
  fields.expect(fields.text_or("fmt", "e4m3") == "e4m3", "fmt", "must be \"e4m3\"; use an e4m3 release of the model");
  fields.expect(fields.text_or("activation_scheme", "dynamic") == "dynamic", "activation_scheme",
                "must be \"dynamic\"; use a release without static activation scales");
  const std::vector<int64_t> block = fields.integers("weight_block_size", 1, kMaxDim);
  fields.expect(
      block.size() == 2, "weight_block_size",
      "must be two integers such as [128, 128]; scales per tensor are not supported, use an FP8-block release");
  QuantScheme scheme;
  scheme.layout = QuantLayout::kFloat8;
  scheme.block_n = block.empty() ? 1 : block.front();
  scheme.block_k = block.empty() ? 1 : block.back();
  scheme.scale_suffix = "_scale_inv";
  quant.method = QuantMethod::kFp8;
  quant.rules.push_back({ModulePattern(ModulePattern::Kind::kEverything, ""), scheme});
  add_patterns(fields, "modules_to_not_convert", ModulePattern::Kind::kPrefix, quant.ignored);
}

void read_awq(JsonFields& fields, QuantConfig& quant) {
  const bool is_new = fields.has("bits");
  const char* bits = is_new ? "bits" : "w_bit";
  QuantScheme scheme;
  scheme.layout = QuantLayout::kAwq;
  scheme.bits = fields.integer(bits, 1, 32);
  fields.expect(scheme.bits == 4, bits, "must be 4; use a 4-bit release of the model");
  scheme.group_size = read_group_size(fields, is_new ? "group_size" : "q_group_size");
  fields.expect(fields.boolean_or("zero_point", true), "zero_point", "must be true; use a release with zero points");
  const std::string version = fields.text_or("version", "gemm");
  fields.expect(version == "gemm" || version == "GEMM", "version", "must be \"gemm\"; use a release of that version");
  scheme.is_symmetric = false;
  quant.method = QuantMethod::kAwq;
  quant.rules.push_back({ModulePattern(ModulePattern::Kind::kEverything, ""), scheme});
  add_patterns(fields, "modules_to_not_convert", ModulePattern::Kind::kSubstring, quant.ignored);
}

void read_gptq(JsonFields& fields, QuantConfig& quant) {
  QuantScheme scheme;
  scheme.layout = QuantLayout::kGptq;
  scheme.bits = fields.integer("bits", 1, 32);
  fields.expect(scheme.bits == 4 || scheme.bits == 8, "bits", "must be 4 or 8; use a release with one of these");
  scheme.group_size = read_group_size(fields, "group_size");
  scheme.is_symmetric = fields.boolean_or("sym", true);
  const std::string format = fields.text_or("checkpoint_format", "gptq");
  fields.expect(format == "gptq" || format == "gptq_v2", "checkpoint_format",
                "must be \"gptq\" or \"gptq_v2\"; use a release of one of these");
  scheme.zeros_are_less_one = format == "gptq";
  // Rules "-:<expression>" leave modules out, which then have no qweight; others change their scheme.
  JsonFields dynamic = fields.object("dynamic");
  for (const std::string& rule : dynamic.keys()) {
    dynamic.expect(rule.starts_with("-:"), rule,
                   "which changes the scheme of some layers: not supported, use another "
                   "release");
  }
  quant.method = QuantMethod::kGptq;
  quant.rules.push_back({ModulePattern(ModulePattern::Kind::kEverything, ""), scheme});
}

// The group size of compressed-tensors weights, by their strategy.
int64_t read_strategy(JsonFields& weights) {
  const std::string strategy = weights.text_or("strategy", "");
  if (strategy == "group") {
    weights.expect(weights.has("group_size"), "group_size", "must be given for the strategy \"group\"");
    return read_group_size(weights, "group_size");
  }
  weights.expect(strategy == "channel" || strategy == "tensor", "strategy",
                 fmt::format("must be \"channel\", \"group\" or \"tensor\" for integers; {}", kUseOther));
  return 0;
}

void read_float_weights(JsonFields& weights, QuantScheme& scheme) {
  scheme.layout = QuantLayout::kFloat8;
  scheme.scale_suffix = "_scale";
  weights.expect(weights.boolean_or("symmetric", true), "symmetric", "must be true for floats");
  const std::string strategy = weights.text_or("strategy", "");
  if (strategy == "block") {
    const std::vector<int64_t> block = weights.integers("block_structure", 1, kMaxDim);
    weights.expect(block.size() == 2, "block_structure", "must be two integers such as [128, 128]");
    scheme.block_n = block.empty() ? 1 : block.front();
    scheme.block_k = block.empty() ? 1 : block.back();
  } else {
    weights.expect(strategy == "channel" || strategy == "tensor", "strategy",
                   fmt::format("must be \"block\", \"channel\" or \"tensor\" for floats; {}", kUseOther));
    scheme.block_n = strategy == "channel" ? 1 : 0;
    scheme.block_k = 0;
  }
}

// Activations are rounded when they are there: a checkpoint can only say that, not how.
void read_activations(JsonFields& group, QuantScheme& scheme) {
  scheme.activation_bits = 16;
  if (!group.has("input_activations")) return;
  JsonFields fields = group.object("input_activations");
  fields.expect(fields.boolean_or("dynamic", false), "dynamic",
                fmt::format("must be true: static activation scales are not supported; {}", kUseOther));
  if (!scheme.is_integer()) return;  // converted at load, so activations keep their precision
  const std::string type = fields.text_or("type", "int");
  fields.expect(type == "int", "type", fmt::format("must be \"int\" beside integer weights; {}", kUseOther));
  const int64_t bits = fields.integer("num_bits", 1, 64);
  fields.expect(bits == 8, "num_bits", fmt::format("must be 8; {}", kUseOther));
  fields.expect(fields.boolean_or("symmetric", true), "symmetric", fmt::format("must be true; {}", kUseOther));
  const std::string strategy = fields.text_or("strategy", "token");
  fields.expect(strategy == "token" || strategy == "group", "strategy",
                fmt::format("must be \"token\" or \"group\"; {}", kUseOther));
  scheme.activation_bits = 8;
}

QuantScheme read_scheme(JsonFields& group, const std::string& common_format) {
  QuantScheme scheme;
  JsonFields weights = group.object("weights");
  group.expect(group.has("weights"), "weights", "must say how weights are stored; fetch the file again");
  const std::string type = weights.text_or("type", "int");
  weights.expect(type == "int" || type == "float", "type", "must be \"int\" or \"float\"");
  scheme.bits = weights.integer("num_bits", 1, 64);
  const bool is_known = scheme.bits == 8 || (scheme.bits == 4 && type == "int");
  weights.expect(is_known, "num_bits",
                 fmt::format("must be 8{}; {}", type == "int" ? " or 4" : " for floats", kUseOther));
  weights.expect(!weights.boolean_or("dynamic", false), "dynamic", "must be false for weights");
  const std::string order = weights.text_or("actorder", "weight");  // "weight" and "static" leave columns in place
  weights.expect(order == "weight" || order == "static", "actorder",
                 fmt::format("which reorders columns: not supported; {}", kUseOther));
  const std::string format = group.text_or("format", common_format);
  if (type == "float") {
    read_float_weights(weights, scheme);
    group.expect(format == "float-quantized" || format == "naive-quantized", "format",
                 fmt::format("must be \"float-quantized\" for these weights; {}", kUseOther));
  } else {
    scheme.group_size = read_strategy(weights);
    scheme.is_symmetric = weights.boolean_or("symmetric", true);
    scheme.scale_suffix = "_scale";
    scheme.layout = format == "int-quantized" ? QuantLayout::kBytes : QuantLayout::kWords;
    group.expect(format == "pack-quantized" || (format == "int-quantized" && scheme.bits == 8), "format",
                 fmt::format("must be \"int-quantized\" (8 bits) or \"pack-quantized\"; {}", kUseOther));
  }
  read_activations(group, scheme);
  return scheme;
}

void add_expressions(JsonFields& fields, const char* key, std::vector<ModulePattern>& out) {
  for (const std::string& text : fields.texts(key)) {
    Result<ModulePattern> pattern = ModulePattern::parse(text);
    if (!pattern.ok()) {
      fields.fail(key, pattern.error().message);
      return;
    }
    out.push_back(std::move(pattern).value());
  }
  fields.expect(out.size() <= kMaxRules, key, fmt::format("must have at most {} entries", kMaxRules));
}

void read_compressed_tensors(JsonFields& fields, QuantConfig& quant) {
  quant.method = QuantMethod::kCompressedTensors;
  add_expressions(fields, "ignore", quant.ignored);
  quant.has_kv_scales = fields.has("kv_cache_scheme");
  const std::string sparsity = fields.object("sparsity_config").text_or("format", "dense");
  fields.expect(sparsity == "dense", "sparsity_config", fmt::format("must be dense; {}", kUseOther));
  fields.expect(fields.object("transform_config").keys().empty(), "transform_config",
                fmt::format("must be empty: rotations are not supported; {}", kUseOther));
  quant.allows_ragged_groups = fields.boolean_or("tandem_ragged_groups", false);
  JsonFields groups = fields.object("config_groups");
  fields.expect(!groups.keys().empty(), "config_groups", "must describe at least one group; fetch the file again");
  for (const std::string& name : groups.keys()) {
    JsonFields group = groups.object(name);
    const QuantScheme scheme = read_scheme(group, fields.text_or("format", ""));
    std::vector<ModulePattern> targets;
    add_expressions(group, "targets", targets);
    group.expect(!targets.empty(), "targets", "must name the layers; fetch the file again");
    for (const ModulePattern& target : targets) quant.rules.push_back({target, scheme});
  }
  std::stable_sort(quant.rules.begin(), quant.rules.end(), [](const QuantConfig::Rule& a, const QuantConfig::Rule& b) {
    return (a.pattern.kind() == ModulePattern::Kind::kEverything) <
           (b.pattern.kind() == ModulePattern::Kind::kEverything);
  });
}

// Full tensor names with their types. What is not named stays unquantised.
void read_ascend(JsonFields& fields, QuantConfig& quant) {
  constexpr std::string_view kWeight = ".weight";
  quant.method = QuantMethod::kAscend;
  QuantScheme scheme;
  scheme.layout = QuantLayout::kAscendBytes;
  scheme.activation_bits = 8;
  for (const std::string& key : fields.keys()) {
    if (!key.ends_with(kWeight)) continue;
    const std::string type = fields.text_or(key, "");
    fields.expect(type == "FLOAT" || type == "W8A8_DYNAMIC", key,
                  "must be FLOAT or W8A8_DYNAMIC, the types that are read; use a release with only these");
    if (type != "W8A8_DYNAMIC") continue;
    quant.ascend_modules.insert(key.substr(0, key.size() - kWeight.size()));
  }
  quant.rules.push_back({ModulePattern(ModulePattern::Kind::kEverything, ""), scheme});
}

}  // namespace

kernels::WeightFormat QuantScheme::format() const {
  return {bits == 8 ? WeightType::kInt8 : WeightType::kInt4, group_size, activation_bits};
}

std::string QuantScheme::describe() const {
  if (!is_integer()) return "F8_E4M3";
  return kernels::weight_format_name(format()) + (is_symmetric ? "" : " with zero points");
}

Result<ModulePattern> ModulePattern::parse(const std::string& text) {
  if (text == "Linear") return ModulePattern(Kind::kEverything, text);
  if (!text.starts_with("re:")) return ModulePattern(Kind::kName, text);
  const std::string expression = text.substr(3);
  if (expression.size() > kMaxExpression) {
    return make_error(ErrorKind::kInvalidArgument, "whose regular expression has {} characters, must have at most {}",
                      expression.size(), kMaxExpression);
  }
  ModulePattern pattern(Kind::kRegex, expression);
  try {
    // The polynomial matcher of libstdc++ does not backtrack, so that no expression takes for ever.
    pattern.regex_ = std::make_shared<const std::regex>(
        expression, std::regex::ECMAScript | std::regex::nosubs | std::regex_constants::__polynomial);
  } catch (const std::regex_error&) {
    return make_error(ErrorKind::kInvalidArgument,
                      "whose \"{}\" is no regular expression that is understood; use plain names", printable(text));
  }
  return pattern;
}

bool ModulePattern::matches(std::string_view module) const {
  switch (kind_) {
    case Kind::kName:
      return module == text_;
    case Kind::kPrefix:
      return module.starts_with(text_) && (module.size() == text_.size() || module[text_.size()] == '.');
    case Kind::kSubstring:
      return module.find(text_) != std::string_view::npos;
    case Kind::kRegex:
      return std::regex_search(module.begin(), module.end(), *regex_, std::regex_constants::match_continuous);
    case Kind::kEverything:
      return true;
  }
  return false;
}

std::string_view QuantConfig::method_name() const {
  switch (method) {
    case QuantMethod::kNone:
      return "not quantised";
    case QuantMethod::kFp8:
      return "fp8";
    case QuantMethod::kCompressedTensors:
      return "compressed-tensors";
    case QuantMethod::kAwq:
      return "awq";
    case QuantMethod::kGptq:
      return "gptq";
    case QuantMethod::kAscend:
      return "ascend";
  }
  return "";
}

const QuantScheme* QuantConfig::scheme_of(std::string_view module) const {
  if (method == QuantMethod::kAscend) {
    return ascend_modules.contains(module) ? &rules.front().scheme : nullptr;
  }
  for (const ModulePattern& pattern : ignored) {
    if (pattern.matches(module)) return nullptr;
  }
  for (const Rule& rule : rules) {
    if (rule.pattern.matches(module)) return &rule.scheme;
  }
  return nullptr;
}

QuantConfig read_quant_config(JsonFields& json) {
  QuantConfig quant;
  quant.path = json.path();
  json.expect(!json.has("compression_config"), "compression_config",
              "an older name of quantization_config that is not read; use a newer release of the model");
  if (!json.has("quantization_config")) return quant;
  JsonFields fields = json.object("quantization_config");
  const std::string method = fields.text_or("quant_method", "");
  if (method == "fp8") {
    read_fp8(fields, quant);
  } else if (method == "compressed-tensors") {
    read_compressed_tensors(fields, quant);
  } else if (method == "awq") {
    read_awq(fields, quant);
  } else if (method == "gptq") {
    read_gptq(fields, quant);
  } else {
    fields.fail("quant_method",
                "must be fp8, compressed-tensors, awq or gptq; use a release of the model in one of these, or in bf16");
  }
  return quant;
}

Status read_quant_files(const std::string& folder, QuantConfig& quant) {
  if (quant.method != QuantMethod::kNone) return {};
  const std::string ascend = folder + "quant_model_description.json";
  const std::string gptq = folder + "quantize_config.json";
  if (!is_file(ascend) && !is_file(gptq)) return {};
  quant.path = is_file(ascend) ? ascend : gptq;
  TANDEM_ASSIGN(JsonFields fields, JsonFields::read(quant.path, kMaxFileBytes));
  if (is_file(ascend)) {
    read_ascend(fields, quant);
  } else {
    read_gptq(fields, quant);
  }
  return fields.status();
}

}  // namespace tandem::model
