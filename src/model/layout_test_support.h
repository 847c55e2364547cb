// Writes integer matrices in the layouts of checkpoints, one element at a time and as the formats' own documents tell
// it; shares no code with what reads them.
#pragma once

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "src/kernels/convert.h"
#include "src/model/test_support.h"

namespace tandem::model {

// w[n][k] = (code - zero) * scale with unsigned codes and zeros of `bits` bits; 8-bit codes count from 128.
struct TestIntegers {
  int64_t bits = 4;
  int64_t n = 0;
  int64_t k = 0;
  int64_t group = 0;  // columns
  std::vector<uint32_t> codes;
  std::vector<uint32_t> zeros;   // [n][groups]
  std::vector<uint16_t> scales;  // [n][groups], f16

  int64_t groups() const { return (k + group - 1) / group; }
  uint32_t code(int64_t row, int64_t column) const { return codes[static_cast<size_t>(row * k + column)]; }
  uint32_t zero(int64_t row, int64_t g) const { return zeros[static_cast<size_t>(row * groups() + g)]; }
  uint16_t scale(int64_t row, int64_t g) const { return scales[static_cast<size_t>(row * groups() + g)]; }
  float value(int64_t row, int64_t column) const {
    const int64_t g = column / group;
    const int difference = static_cast<int>(code(row, column)) - static_cast<int>(zero(row, g));
    return static_cast<float>(difference) * kernels::float_from_f16(scale(row, g));
  }
};

inline TestIntegers random_integers(std::mt19937_64& random, int64_t bits, int64_t n, int64_t k, int64_t group,
                                    bool is_symmetric) {
  TestIntegers matrix{bits, n, k, group == 0 ? k : group, {}, {}, {}};
  const uint32_t middle = bits == 4 ? 8 : 128;
  for (int64_t i = 0; i < n * k; ++i) matrix.codes.push_back(static_cast<uint32_t>(random() % (2 * middle)));
  for (int64_t i = 0; i < n * matrix.groups(); ++i) {
    // GPTQ v1 cannot store a zero of 0.
    matrix.zeros.push_back(is_symmetric ? middle : 1 + static_cast<uint32_t>(random() % (2 * middle - 1)));
    // 2^-8 … 2^-7 for 4 bits, a sixteenth of it for 8.
    matrix.scales.push_back(static_cast<uint16_t>((bits == 4 ? 0x1C00U : 0x0C00U) + random() % 0x400U));
  }
  return matrix;
}

inline std::string bytes_of_words(const std::vector<uint32_t>& words) {
  return {reinterpret_cast<const char*>(words.data()), words.size() * 4};
}

inline void put_bits(std::vector<uint32_t>& words, int64_t word, int64_t bit, uint32_t value) {
  words[static_cast<size_t>(word)] |= value << bit;
}

inline std::string bytes_of_scales(const TestIntegers& m, bool is_transposed) {
  std::vector<uint16_t> scales;
  if (!is_transposed) scales = m.scales;
  for (int64_t g = 0; is_transposed && g < m.groups(); ++g) {
    for (int64_t row = 0; row < m.n; ++row) scales.push_back(m.scale(row, g));
  }
  return {reinterpret_cast<const char*>(scales.data()), scales.size() * 2};
}

// compressed-tensors "pack-quantized".
inline std::vector<FileTensor> as_packed(const std::string& module, const TestIntegers& m, bool is_symmetric) {
  const int64_t per_word = 32 / m.bits;
  const int64_t row_words = (m.k + per_word - 1) / per_word;
  std::vector<uint32_t> codes(static_cast<size_t>(m.n * row_words));
  for (int64_t row = 0; row < m.n; ++row) {
    for (int64_t k = 0; k < m.k; ++k) {
      put_bits(codes, row * row_words + k / per_word, k % per_word * m.bits, m.code(row, k));
    }
  }
  const int64_t shape[] = {m.n, m.k};
  std::vector<FileTensor> tensors{
      {module + ".weight_packed", "I32", {m.n, row_words}, bytes_of_words(codes)},
      {module + ".weight_scale", "F16", {m.n, m.groups()}, bytes_of_scales(m, false)},
      {module + ".weight_shape", "I64", {2}, std::string(reinterpret_cast<const char*>(shape), sizeof shape)}};
  if (is_symmetric) return tensors;
  const int64_t zero_rows = (m.n + per_word - 1) / per_word;
  std::vector<uint32_t> zeros(static_cast<size_t>(zero_rows * m.groups()));
  for (int64_t row = 0; row < m.n; ++row) {
    for (int64_t g = 0; g < m.groups(); ++g) {
      put_bits(zeros, row / per_word * m.groups() + g, row % per_word * m.bits, m.zero(row, g));
    }
  }
  tensors.push_back({module + ".weight_zero_point", "I32", {zero_rows, m.groups()}, bytes_of_words(zeros)});
  return tensors;
}

inline std::vector<FileTensor> as_awq(const std::string& module, const TestIntegers& m) {
  constexpr int64_t kColumnOfNibble[] = {0, 2, 4, 6, 1, 3, 5, 7};
  std::vector<uint32_t> codes(static_cast<size_t>(m.k * m.n / 8));
  std::vector<uint32_t> zeros(static_cast<size_t>(m.groups() * m.n / 8));
  for (int64_t word = 0; word < m.n / 8; ++word) {
    for (int64_t nibble = 0; nibble < 8; ++nibble) {
      const int64_t row = 8 * word + kColumnOfNibble[nibble];
      for (int64_t k = 0; k < m.k; ++k) put_bits(codes, k * m.n / 8 + word, 4 * nibble, m.code(row, k));
      for (int64_t g = 0; g < m.groups(); ++g) put_bits(zeros, g * m.n / 8 + word, 4 * nibble, m.zero(row, g));
    }
  }
  return {{module + ".qweight", "I32", {m.k, m.n / 8}, bytes_of_words(codes)},
          {module + ".qzeros", "I32", {m.groups(), m.n / 8}, bytes_of_words(zeros)},
          {module + ".scales", "F16", {m.groups(), m.n}, bytes_of_scales(m, true)}};
}

inline std::vector<FileTensor> as_gptq(const std::string& module, const TestIntegers& m, bool is_v2) {
  const int64_t per_word = 32 / m.bits;
  std::vector<uint32_t> codes(static_cast<size_t>(m.k / per_word * m.n));
  std::vector<uint32_t> zeros(static_cast<size_t>(m.groups() * m.n / per_word));
  std::vector<uint32_t> index;
  for (int64_t k = 0; k < m.k; ++k) {
    index.push_back(static_cast<uint32_t>(k / m.group));
    for (int64_t row = 0; row < m.n; ++row) {
      put_bits(codes, k / per_word * m.n + row, k % per_word * m.bits, m.code(row, k));
    }
  }
  for (int64_t g = 0; g < m.groups(); ++g) {
    for (int64_t row = 0; row < m.n; ++row) {
      const uint32_t zero = m.zero(row, g) - (is_v2 ? 0 : 1);
      put_bits(zeros, g * m.n / per_word + row / per_word, row % per_word * m.bits, zero);
    }
  }
  return {{module + ".qweight", "I32", {m.k / per_word, m.n}, bytes_of_words(codes)},
          {module + ".qzeros", "I32", {m.groups(), m.n / per_word}, bytes_of_words(zeros)},
          {module + ".scales", "F16", {m.groups(), m.n}, bytes_of_scales(m, true)},
          {module + ".g_idx", "I32", {m.k}, bytes_of_words(index)}};
}

// compressed-tensors "int-quantized" and, with offsets, ModelSlim's W8A8_DYNAMIC.
inline std::vector<FileTensor> as_bytes(const std::string& module, const TestIntegers& m, bool is_symmetric,
                                        bool has_offsets) {
  std::string codes;
  std::string zeros;
  for (const uint32_t code : m.codes) codes += static_cast<char>(static_cast<int>(code) - 128);
  for (const uint32_t zero : m.zeros) zeros += static_cast<char>(static_cast<int>(zero) - 128);
  std::vector<FileTensor> tensors{{module + ".weight", "I8", {m.n, m.k}, codes},
                                  {module + ".weight_scale", "F16", {m.n, m.groups()}, bytes_of_scales(m, false)}};
  if (!is_symmetric) tensors.push_back({module + ".weight_zero_point", "I8", {m.n, m.groups()}, zeros});
  if (has_offsets) {
    tensors.push_back({module + ".weight_offset", "F16", {m.n, 1}, std::string(static_cast<size_t>(m.n) * 2, '\0')});
  }
  return tensors;
}

// A quantization_config of compressed-tensors with one group for all linear layers.
inline std::string compressed_config(const std::string& format, int64_t bits, int64_t group, bool is_symmetric,
                                     bool rounds_activations) {
  return fmt::format(
      R"({{"quant_method": "compressed-tensors", "format": "{}", "ignore": ["lm_head", "re:.*mlp\\.gate$"],
          "config_groups": {{"group_0": {{"targets": ["Linear"], "input_activations": {},
            "weights": {{"num_bits": {}, "type": "int", "symmetric": {}, "strategy": "{}", "group_size": {}}}}}}}}})",
      format,
      rounds_activations ? R"({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true})"
                         : "null",
      bits, is_symmetric, group == 0 ? "channel" : "group", group == 0 ? "null" : std::to_string(group));
}

// config.json of a golden case with that quantization_config, or with none.
inline std::string config_with(const std::string& golden, const std::string& quantization) {
  std::string config = read_text(golden_path(golden) + "/config.json");
  if (quantization.empty()) return config;
  return replaced(config, "{", "{\"quantization_config\": " + quantization + ",");
}

// A golden case in which every linear layer but head and router is made of random integers, one group per row. `write`
// is one of the writers above.
inline void write_integer_model(
    const TempDir& dir, const std::string& golden, const std::string& quantization, int64_t bits, bool is_symmetric,
    const std::function<std::vector<FileTensor>(const std::string&, const TestIntegers&)>& write) {
  std::mt19937_64 random(31);
  std::vector<FileTensor> tensors;
  std::string description;
  for (const FileTensor& tensor : read_tensors(golden_path(golden) + "/model.safetensors")) {
    const bool is_linear = tensor.name.find("_proj") != std::string::npos && tensor.shape.size() == 2;
    if (!is_linear) {
      tensors.push_back(tensor);
      continue;
    }
    const std::string module = tensor.name.substr(0, tensor.name.rfind('.'));
    const TestIntegers matrix = random_integers(random, bits, tensor.shape[0], tensor.shape[1], 0, is_symmetric);
    for (const FileTensor& part : write(module, matrix)) tensors.push_back(part);
    description += fmt::format("{}\"{}.weight\": \"W8A8_DYNAMIC\"", description.empty() ? "" : ", ", module);
  }
  dir.write("config.json", config_with(golden, quantization));
  if (quantization.empty()) dir.write("quant_model_description.json", "{" + description + "}");
  dir.write("model.safetensors", safetensors_image(tensors));
}

}  // namespace tandem::model
