// Text to token ids and back, as transformers does it for the same tokenizer.json and tokenizer_config.json, with one
// difference on purpose: encode() takes text that a user wrote, and no control token ever comes out of it.
#pragma once

#include <atomic>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"
#include "src/text/text_bundle.h"

struct tc_tokenizer;

namespace tandem::text {

// Bounds of one encoding.
struct EncodeLimits {
  // Text that certainly has more is refused before it is encoded: no token stands for more than a known number of bytes.
  int64_t max_tokens = std::numeric_limits<int64_t>::max();
  const std::atomic<bool>* stop = nullptr;  // another thread may set it during the call; it ends within milliseconds
};

// Any number of threads may use one tokenizer at once. It may be moved, not copied.
class Tokenizer {
 public:
  static Result<Tokenizer> create(const TextBundle& bundle);
  Tokenizer(Tokenizer&&) noexcept = default;
  Tokenizer& operator=(Tokenizer&&) noexcept = default;

  // Ids of `text` (UTF-8, of any content). A control token's text, such as "<|im_start|>", becomes ordinary tokens;
  // other added tokens, such as "<think>", are recognised. `add_special_tokens` adds BOS and the like as the model's
  // files say. Takes time linear in the text; the tokenizers of other makes than byte-level BPE take at most 4 MiB.
  // Errors: kInvalidArgument of "prompt", with code "context_length_exceeded" and a message that goes on after "the
  // prompt has" if it is over max_tokens; kAborted if it was stopped.
  Result<std::vector<TokenId>> encode(std::string_view text, bool add_special_tokens,
                                      const EncodeLimits& limits = {}) const;

  // Text of `ids`; ids without a token stand for nothing, invalid UTF-8 becomes U+FFFD.
  std::string decode(std::span<const TokenId> ids, bool skip_special_tokens) const;

  // The raw bytes that a token stands for, perhaps half a character; empty if `id` has no token. Lives as long as
  // *this.
  std::string_view token_bytes(TokenId id) const;
  // The same as text, invalid UTF-8 replaced: the `token` of log-probabilities.
  std::string token_text(TokenId id) const;

  // One past the highest id that has a token. Embedding tables may have more rows; those are never sampled.
  TokenId vocab_size() const { return vocab_size_; }
  std::optional<TokenId> bos_id() const { return bos_id_; }
  std::optional<TokenId> eos_id() const { return eos_id_; }
  // All ids that end an answer: eos_id() and those of config.json and generation_config.json. Ascending.
  const std::vector<TokenId>& stop_ids() const { return stop_ids_; }

  bool has_token(TokenId id) const;
  // Flagged special by the model: what skip_special_tokens drops.
  bool is_special(TokenId id) const;
  // Never made from user text: the special ones, and those that are spelled <|…|> or <｜…｜>.
  bool is_control(TokenId id) const;

  const tc_tokenizer* handle() const { return handle_.get(); }

 private:
  struct Free {
    void operator()(tc_tokenizer* tokenizer) const;
  };

  Tokenizer() = default;

  std::unique_ptr<tc_tokenizer, Free> handle_;
  TokenId vocab_size_ = 0;
  std::optional<TokenId> bos_id_;
  std::optional<TokenId> eos_id_;
  std::vector<TokenId> stop_ids_;
};

}  // namespace tandem::text
