// Spans of distributed traces: W3C trace context in and out, and a place to put finished spans. What a span is called
// and which attributes it has is the caller's business; src/api/otlp_exporter.h sends them away.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace tandem {

// Which span something happens in (https://www.w3.org/TR/trace-context/). Not valid: nobody traces.
struct TraceContext {
  std::array<uint8_t, 16> trace_id{};
  std::array<uint8_t, 8> span_id{};
  bool sampled = false;

  bool is_valid() const;
  std::string traceparent() const;  // "00-<32 hex>-<16 hex>-01"
  bool operator==(const TraceContext&) const = default;
};

// The value of a traceparent header; nothing if it is not one of version 00 … fe with ids that are not zero.
std::optional<TraceContext> parse_traceparent(std::string_view text);
// A span of the same trace, or of a new one if `parent` is not valid.
TraceContext child_of(const TraceContext& parent);

using SpanValue = std::variant<int64_t, double, std::string>;

struct Span {
  std::string name;
  TraceContext context;
  std::array<uint8_t, 8> parent{};  // zero: none
  bool is_server = false;           // else internal, or client if is_client
  bool is_client = false;
  int64_t start_us = 0;  // since 1970
  int64_t end_us = 0;
  std::vector<std::pair<std::string, SpanValue>> attributes;
  std::string error;  // empty: it went well
};

// µs since 1970 of a moment of the steady clock, `now_us` being the steady clock's present.
int64_t wall_us(int64_t steady_us, int64_t now_us);

class SpanSink {
 public:
  virtual ~SpanSink() = default;
  // From any thread; does not block.
  virtual void add(Span span) = 0;
};

}  // namespace tandem
