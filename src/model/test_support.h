// Helpers of the model tests: temporary folders, handmade safetensors files, and running sequences through a model.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "src/kernels/convert.h"
#include "src/model/model.h"
#include "src/model/safetensors.h"

namespace tandem::model {

class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "tandem-model-XXXXXX").string();
    CHECK(mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string write(const std::string& name, std::string_view content) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << content;
    return path_ + "/" + name;
  }

 private:
  std::string path_;
};

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good());
  return {std::istreambuf_iterator<char>(file), {}};
}

inline std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  CHECK_NE(at, std::string::npos);
  return text.replace(at, from.size(), to);
}

// A safetensors file image from a header and its data.
inline std::string safetensors_image(const std::string& header, const std::string& data) {
  const uint64_t size = header.size();
  std::string image(reinterpret_cast<const char*>(&size), sizeof size);
  return image + header + data;
}

struct FileTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::string data;
};

inline std::string safetensors_image(const std::vector<FileTensor>& tensors) {
  std::string header = "{";
  std::string data;
  for (const FileTensor& tensor : tensors) {
    std::string shape;
    for (const int64_t dim : tensor.shape) shape += (shape.empty() ? "" : ",") + std::to_string(dim);
    if (header.size() > 1) header += ",";
    header += fmt::format(R"("{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", tensor.name, tensor.dtype,
                          shape, data.size(), data.size() + tensor.data.size());
    data += tensor.data;
  }
  return safetensors_image(header + "}", data);
}

// The tensors of a file, ready to be changed and written again.
inline std::vector<FileTensor> read_tensors(const std::string& path) {
  const std::string image = read_text(path);
  const std::vector<StoredTensor> stored = parse_safetensors(std::as_bytes(std::span(image)), path).value();
  std::vector<FileTensor> tensors;
  for (const StoredTensor& tensor : stored) {
    tensors.push_back({tensor.name, std::string(tensor.dtype), tensor.shape,
                       std::string(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size())});
  }
  return tensors;
}

inline FileTensor& find_tensor(std::vector<FileTensor>& tensors, const std::string& name) {
  for (FileTensor& tensor : tensors) {
    if (tensor.name == name) return tensor;
  }
  fail_check(__FILE__, __LINE__, "no tensor " + name);
}

inline std::string golden_path(const std::string& name) {
  return std::string(TANDEM_SOURCE_DIR) + "/tests/golden/" + name;
}

// Part of one sequence in a step.
struct Piece {
  size_t sequence = 0;
  int32_t num_rows = 0;
  bool is_prompt = true;
};

// Some sequences with their blocks, and the logits of every row computed so far.
class Sequences {
 public:
  using Logits = std::vector<std::vector<float>>;  // [position][vocab]

  Sequences(kernels::Ops& ops, Model& model, std::vector<std::vector<TokenId>> tokens, uint64_t block_order_seed = 0)
      : model_(model), tokens_(std::move(tokens)), logits_(tokens_.size()), blocks_(tokens_.size()) {
    const int64_t block_size = model.info().kv.block_size;
    int32_t num_blocks = 3;  // some that nobody uses
    for (const std::vector<TokenId>& sequence : tokens_) {
      num_blocks += static_cast<int32_t>((static_cast<int64_t>(sequence.size()) + block_size - 1) / block_size);
    }
    std::vector<int32_t> order(static_cast<size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(block_order_seed);
    if (block_order_seed != 0) std::shuffle(order.begin(), order.end(), random);
    size_t next = 0;
    for (size_t i = 0; i < tokens_.size(); ++i) {
      for (size_t covered = 0; covered < tokens_[i].size(); covered += static_cast<size_t>(block_size)) {
        blocks_[i].push_back(BlockId(order[next++]));
      }
    }
    cache_ = std::make_unique<KvCache>(ops, model.info().kv, num_blocks);
  }

  const Logits& logits(size_t sequence) const { return logits_[sequence]; }
  KvCache& cache() { return *cache_; }
  const std::vector<BlockId>& blocks(size_t sequence) const { return blocks_[sequence]; }

  void set_token(size_t sequence, size_t position, TokenId token) { tokens_[sequence][position] = token; }

  // From now on steps of two rows or more are computed in two parts, cut anywhere.
  void split_steps(uint64_t seed) { splits_.emplace(seed); }

  // Computes the next rows of each named sequence in one step.
  void step(const std::vector<Piece>& pieces, const LayerDone& on_layer_done = {}) {
    Batch batch;
    for (const Piece& piece : pieces) {
      const std::vector<TokenId>& tokens = tokens_[piece.sequence];
      const int32_t first = static_cast<int32_t>(logits_[piece.sequence].size());
      Chunk chunk;
      chunk.first_row = static_cast<int32_t>(batch.tokens.size());
      chunk.num_rows = piece.num_rows;
      chunk.first_position = first;
      chunk.is_prompt = piece.is_prompt;
      chunk.blocks = blocks_[piece.sequence];
      batch.chunks.push_back(chunk);
      for (int32_t i = 0; i < piece.num_rows; ++i) {
        batch.logit_rows.push_back(static_cast<int32_t>(batch.tokens.size()));
        batch.tokens.push_back(tokens[static_cast<size_t>(first + i)]);
      }
    }
    if (splits_ && batch.tokens.size() >= 2) {
      batch.split_row = 1 + static_cast<int32_t>((*splits_)() % (batch.tokens.size() - 1));
    }
    CHECK(model_.forward(batch, *cache_, on_layer_done).ok());
    size_t row = 0;
    for (const Piece& piece : pieces) {
      for (int32_t i = 0; i < piece.num_rows; ++i) {
        const std::span<const float> values = model_.logits(row++);
        logits_[piece.sequence].emplace_back(values.begin(), values.end());
      }
    }
  }

  // Computes the first `prompt` tokens of a sequence in chunks of `prompt_chunk`, the rest as generated tokens in
  // chunks of `generated_chunk`.
  void run(size_t sequence, int32_t prompt, int32_t prompt_chunk, int32_t generated_chunk = 1) {
    const int32_t total = static_cast<int32_t>(tokens_[sequence].size());
    for (int32_t at = 0; at < total;) {
      const bool is_prompt = at < prompt;
      const int32_t rows = is_prompt ? std::min(prompt_chunk, prompt - at) : std::min(generated_chunk, total - at);
      step({{sequence, rows, is_prompt}});
      at += rows;
    }
  }

 private:
  Model& model_;
  std::vector<std::vector<TokenId>> tokens_;
  std::vector<Logits> logits_;
  std::vector<std::vector<BlockId>> blocks_;
  std::unique_ptr<KvCache> cache_;
  std::optional<std::mt19937_64> splits_;
};

inline LoadOptions golden_options(const std::string& path, ComputeType compute) {
  LoadOptions options;
  options.path = path;
  options.compute = compute;
  options.max_num_batched_tokens = 256;
  options.max_num_seqs = 256;
  options.block_size = 8;
  return options;
}

inline std::unique_ptr<kernels::Ops> must_make_ops(const std::string& backend, int threads = 1) {
  Result<std::unique_ptr<kernels::Ops>> ops = kernels::make_ops(backend, threads);
  CHECK(ops.ok());
  return std::move(ops).value();
}

// Fails the test and stops the process with the message if the model cannot be loaded.
inline std::unique_ptr<Model> must_load(kernels::Ops& ops, const LoadOptions& options) {
  return load_model(ops, options).value();
}

inline TokenId argmax(std::span<const float> logits) {
  return static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace tandem::model
