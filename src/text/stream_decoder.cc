#include "src/text/stream_decoder.h"

#include "src/base/check.h"
#include "src/text/textcore_call.h"

namespace tandem::text {

using internal::Bytes;

void StreamDecoder::Free::operator()(tc_stream* stream) const { tc_stream_free(stream); }

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, StreamOptions options) {
  tc_stream* handle = nullptr;
  Bytes error;
  const int32_t status =
      tc_stream_new(tokenizer.handle(), options.skip_special_tokens, options.continues, &handle, error.out());
  internal::check_ok(status, error);
  handle_.reset(handle);
}

std::string_view StreamDecoder::push(TokenId id) {
  CHECK(!finished_);
  tc_slice text{};
  Bytes error;
  internal::check_ok(tc_stream_push(handle_.get(), static_cast<uint32_t>(id), &text, error.out()), error);
  return internal::to_view(text);
}

std::string_view StreamDecoder::finish() {
  CHECK(!finished_);
  finished_ = true;
  tc_slice text{};
  Bytes error;
  internal::check_ok(tc_stream_finish(handle_.get(), &text, error.out()), error);
  return internal::to_view(text);
}

}  // namespace tandem::text
