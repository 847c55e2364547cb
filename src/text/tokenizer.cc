#include "src/text/tokenizer.h"

#include <algorithm>

#include "src/base/check.h"
#include "src/text/textcore_call.h"

namespace tandem::text {
namespace {

using internal::Bytes;
using internal::Ids;

std::optional<TokenId> to_optional_id(int64_t id) {
  if (id < 0) return std::nullopt;
  return static_cast<TokenId>(id);
}

uint32_t flags_of(const tc_tokenizer* tokenizer, TokenId id) {
  return id < 0 ? 0 : tc_token_flags(tokenizer, static_cast<uint32_t>(id));
}

}  // namespace

void Tokenizer::Free::operator()(tc_tokenizer* tokenizer) const { tc_tokenizer_free(tokenizer); }

Result<Tokenizer> Tokenizer::create(const TextBundle& bundle) {
  tc_tokenizer* handle = nullptr;
  Bytes error;
  const int32_t status = tc_tokenizer_new(internal::to_slice(bundle.tokenizer_json),
                                          internal::to_slice(bundle.tokenizer_config_json), &handle, error.out());
  if (status != TC_OK) return internal::to_error(status, error, "");
  Tokenizer tokenizer;
  tokenizer.handle_.reset(handle);
  tc_tokenizer_info info{};
  tc_tokenizer_get_info(handle, &info);
  tokenizer.vocab_size_ = static_cast<TokenId>(info.vocab_size);
  tokenizer.bos_id_ = to_optional_id(info.bos);
  tokenizer.eos_id_ = to_optional_id(info.eos);
  TANDEM_ASSIGN(tokenizer.stop_ids_, bundle.read_eos_ids());
  std::vector<TokenId>& stops = tokenizer.stop_ids_;
  if (tokenizer.eos_id_ && !std::binary_search(stops.begin(), stops.end(), *tokenizer.eos_id_)) {
    stops.insert(std::upper_bound(stops.begin(), stops.end(), *tokenizer.eos_id_), *tokenizer.eos_id_);
  }
  return tokenizer;
}

Result<std::vector<TokenId>> Tokenizer::encode(std::string_view text, bool add_special_tokens,
                                               const EncodeLimits& limits) const {
  Ids ids;
  Bytes error;
  const tc_limits bounds = internal::to_c_limits(limits);
  const int32_t status =
      tc_encode(handle_.get(), internal::to_slice(text), add_special_tokens, &bounds, ids.out(), error.out());
  if (status != TC_OK) return internal::to_error(status, error, "prompt");
  return ids.take();
}

std::string Tokenizer::decode(std::span<const TokenId> ids, bool skip_special_tokens) const {
  // A negative id becomes one beyond any vocabulary, which stands for nothing.
  static_assert(sizeof(TokenId) == sizeof(uint32_t));
  Bytes text;
  Bytes error;
  const int32_t status = tc_decode(handle_.get(), reinterpret_cast<const uint32_t*>(ids.data()), ids.size(),
                                   skip_special_tokens, text.out(), error.out());
  internal::check_ok(status, error);
  return std::string(text.view());
}

std::string_view Tokenizer::token_bytes(TokenId id) const {
  if (id < 0) return {};
  return internal::to_view(tc_token_bytes(handle_.get(), static_cast<uint32_t>(id)));
}

std::string Tokenizer::token_text(TokenId id) const {
  Bytes text;
  Bytes error;
  internal::check_ok(tc_token_text(handle_.get(), static_cast<uint32_t>(id), text.out(), error.out()), error);
  return std::string(text.view());
}

bool Tokenizer::has_token(TokenId id) const { return (flags_of(handle_.get(), id) & TC_TOKEN_KNOWN) != 0; }
bool Tokenizer::is_special(TokenId id) const { return (flags_of(handle_.get(), id) & TC_TOKEN_SPECIAL) != 0; }
bool Tokenizer::is_control(TokenId id) const { return (flags_of(handle_.get(), id) & TC_TOKEN_CONTROL) != 0; }

}  // namespace tandem::text
