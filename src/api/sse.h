// Reading of server-sent events: bytes in any split, events out.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "src/base/result.h"

namespace tandem::api {

struct SseEvent {
  std::string event;  // empty: "message"
  std::string data;   // lines joined by '\n'
};

class SseParser {
 public:
  // An event longer than this is an error: the peer is broken or hostile.
  static constexpr size_t kMaxEventBytes = 16UL << 20;

  // Calls `on_event` for every event that `bytes` completes.
  Status feed(std::string_view bytes, const std::function<void(const SseEvent&)>& on_event);

 private:
  void take_line(std::string_view line, const std::function<void(const SseEvent&)>& on_event);

  std::string partial_line_;
  bool last_was_cr_ = false;  // a '\n' that follows belongs to the same line end
  bool has_data_ = false;
  SseEvent current_;
};

}  // namespace tandem::api
