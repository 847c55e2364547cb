// MLA's keys and values lie by position; a tile turns them into what the products want.
#include <algorithm>
#include <cstring>

#include "src/kernels/cpu/attention_sources.h"

namespace tandem::kernels::cpu {
namespace {

// Keys and values of a tile as rows of f32 or, for pairs, bf16. Each key row has at least `key_dim` elements, zeros
// behind its own; each value row `value_dim`, anything behind its own. Rows beyond the tile's positions repeat others.
struct TileRows {
  const std::byte* keys[kTile];
  const std::byte* values[kTile];
  int64_t key_dim;
  int64_t value_dim;
};

void pack_pairs(const Isa& isa, const TileRows& rows, int64_t count, const TileMemory& memory, PairTile* pairs) {
  pairs->key_stride = 2 * kSlab;
  pairs->value_stride = 2 * rows.value_dim;
  uint16_t* values = reinterpret_cast<uint16_t*>(memory.values);
  for (int64_t s = 0; s < kTileSlabs; ++s) {
    float* keys = memory.keys + s * kSlab * rows.key_dim / 2;  // two elements in the place of one float
    pairs->keys[s] = reinterpret_cast<const uint16_t*>(keys);
    pairs->values[s] = values + s * kSlab * rows.value_dim;
    if (s * kSlab >= count) continue;
    const float* slab[kSlab];
    for (int64_t i = 0; i < kSlab; ++i) slab[i] = reinterpret_cast<const float*>(rows.keys[s * kSlab + i]);
    isa.transpose(slab, rows.key_dim / 2, keys, kSlab);
  }
  for (int64_t i = 0; i < count; i += 2) {
    isa.interleave(reinterpret_cast<const uint16_t*>(rows.values[i]),
                   reinterpret_cast<const uint16_t*>(rows.values[i + 1]), rows.value_dim, values + i * rows.value_dim);
  }
}

void pack_floats(const Isa& isa, const TileRows& rows, int64_t count, const TileMemory& memory) {
  for (int64_t first = 0; first < count; first += kSlab) {
    const float* slab[kSlab];
    for (int64_t i = 0; i < kSlab; ++i) slab[i] = reinterpret_cast<const float*>(rows.keys[first + i]);
    isa.transpose(slab, rows.key_dim, memory.keys + first, kTile);
  }
}

}  // namespace

void LatentSource::load_query(int64_t row, int64_t head, float* query) const {
  std::copy_n(row_of<float>(q_latent_, row) + head * shape_.latent_dim, shape_.latent_dim, query);
  std::fill(query + shape_.latent_dim, query + rope_begin(), 0.0F);
  std::copy_n(row_of<float>(q_pe_, row) + head * q_pe_head_stride_, shape_.rope_dim, query + rope_begin());
}

// A row of the cache as bf16 or f32 elements of a key, without its scale.
void LatentSource::widen_row(const LatentRow& source, bool use_pairs, std::byte* key) const {
  const auto widen = [&](const std::byte* elements, DType dtype, int64_t count, int64_t first) {
    if (use_pairs) {
      uint16_t* out = reinterpret_cast<uint16_t*>(key) + first;
      if (dtype == DType::kF8E4M3) return isa_.f8_to_bf16(reinterpret_cast<const uint8_t*>(elements), count, out);
      std::memcpy(out, elements, static_cast<size_t>(count) * sizeof(uint16_t));
      return;
    }
    float* out = reinterpret_cast<float*>(key) + first;
    if (dtype == DType::kF8E4M3) return isa_.from_f8(reinterpret_cast<const uint8_t*>(elements), count, 1.0F, out);
    if (dtype == DType::kBf16) return isa_.from_bf16(reinterpret_cast<const uint16_t*>(elements), count, out);
    std::memcpy(out, elements, static_cast<size_t>(count) * sizeof(float));
  };
  const int64_t element_bytes = use_pairs ? 2 : 4;
  const int64_t end = rope_begin() + shape_.rope_dim;
  std::memset(key + shape_.latent_dim * element_bytes, 0,
              static_cast<size_t>((rope_begin() - shape_.latent_dim) * element_bytes));
  std::memset(key + end * element_bytes, 0, static_cast<size_t>((key_stride() - end) * element_bytes));
  widen(source.latent, cache_.dtype, shape_.latent_dim, 0);
  widen(source.rope, source.rope_dtype, shape_.rope_dim, rope_begin());
}

void LatentSource::plan_prefetch(const SequenceRows& sequence, int64_t first, int64_t count, Prefetch* next) const {
  *next = Prefetch{};
  next->piece_bytes = (latent_row(cache_, shape_, 0, 1).latent - latent_row(cache_, shape_, 0, 0).latent) * kSlab;
  for (int64_t position = first; position < first + count; position += kSlab) {
    const int64_t block = block_of(sequence, block_table_, cache_, position);
    next->pieces[next->num_pieces++] = latent_row(cache_, shape_, block, position % cache_.block_size).latent;
  }
}

Tile LatentSource::load_tile(const TileRequest& request, const TileMemory& memory) const {
  const int64_t first = request.first;
  const int64_t count = request.count;
  const SequenceRows& rows_of_sequence = sequences_[static_cast<size_t>(request.sequence)];
  const bool use_pairs = uses_pairs(isa_, cache_.dtype);
  const bool is_in_place = use_pairs && cache_.dtype == DType::kBf16 && shape_.width() == key_stride();
  TileRows rows;
  rows.key_dim = key_stride();
  rows.value_dim = round_up(shape_.latent_dim, kPadding);
  for (int64_t i = 0; i < kTile; ++i) {
    if (i >= count) {
      rows.keys[i] = rows.keys[0];
      continue;
    }
    const int64_t block = block_of(rows_of_sequence, block_table_, cache_, first + i);
    const LatentRow source = latent_row(cache_, shape_, block, (first + i) % cache_.block_size);
    if (source.scale != nullptr) std::memcpy(memory.scales + i, source.scale, sizeof(float));
    rows.keys[i] = source.latent;
    if (is_in_place) continue;
    std::byte* key = memory.staging + i * key_stride() * (use_pairs ? 2 : 4);
    widen_row(source, use_pairs, key);
    rows.keys[i] = key;
  }
  std::copy_n(rows.keys, kTile, rows.values);
  Tile tile;
  if (cache_.dtype == DType::kF8E4M3) {
    tile.key_scales = tile.pairs.key_scales = KeyScales{memory.scales, rope_begin()};
    tile.value_scales = memory.scales;
  }
  if (use_pairs) {
    pack_pairs(isa_, rows, count, memory, &tile.pairs);
    if (cache_.block_size % kSlab == 0) {
      plan_prefetch(rows_of_sequence, first + kTile, request.next_count, memory.next);
      tile.pairs.next = memory.next;
    }
    return tile;
  }
  pack_floats(isa_, rows, count, memory);
  tile.keys = memory.keys;
  tile.values = reinterpret_cast<const float*>(memory.staging);
  tile.value_stride = key_stride();
  return tile;
}

void ExpandedSource::load_query(int64_t row, int64_t head, float* query) const {
  const int64_t dim = nope_dim_ + k_pe_.cols;
  std::copy_n(row_of<float>(q_, row) + head * dim, dim, query);
}

Tile ExpandedSource::load_tile(const TileRequest& request, const TileMemory& memory) const {
  const int64_t first = request.first;
  const int64_t count = request.count;
  const int64_t key_dim = nope_dim_ + k_pe_.cols;
  const int64_t element_bytes = use_pairs_ ? 2 : 4;
  TileRows rows;
  rows.key_dim = round_up(key_dim, kRowPadding);
  rows.value_dim = round_up(value_dim_, kPadding);
  const auto put = [&](const float* source, int64_t dim, std::byte* row, int64_t column) {
    if (use_pairs_) {
      isa_.round_pairs(source, dim, reinterpret_cast<uint16_t*>(row) + column);
    } else {
      std::copy_n(source, dim, reinterpret_cast<float*>(row) + column);
    }
  };
  std::byte* values = memory.staging + kTile * rows.key_dim * element_bytes;
  for (int64_t i = 0; i < kTile; ++i) {
    std::byte* key = memory.staging + std::min(i, count - 1) * rows.key_dim * element_bytes;
    std::byte* value = values + std::min(i, count - 1) * rows.value_dim * element_bytes;
    rows.keys[i] = key;
    rows.values[i] = value;
    if (i >= count) continue;
    const float* source = row_of<float>(kv_, first + i) + request.kv_head * (nope_dim_ + value_dim_);
    put(source, nope_dim_, key, 0);
    put(row_of<float>(k_pe_, first + i), k_pe_.cols, key, nope_dim_);
    std::memset(key + key_dim * element_bytes, 0, static_cast<size_t>((rows.key_dim - key_dim) * element_bytes));
    put(source + nope_dim_, value_dim_, value, 0);
    std::memset(value + value_dim_ * element_bytes, 0,
                static_cast<size_t>((rows.value_dim - value_dim_) * element_bytes));
  }
  Tile tile;
  if (use_pairs_) {
    pack_pairs(isa_, rows, count, memory, &tile.pairs);
    return tile;
  }
  pack_floats(isa_, rows, count, memory);
  tile.keys = memory.keys;
  tile.values = reinterpret_cast<const float*>(values);
  tile.value_stride = rows.value_dim;
  return tile;
}

}  // namespace tandem::kernels::cpu
