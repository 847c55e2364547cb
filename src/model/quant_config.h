// What a model folder says about the quantisation of its weights: quantization_config of config.json (methods fp8,
// compressed-tensors, awq, gptq), quantize_config.json (older gptq), or quant_model_description.json (ascend).
#pragma once

#include <cstdint>
#include <memory>
#include <regex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "src/kernels/ops.h"
#include "src/model/json_fields.h"

namespace tandem::model {

// How the tensors of one quantised matrix lie in the files (stored_integers.h).
enum class QuantLayout : uint8_t {
  kFloat8,       // F8_E4M3 with one scale per block
  kBytes,        // I8 [n, k] with scales
  kWords,        // compressed-tensors "pack-quantized": I32, packed along k
  kAwq,          // I32 [k, n / 8], nibbles permuted
  kGptq,         // I32 [k / 8, n] (4 bits) or [k / 4, n] (8 bits)
  kAscendBytes,  // I8 [n, k] with scales and offsets
};

struct QuantScheme {
  QuantLayout layout = QuantLayout::kBytes;
  int64_t bits = 8;
  int64_t group_size = 0;  // columns per scale; 0: the whole row
  bool is_symmetric = true;
  int64_t activation_bits = 16;
  bool zeros_are_less_one = false;  // GPTQ v1
  // kFloat8: a block of the whole matrix is written as 0.
  int64_t block_n = 0;
  int64_t block_k = 0;
  std::string_view scale_suffix;  // behind the name of the weight: "_scale_inv" or "_scale"

  // What an integer matrix is packed to without loss. 8 bits with zero points have no such format.
  bool is_integer() const { return layout != QuantLayout::kFloat8; }
  bool has_format() const { return is_integer() && (bits == 4 || is_symmetric); }
  kernels::WeightFormat format() const;
  // "int4 g128 with zero points"
  std::string describe() const;
};

// Which modules a rule means.
class ModulePattern {
 public:
  enum class Kind : uint8_t { kName, kPrefix, kSubstring, kRegex, kEverything };

  ModulePattern(Kind kind, std::string text) : kind_(kind), text_(std::move(text)) {}
  // A name, or "re:" and a regular expression that must match from the module's beginning. Fails if that is too long or
  // not understood. Matching takes polynomial time whatever the expression.
  static Result<ModulePattern> parse(const std::string& text);

  Kind kind() const { return kind_; }
  bool matches(std::string_view module) const;

 private:
  Kind kind_;
  std::string text_;
  std::shared_ptr<const std::regex> regex_;
};

enum class QuantMethod : uint8_t { kNone, kFp8, kCompressedTensors, kAwq, kGptq, kAscend };

struct QuantConfig {
  struct Rule {
    ModulePattern pattern;
    QuantScheme scheme;
  };
  QuantMethod method = QuantMethod::kNone;
  std::vector<Rule> rules;             // the first that matches counts, names and expressions before kEverything
  std::vector<ModulePattern> ignored;  // wins over the rules
  std::set<std::string, std::less<>> ascend_modules;  // kAscend: those that are quantised
  bool has_kv_scales = false;                         // kCompressedTensors: static scales for an fp8 KV cache
  bool allows_ragged_groups = false;  // written by `tandem quantize`: the last group of a row may be shorter
  std::string path;                   // of the file that says so

  // "not quantised", or the name that --quantization knows the method by.
  std::string_view method_name() const;
  // Null if "model.layers.0.mlp.gate" and the like stay unquantised.
  const QuantScheme* scheme_of(std::string_view module) const;
};

// Reads quantization_config of `json` if it is there. Faults go to `json`.
QuantConfig read_quant_config(JsonFields& json);
// If that found nothing: quantize_config.json and quant_model_description.json in `folder`, which ends with '/'.
Status read_quant_files(const std::string& folder, QuantConfig& quant);

}  // namespace tandem::model
