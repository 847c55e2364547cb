// A model for tests whose "KV" of a token is the token itself and whose next token is a pure function of all tokens it
// finds in the cache: any mistake with blocks, positions or chunks changes the output.
#pragma once

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#include "src/base/check.h"
#include "src/model/model.h"

namespace tandem::engine {

class FakeModel final : public model::Model {
 public:
  static constexpr int64_t kVocab = 97;
  static constexpr int64_t kLayers = 3;

  explicit FakeModel(int64_t max_model_len = 256, int64_t block_size = 4) {
    info_.architecture = "Fake";
    info_.vocab_size = kVocab;
    info_.max_model_len = max_model_len;
    info_.kv.kind = model::KvKind::kMla;
    info_.kv.num_layers = kLayers;
    info_.kv.block_size = block_size;
    info_.kv.bytes_per_token = sizeof(TokenId);
    info_.kv.dtype = kernels::DType::kI32;
    info_.kv.latent_dim = 1;
    info_.fingerprint = "fake";
  }

  const model::ModelInfo& info() const override { return info_; }
  model::ModelInfo& mutable_info() { return info_; }

  // The token after `tokens`.
  static TokenId next_token(const std::vector<TokenId>& tokens) {
    uint64_t state = 1469598103934665603;
    for (TokenId token : tokens) state = (state ^ static_cast<uint64_t>(token)) * uint64_t{1099511628211};
    return static_cast<TokenId>((state >> 20) % kVocab);
  }

  static std::vector<TokenId> generate(std::vector<TokenId> prompt, int64_t count) {
    std::vector<TokenId> output;
    for (int64_t i = 0; i < count; ++i) {
      output.push_back(next_token(prompt));
      prompt.push_back(output.back());
    }
    return output;
  }

  Status forward(const model::Batch& batch, model::KvCache& cache, const model::LayerDone& on_layer_done) override {
    if (before_forward) before_forward(batch);
    if (delay_us.load() > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us.load()));
    for (int layer = 0; layer < kLayers; ++layer) {
      for (const model::Chunk& chunk : batch.chunks) {
        for (int32_t i = 0; i < chunk.num_rows; ++i) {
          const TokenId token = batch.tokens[static_cast<size_t>(chunk.first_row + i)];
          std::memcpy(place(cache, chunk, layer, chunk.first_position + i), &token, sizeof token);
        }
      }
      if (on_layer_done) on_layer_done(layer);
    }
    logits_.clear();
    size_t wanted = 0;
    for (const model::Chunk& chunk : batch.chunks) {
      for (int32_t i = 0; i < chunk.num_rows; ++i) {
        if (wanted == batch.logit_rows.size() || batch.logit_rows[wanted] != chunk.first_row + i) continue;
        ++wanted;
        std::vector<TokenId> tokens;
        for (int32_t position = 0; position <= chunk.first_position + i; ++position) {
          TokenId first = 0;
          for (int layer = 0; layer < kLayers; ++layer) {
            TokenId token = 0;
            std::memcpy(&token, place(cache, chunk, layer, position), sizeof token);
            if (layer == 0) first = token;
            CHECK_EQ(token, first);
          }
          tokens.push_back(first);
        }
        std::vector<float> row(kVocab, 0.0F);
        row[static_cast<size_t>(next_token(tokens))] = 10.0F;
        if (poison.load() == tokens.back()) row[0] = std::numeric_limits<float>::quiet_NaN();
        logits_.push_back(std::move(row));
      }
    }
    return {};
  }

  std::span<const float> logits(size_t index) const override { return logits_.at(index); }

  std::function<void(const model::Batch&)> before_forward;  // set before the engine starts; called on its thread
  std::atomic<int64_t> delay_us{0};
  std::atomic<TokenId> poison{-1};  // a sequence that ends in this token gets NaN logits

 private:
  std::byte* place(const model::KvCache& cache, const model::Chunk& chunk, int layer, int32_t position) const {
    const int64_t block_size = info_.kv.block_size;
    const BlockId block = chunk.blocks.at(static_cast<size_t>(position / block_size));
    return cache.block_address(layer, block) + (position % block_size) * info_.kv.bytes_per_token;
  }

  model::ModelInfo info_;
  std::vector<std::vector<float>> logits_;
};

}  // namespace tandem::engine
