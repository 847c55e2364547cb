// Messages to a prompt, by the model's own Jinja template, as transformers' apply_chat_template does it. Control tokens
// in the prompt come from the template alone: text of the request that looks like one is encoded as ordinary text.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/base/ids.h"
#include "src/base/result.h"
#include "src/text/text_bundle.h"
#include "src/text/tokenizer.h"

struct tc_template;

namespace tandem::text {

// JSON texts; they must keep the order in which the client wrote the members, because templates print objects.
struct ChatRequest {
  std::string_view messages;     // list of objects with role, content …
  std::string_view tools = {};   // list of objects, or empty
  std::string_view kwargs = {};  // object: more variables for the template (chat_template_kwargs), or empty
  bool add_generation_prompt = true;
  bool continue_final_message = false;  // excludes add_generation_prompt
};

struct EncodedChat {
  std::vector<TokenId> ids;
  std::string text;  // what the ids stand for
};

// Compiled once; any number of threads may use it at once. Keeps what it needs of the tokenizer.
class ChatTemplate {
 public:
  // kUnsupported if the model has no template, kDataLoss if it does not compile.
  static Result<ChatTemplate> create(const TextBundle& bundle, const Tokenizer& tokenizer);
  ChatTemplate(ChatTemplate&&) noexcept = default;
  ChatTemplate& operator=(ChatTemplate&&) noexcept = default;

  // Errors: kInvalidArgument of "messages" if the template raises or does not render these messages, with its own words
  // where it gives any; also if it takes too many steps, too much memory or puts out too much.
  Result<std::string> render(const ChatRequest& request) const;
  // The same, and the ids of it. The template writes BOS itself, so none is added. `limits` are as Tokenizer::encode
  // has them, and so are the errors they lead to; they hold for the rendered text.
  Result<EncodedChat> encode(const ChatRequest& request, const EncodeLimits& limits = {}) const;

 private:
  struct Free {
    void operator()(tc_template* chat) const;
  };

  ChatTemplate() = default;

  std::unique_ptr<tc_template, Free> handle_;
};

}  // namespace tandem::text
