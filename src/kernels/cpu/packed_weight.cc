#include "src/kernels/cpu/packed_weight.h"

#include <algorithm>
#include <array>

#include "src/base/check.h"
#include "src/kernels/convert.h"
#include "src/kernels/host_matrix.h"

namespace tandem::kernels::cpu {
namespace {

constexpr int64_t kPackDepth = 256;  // k per piece: a panel's rows of one piece fit in L1 before they are interleaved

int64_t panel_bytes_of(int64_t k, const WeightFormat& format) {
  if (format == kF32Weights) return k * kPanelWidth * int64_t{sizeof(float)};
  return round_up(k, 2) * kPanelWidth * int64_t{sizeof(uint16_t)};
}

int64_t packed_bytes(std::span<const HostMatrix> matrices, const WeightFormat& format) {
  const int64_t panels = (matrices[0].n + kPanelWidth - 1) / kPanelWidth;
  return static_cast<int64_t>(matrices.size()) * panels * panel_bytes_of(matrices[0].k, format);
}

}  // namespace

PackedWeight::PackedWeight(std::span<const HostMatrix> matrices, const WeightFormat& format, ThreadPool& pool)
    : batch_(static_cast<int64_t>(matrices.size())),
      n_(matrices[0].n),
      k_(matrices[0].k),
      format_(format),
      buffer_(packed_bytes(matrices, format)) {
  pool.run(batch_ * panels(), [&](int64_t index, int /*worker*/) {
    const HostMatrix& matrix = matrices[static_cast<size_t>(index / panels())];
    pack_panel(matrix, index % panels(), buffer_.address() + index * panel_bytes());
  });
}

int64_t PackedWeight::panel_bytes() const { return panel_bytes_of(k_, format_); }

void PackedWeight::pack_panel(const HostMatrix& matrix, int64_t index, std::byte* panel) const {
  const int64_t first = index * kPanelWidth;
  const int64_t lanes = std::min(kPanelWidth, n_ - first);
  for (int64_t k = 0; k < k_; k += kPackDepth) {
    const int64_t depth = std::min(kPackDepth, k_ - k);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (format_ == kF32Weights) {
        std::array<float, kPackDepth> row;
        decode_row(matrix, first + lane, k, depth, row.data());
        float* out = reinterpret_cast<float*>(panel) + k * kPanelWidth + lane;
        for (int64_t i = 0; i < depth; ++i) out[i * kPanelWidth] = row[static_cast<size_t>(i)];
      } else {
        std::array<uint16_t, kPackDepth> row;
        decode_row_bf16(matrix, first + lane, k, depth, row.data());
        uint16_t* out = reinterpret_cast<uint16_t*>(panel) + k * kPanelWidth + lane * 2;
        for (int64_t i = 0; i < depth; ++i) {
          out[(i / 2) * kPanelWidth * 2 + i % 2] = row[static_cast<size_t>(i)];
        }
      }
    }
  }
}

void PackedWeight::unpack_row(int64_t matrix, int64_t n, float* out) const {
  const std::byte* start = panel(matrix, n / kPanelWidth);
  const int64_t lane = n % kPanelWidth;
  if (format_ == kF32Weights) {
    const float* values = reinterpret_cast<const float*>(start) + lane;
    for (int64_t i = 0; i < k_; ++i) out[i] = values[i * kPanelWidth];
  } else {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(start) + lane * 2;
    for (int64_t i = 0; i < k_; ++i) out[i] = float_from_bf16(values[(i / 2) * kPanelWidth * 2 + i % 2]);
  }
}

const PackedWeight& packed_weight(const Weight& weight) {
  const PackedWeight* mine = dynamic_cast<const PackedWeight*>(&weight);
  CHECK(mine != nullptr);  // a weight belongs to the backend that packed it
  return *mine;
}

}  // namespace tandem::kernels::cpu
