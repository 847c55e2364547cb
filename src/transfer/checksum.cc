#include "src/transfer/checksum.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace tandem::transfer {
namespace {

// Odd, so that multiplication modulo 2^64 can be undone; digits of the golden ratio and of the square root of 3.
constexpr uint64_t kMultiplier = 0x9e3779b97f4a7c15;
constexpr uint64_t kStart = 0xbb67ae8584caa73b;
constexpr size_t kLaneBytes = sizeof(uint64_t);
constexpr size_t kRowBytes = 8 * kLaneBytes;
constexpr size_t kStepRows = 8;  // between two fetches
constexpr size_t kPrefetchBytes = 4096;

uint64_t mix(uint64_t state, uint64_t word) { return std::rotl(state ^ word, 29) * kMultiplier; }

uint64_t load(const std::byte* address) {
  uint64_t word = 0;
  std::memcpy(&word, address, sizeof word);
  return word;
}

// Eight chains, because one step takes five cycles; named variables, because the compiler keeps those in registers.
struct Lanes {
  uint64_t a = kStart, b = kStart + 1, c = kStart + 2, d = kStart + 3;
  uint64_t e = kStart + 4, f = kStart + 5, g = kStart + 6, h = kStart + 7;
};

Lanes add_rows(Lanes lanes, const std::byte* row, size_t num_rows) {
  for (; num_rows > 0; --num_rows, row += kRowBytes) {
    lanes.a = mix(lanes.a, load(row));
    lanes.b = mix(lanes.b, load(row + 1 * kLaneBytes));
    lanes.c = mix(lanes.c, load(row + 2 * kLaneBytes));
    lanes.d = mix(lanes.d, load(row + 3 * kLaneBytes));
    lanes.e = mix(lanes.e, load(row + 4 * kLaneBytes));
    lanes.f = mix(lanes.f, load(row + 5 * kLaneBytes));
    lanes.g = mix(lanes.g, load(row + 6 * kLaneBytes));
    lanes.h = mix(lanes.h, load(row + 7 * kLaneBytes));
  }
  return lanes;
}

// The sender's bytes come from memory, where each piece is a new place that the processor cannot foresee. This runs ahead
// of the sum over all pieces, and fetches nothing that belongs to none.
class Fetcher {
 public:
  explicit Fetcher(std::span<const std::span<const std::byte>> pieces) : pieces_(pieces) { advance(kPrefetchBytes); }
  void advance(size_t bytes) {
    while (bytes > 0 && next_ < pieces_.size()) {
      const std::span<const std::byte> piece = pieces_[next_];
      const size_t count = std::min(bytes, piece.size() - offset_);
      for (size_t at = 0; at < count; at += kRowBytes) __builtin_prefetch(piece.data() + offset_ + at);
      bytes -= count;
      offset_ += count;
      if (offset_ < piece.size()) return;
      ++next_;
      offset_ = 0;
    }
  }

 private:
  std::span<const std::span<const std::byte>> pieces_;
  size_t next_ = 0;
  size_t offset_ = 0;  // into the next piece
};

// `rest` are the last bytes, less than a row, and zeros behind them.
uint64_t finish(Lanes lanes, const std::array<std::byte, kRowBytes>& rest, size_t size) {
  lanes = add_rows(lanes, rest.data(), 1);
  uint64_t sum = mix(kStart, size);
  for (uint64_t lane : {lanes.a, lanes.b, lanes.c, lanes.d, lanes.e, lanes.f, lanes.g, lanes.h}) sum = mix(sum, lane);
  return sum ^ (sum >> 32);
}

}  // namespace

uint64_t checksum(std::span<const std::byte> data) { return checksum(std::span(&data, 1)); }

uint64_t checksum(std::span<const std::span<const std::byte>> pieces) {
  Lanes lanes;
  std::array<std::byte, kRowBytes> rest{};
  size_t in_rest = 0;
  size_t size = 0;
  Fetcher fetcher(pieces);
  for (std::span<const std::byte> piece : pieces) {
    size += piece.size();
    if (in_rest > 0) {  // fill up the row that the piece before has begun
      const size_t count = std::min(kRowBytes - in_rest, piece.size());
      fetcher.advance(count);
      std::copy_n(piece.begin(), count, rest.begin() + static_cast<ptrdiff_t>(in_rest));
      in_rest += count;
      piece = piece.subspan(count);
      if (in_rest < kRowBytes) continue;
      lanes = add_rows(lanes, rest.data(), 1);
      in_rest = 0;
    }
    while (piece.size() >= kRowBytes) {
      const size_t num_rows = std::min(piece.size() / kRowBytes, kStepRows);
      fetcher.advance(num_rows * kRowBytes);
      lanes = add_rows(lanes, piece.data(), num_rows);
      piece = piece.subspan(num_rows * kRowBytes);
    }
    fetcher.advance(piece.size());
    std::copy(piece.begin(), piece.end(), rest.begin());
    in_rest = piece.size();
  }
  std::fill(rest.begin() + static_cast<ptrdiff_t>(in_rest), rest.end(), std::byte{0});
  return finish(lanes, rest, size);
}

}  // namespace tandem::transfer
