// Token ids to text, one at a time: each push returns the text that is certain by now, in whole characters only. All
// pieces together are exactly Tokenizer::decode of all ids. Bounded state, and time linear in the text.
#pragma once

#include <memory>
#include <string_view>

#include "src/base/ids.h"
#include "src/text/tokenizer.h"

struct tc_stream;

namespace tandem::text {

struct StreamOptions {
  bool skip_special_tokens = true;
  // The text goes on after a prompt: rules for the start of a text (SentencePiece drops its first space) do not apply.
  // Pieces then equal decode() but for that.
  bool continues = false;
};

// Used by one thread at a time. Keeps what it needs of the tokenizer, which may be destroyed before it.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, StreamOptions options);

  // The text that became certain with `id`; valid until the next call.
  std::string_view push(TokenId id);
  // What is still held back (an unfinished character as U+FFFD). Nothing may be pushed after it.
  std::string_view finish();

 private:
  struct Free {
    void operator()(tc_stream* stream) const;
  };

  std::unique_ptr<tc_stream, Free> handle_;
  bool finished_ = false;
};

}  // namespace tandem::text
