#include "src/base/trace.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "src/base/clock.h"

namespace tandem {
namespace {

constexpr std::string_view kDigits = "0123456789abcdef";

template <size_t N>
void append_hex(std::string& out, const std::array<uint8_t, N>& bytes) {
  for (const uint8_t byte : bytes) {
    out += kDigits[byte >> 4U];
    out += kDigits[byte & 15U];
  }
}

// Lower-case hex only, as the standard demands.
template <size_t N>
bool read_hex(std::string_view text, std::array<uint8_t, N>& out) {
  for (size_t i = 0; i < N; ++i) {
    const size_t high = kDigits.find(text[2 * i]);
    const size_t low = kDigits.find(text[2 * i + 1]);
    if (high == std::string_view::npos || low == std::string_view::npos) return false;
    out[i] = static_cast<uint8_t>(high << 4U | low);
  }
  return true;
}

template <size_t N>
void draw(std::array<uint8_t, N>& bytes) {
  for (size_t i = 0; i < N; i += sizeof(uint64_t)) {
    const uint64_t word = random_u64();
    std::memcpy(bytes.data() + i, &word, sizeof word);
  }
}

template <size_t N>
bool is_zero(const std::array<uint8_t, N>& bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == 0; });
}

}  // namespace

bool TraceContext::is_valid() const { return !is_zero(trace_id) && !is_zero(span_id); }

std::string TraceContext::traceparent() const {
  std::string out = "00-";
  append_hex(out, trace_id);
  out += '-';
  append_hex(out, span_id);
  return out + (sampled ? "-01" : "-00");
}

std::optional<TraceContext> parse_traceparent(std::string_view text) {
  constexpr size_t kLength = 55;  // of version 00; later ones may have more behind it
  if (text.size() < kLength || text[2] != '-' || text[35] != '-' || text[52] != '-') return std::nullopt;
  std::array<uint8_t, 1> version{};
  std::array<uint8_t, 1> flags{};
  TraceContext context;
  if (!read_hex(text, version) || !read_hex(text.substr(3), context.trace_id) ||
      !read_hex(text.substr(36), context.span_id) || !read_hex(text.substr(53), flags)) {
    return std::nullopt;
  }
  const bool has_more = text.size() > kLength;
  if (version[0] == 0xff || (version[0] == 0 && has_more) || (has_more && text[kLength] != '-')) return std::nullopt;
  context.sampled = (flags[0] & 1U) != 0;
  if (!context.is_valid()) return std::nullopt;
  return context;
}

TraceContext child_of(const TraceContext& parent) {
  TraceContext child = parent;
  if (!parent.is_valid()) {
    draw(child.trace_id);
    child.sampled = true;
  }
  draw(child.span_id);
  return child;
}

int64_t wall_us(int64_t steady_us, int64_t now_us) {
  const auto since_epoch = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::microseconds>(since_epoch).count() - (now_us - steady_us);
}

}  // namespace tandem
