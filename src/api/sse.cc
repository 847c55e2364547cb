#include "src/api/sse.h"

namespace tandem::api {
namespace {

// The first CR or LF. Two searches for one character each are many times faster than one for either.
size_t find_line_end(std::string_view bytes) {
  const size_t lf = bytes.find('\n');
  const size_t cr = bytes.substr(0, lf).find('\r');
  return cr != std::string_view::npos ? cr : lf;
}

}  // namespace

Status SseParser::feed(std::string_view bytes, const std::function<void(const SseEvent&)>& on_event) {
  while (!bytes.empty()) {
    if (last_was_cr_ && bytes[0] == '\n') {
      last_was_cr_ = false;
      bytes.remove_prefix(1);
      continue;
    }
    last_was_cr_ = false;
    const size_t end = find_line_end(bytes);
    const std::string_view piece = bytes.substr(0, end);
    if (partial_line_.size() + piece.size() + current_.data.size() > kMaxEventBytes) {
      return make_error(ErrorKind::kDataLoss, "a server-sent event is longer than the limit of {} bytes",
                        kMaxEventBytes);
    }
    if (end == std::string_view::npos) {
      partial_line_ += piece;
      return {};
    }
    if (partial_line_.empty()) {
      take_line(piece, on_event);
    } else {
      partial_line_ += piece;
      take_line(partial_line_, on_event);
      partial_line_.clear();
    }
    last_was_cr_ = bytes[end] == '\r';
    bytes.remove_prefix(end + 1);
  }
  return {};
}

void SseParser::take_line(std::string_view line, const std::function<void(const SseEvent&)>& on_event) {
  if (line.empty()) {
    if (has_data_) on_event(current_);
    current_.event.clear();
    current_.data.clear();
    has_data_ = false;
    return;
  }
  const size_t colon = line.find(':');
  const std::string_view field = line.substr(0, colon);
  std::string_view value = colon == std::string_view::npos ? std::string_view() : line.substr(colon + 1);
  if (!value.empty() && value[0] == ' ') value.remove_prefix(1);
  if (field == "data") {
    if (has_data_) current_.data += '\n';
    current_.data += value;
    has_data_ = true;
  } else if (field == "event") {
    current_.event = value;
  }  // comments (an empty field name), id and retry mean nothing here
}

}  // namespace tandem::api
