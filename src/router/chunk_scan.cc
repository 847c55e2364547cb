#include "src/router/chunk_scan.h"

#include <cstring>
#include <limits>

namespace tandem::router {
namespace {

constexpr int kMaxDigits = 18;  // of a number that surely fits into 64 bits

// Walks over the text once. Every member returns false for what it does not know; then the whole scan is given up.
class Scanner {
 public:
  explicit Scanner(std::string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

  bool at_end() {
    skip_spaces();
    return at_ == end_;
  }

  // The next character that is not a space; NUL at the end.
  char peek() {
    skip_spaces();
    return at_ == end_ ? '\0' : *at_;
  }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  bool take_word(std::string_view word) {
    skip_spaces();
    if (static_cast<size_t>(end_ - at_) < word.size() || std::memcmp(at_, word.data(), word.size()) != 0) return false;
    at_ += word.size();
    return true;
  }

  bool take_string(std::string_view& out) {
    if (!take('"')) return false;
    const char* const begin = at_;
    for (; at_ != end_; ++at_) {
      const char c = *at_;
      if (c == '"') {
        out = std::string_view(begin, static_cast<size_t>(at_ - begin));
        ++at_;
        return true;
      }
      if (c < ' ' || c == '\\' || c == 0x7f) return false;  // char is signed here: bytes from 0x80 are below ' '
    }
    return false;
  }

  bool take_integer(int64_t& out) {
    skip_spaces();
    const char* const begin = at_;
    int64_t value = 0;
    for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
      if (at_ - begin == kMaxDigits) return false;
      value = value * 10 + (*at_ - '0');
    }
    if (at_ == begin || (*begin == '0' && at_ - begin > 1)) return false;
    if (at_ != end_ && (*at_ == '.' || *at_ == 'e' || *at_ == 'E')) return false;
    out = value;
    return true;
  }

  // null, true, false, a plain string or a plain integer, whatever it is.
  bool skip_scalar() {
    const char c = peek();
    std::string_view text;
    int64_t number = 0;
    if (c == '"') return take_string(text);
    if (c == 'n') return take_word("null");
    if (c == 't') return take_word("true");
    if (c == 'f') return take_word("false");
    return take_integer(number);
  }

  // `on_field` takes the value of the field it is given.
  template <typename F>
  bool take_object(F on_field) {
    if (!take('{')) return false;
    if (take('}')) return true;
    do {
      std::string_view name;
      if (!take_string(name) || !take(':') || !on_field(name)) return false;
    } while (take(','));
    return take('}');
  }

 private:
  void skip_spaces() {
    while (at_ != end_ && *at_ == ' ') ++at_;
  }

  const char* at_;
  const char* const end_;
};
static_assert(std::numeric_limits<char>::is_signed);

// True the first time only.
bool mark(uint32_t& seen, uint32_t bit) {
  const bool is_new = (seen & bit) == 0;
  seen |= bit;
  return is_new;
}

bool take_optional_integer(Scanner& scanner, std::optional<int64_t>& out) {
  if (scanner.peek() < '0' || scanner.peek() > '9') return scanner.skip_scalar();  // of another type: not given
  int64_t value = 0;
  if (!scanner.take_integer(value)) return false;
  out = value;
  return true;
}

bool take_usage(Scanner& scanner, ChunkFields& out) {
  if (scanner.peek() != '{') return scanner.skip_scalar();
  out.has_usage = true;
  uint32_t seen = 0;
  const auto on_detail = [&](std::string_view name) {
    if (name != "cached_tokens") return scanner.skip_scalar();
    return mark(seen, 1) && take_optional_integer(scanner, out.cached_tokens);
  };
  return scanner.take_object([&](std::string_view name) {
    if (name == "prompt_tokens") return mark(seen, 2) && take_optional_integer(scanner, out.prompt_tokens);
    if (name != "prompt_tokens_details") return scanner.skip_scalar();
    if (!mark(seen, 4)) return false;
    return scanner.peek() == '{' ? scanner.take_object(on_detail) : scanner.skip_scalar();
  });
}

bool take_token_ids(Scanner& scanner, ChunkFields& out) {
  if (scanner.take_word("null")) return true;
  if (!scanner.take('[')) return false;
  if (scanner.take(']')) return true;
  do {
    int64_t id = 0;
    if (!scanner.take_integer(id) || id > std::numeric_limits<TokenId>::max()) return false;
    out.tokens.push_back({.token = static_cast<TokenId>(id), .logprob = 0, .top_logprobs = {}});
  } while (scanner.take(','));
  return scanner.take(']');
}

bool take_choice(Scanner& scanner, ChunkFields& out) {
  out.has_choice = true;
  uint32_t seen = 0;
  return scanner.take_object([&](std::string_view name) {
    if (name == "token_ids") return mark(seen, 1) && take_token_ids(scanner, out);
    if (name == "stop_reason") return mark(seen, 2) && take_optional_integer(scanner, out.stop_reason);
    if (name != "finish_reason") return scanner.skip_scalar();
    if (!mark(seen, 4)) return false;
    if (scanner.peek() != '"') return scanner.skip_scalar();
    std::string_view reason;
    if (!scanner.take_string(reason)) return false;
    out.finish = finish_of_name(reason);
    return true;
  });
}

bool take_choices(Scanner& scanner, ChunkFields& out) {
  if (!scanner.take('[')) return false;
  if (scanner.take(']')) return true;
  return take_choice(scanner, out) && scanner.take(']');
}

}  // namespace

std::optional<engine::FinishReason> finish_of_name(std::string_view name) {
  if (name.empty()) return std::nullopt;
  if (name == "stop") return engine::FinishReason::kStop;
  if (name == "length") return engine::FinishReason::kLength;
  if (name == "abort") return engine::FinishReason::kAbort;
  return engine::FinishReason::kError;
}

std::optional<ChunkFields> scan_chunk(std::string_view text) {
  Scanner scanner(text);
  ChunkFields out;
  uint32_t seen = 0;
  const bool known = scanner.take_object([&](std::string_view name) {
    if (name == "choices") return mark(seen, 1) && take_choices(scanner, out);
    if (name == "usage") return mark(seen, 2) && take_usage(scanner, out);
    return scanner.skip_scalar();  // an object, as of an error or of kv_transfer_params, is not one
  });
  if (!known || !scanner.at_end()) return std::nullopt;
  return out;
}

}  // namespace tandem::router
