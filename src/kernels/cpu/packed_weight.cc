#include "src/kernels/cpu/packed_weight.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "src/base/check.h"
#include "src/kernels/convert.h"
#include "src/kernels/host_matrix.h"
#include "src/kernels/integer.h"

namespace tandem::kernels::cpu {
namespace {

constexpr int64_t kPackDepth = 256;  // k per piece: a panel's rows of one piece fit in L1 before they are interleaved

bool all_scales_are_f16(std::span<const HostMatrix> matrices, const WeightFormat& format, ThreadPool& pool) {
  std::atomic<bool> all = true;
  pool.run(std::ssize(matrices), [&](int64_t index, int /*worker*/) {
    const HostMatrix& matrix = matrices[static_cast<size_t>(index)];
    IntegerWeightRow scratch;
    for (int64_t n = 0; n < matrix.n && all.load(std::memory_order_relaxed); ++n) {
      if (!has_f16_scales(matrix, n, format, &scratch)) all = false;
    }
  });
  return all;
}

IntegerLayout make_layout(std::span<const HostMatrix> matrices, const WeightFormat& format, ThreadPool& pool) {
  if (!format.is_integer()) return {};
  IntegerLayout layout = row_layout(format, matrices[0].k);
  layout.own_zeros = has_own_zeros(matrices, format);
  layout.f16_scales = all_scales_are_f16(matrices, format, pool);
  return layout;
}

int64_t panel_bytes_of(int64_t k, const WeightFormat& format, const IntegerLayout& integers) {
  if (format.is_integer()) return integers.panel_bytes();
  if (format == kF32Weights) return k * kPanelWidth * int64_t{sizeof(float)};
  return round_up(k, 2) * kPanelWidth * int64_t{sizeof(uint16_t)};
}

}  // namespace

IntegerLayout row_layout(const WeightFormat& format, int64_t k) {
  CHECK(format.is_integer());
  CHECK_EQ(format.group_size % kGroupMultiple, 0);
  CHECK(format.activation_bits == 8 || format.activation_bits == 16);
  CHECK_LE(group_columns(k, format), kMaxGroupColumns);
  IntegerLayout layout;
  layout.k = k;
  layout.padded = round_up(k, kGroupMultiple);
  layout.groups = count_groups(k, format);
  layout.group = layout.groups == 1 ? layout.padded : format.group_size;
  layout.planes = format.activation_bits / 8;
  layout.bits = format.type == WeightType::kInt8 ? 8 : 4;
  return layout;
}

PackedWeight::PackedWeight(std::span<const HostMatrix> matrices, const WeightFormat& format, ThreadPool& pool)
    : batch_(static_cast<int64_t>(matrices.size())),
      n_(matrices[0].n),
      k_(matrices[0].k),
      format_(format),
      integers_(make_layout(matrices, format, pool)),
      buffer_(batch_ * panels() * panel_bytes()) {
  for (int64_t i = 0; i < batch_; ++i) matrices_.push_back(buffer_.address() + i * matrix_bytes());
  pool.run(batch_ * panels(), [&](int64_t index, int /*worker*/) {
    const HostMatrix& matrix = matrices[static_cast<size_t>(index / panels())];
    std::byte* panel = buffer_.address() + index * panel_bytes();
    if (format_.is_integer()) {
      pack_integer_panel(matrix, index % panels(), panel);
    } else {
      pack_panel(matrix, index % panels(), panel);
    }
  });
}

int64_t PackedWeight::panel_bytes() const { return panel_bytes_of(k_, format_, integers_); }

void PackedWeight::pack_integer_panel(const HostMatrix& matrix, int64_t index, std::byte* panel) const {
  const int64_t first = index * kPanelWidth;
  const int64_t lanes = std::min(kPanelWidth, n_ - first);
  std::byte* scales = panel + integers_.panel_scales();
  IntegerWeightRow row;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    encode_weight_row(matrix, first + lane, format_, &row);
    for (int64_t g = 0; g < integers_.groups; ++g) {
      const size_t group = static_cast<size_t>(g);
      if (integers_.f16_scales) {
        reinterpret_cast<uint16_t*>(scales)[g * kPanelWidth + lane] = f16_from_float(row.scales[group]);
      } else {
        reinterpret_cast<float*>(scales)[g * kPanelWidth + lane] = row.scales[group];
      }
      if (integers_.own_zeros) panel[integers_.panel_zeros() + g * kPanelWidth + lane] = std::byte{row.zeros[group]};
    }
    row.codes.resize(static_cast<size_t>(integers_.padded));
    const uint8_t* codes = row.codes.data();
    std::byte* out = panel + lane * 4;
    if (integers_.bits == 8) {
      for (int64_t k = 0; k < integers_.padded; k += 4) std::memcpy(out + k * kPanelWidth, codes + k, 4);
      continue;
    }
    for (int64_t k = 0; k < integers_.padded; k += 8) {
      uint32_t low = 0;
      uint32_t high = 0;
      std::memcpy(&low, codes + k, 4);
      std::memcpy(&high, codes + k + 4, 4);
      const uint32_t pairs = low | high << 4U;
      std::memcpy(out + k / 2 * kPanelWidth, &pairs, 4);
    }
  }
}

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
  CHECK(!format_.is_integer());
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
