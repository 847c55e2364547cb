#include <algorithm>
#include <cstring>

#include "src/kernels/cpu/attention_sources.h"

namespace tandem::kernels::cpu {
namespace {

int64_t slabs_of(int64_t positions) { return (positions + kSlab - 1) / kSlab; }

}  // namespace

void GqaSource::load_query(int64_t row, int64_t head, float* query) const {
  std::copy_n(row_of<float>(q_, row) + head * shape_.head_dim, shape_.head_dim, query);
}

GqaHead GqaSource::head_at(int64_t sequence, int64_t kv_head, int64_t position) const {
  const int64_t block = block_of(sequences_[static_cast<size_t>(sequence)], block_table_, cache_, position);
  return gqa_head(cache_, shape_, block, kv_head);
}

GqaSource::Slabs GqaSource::find_slabs(int64_t sequence, int64_t kv_head, int64_t first, int64_t count) const {
  Slabs slabs{};
  slabs.key_stride = 2 * cache_.block_size;
  slabs.value_stride = 2 * shape_.head_dim;
  const int64_t bytes = dtype_bytes(cache_.dtype);
  for (int64_t s = 0; s < kTileSlabs; ++s) {
    if (s >= slabs_of(count)) {
      slabs.keys[s] = slabs.keys[0];
      slabs.values[s] = slabs.values[0];
      continue;
    }
    const int64_t offset = (first + s * kSlab) % cache_.block_size;
    const GqaHead head = head_at(sequence, kv_head, first + s * kSlab);
    slabs.keys[s] = head.k + 2 * offset * bytes;
    slabs.values[s] = head.v + offset * shape_.head_dim * bytes;
  }
  return slabs;
}

// For blocks or dimensions that do not fit: element by element.
GqaSource::Slabs GqaSource::copy_slabs(int64_t sequence, int64_t kv_head, int64_t first, int64_t count,
                                       std::byte* staging) const {
  const int64_t bytes = dtype_bytes(cache_.dtype);
  const int64_t dim = padded_dim();
  std::byte* keys = staging;
  std::byte* values = keys + kTile * dim * bytes;
  std::memset(staging, 0, static_cast<size_t>(2 * kTile * dim * bytes));
  const auto copy = [&](std::byte* to, int64_t to_index, const std::byte* from, int64_t from_index) {
    std::memcpy(to + to_index * bytes, from + from_index * bytes, static_cast<size_t>(bytes));
  };
  for (int64_t i = 0; i < count; ++i) {
    const GqaHead head = head_at(sequence, kv_head, first + i);
    const int64_t offset = (first + i) % cache_.block_size;
    const int64_t slab = i / kSlab * kSlab * dim;
    for (int64_t d = 0; d < shape_.head_dim; ++d) {
      copy(keys, slab + pair_index(d, dim, i % kSlab, kSlab), head.k,
           pair_index(d, shape_.head_dim, offset, cache_.block_size));
      copy(values, slab + pair_index(i % kSlab, kSlab, d, dim), head.v,
           pair_index(offset, cache_.block_size, d, shape_.head_dim));
    }
  }
  Slabs slabs{};
  slabs.key_stride = 2 * kSlab;
  slabs.value_stride = 2 * dim;
  for (int64_t s = 0; s < kTileSlabs; ++s) {
    slabs.keys[s] = keys + s * kSlab * dim * bytes;
    slabs.values[s] = values + s * kSlab * dim * bytes;
  }
  return slabs;
}

void GqaSource::copy_scales(int64_t sequence, int64_t kv_head, int64_t first, int64_t count, float* scales) const {
  for (int64_t done = 0; done < count;) {
    const int64_t offset = (first + done) % cache_.block_size;
    const int64_t run = std::min(cache_.block_size - offset, count - done);
    const GqaHead head = head_at(sequence, kv_head, first + done);
    const int64_t begin = offset * int64_t{sizeof(float)};
    std::memcpy(scales + done, head.k_scales + begin, static_cast<size_t>(run) * sizeof(float));
    std::memcpy(scales + kTile + done, head.v_scales + begin, static_cast<size_t>(run) * sizeof(float));
    done += run;
  }
}

void GqaSource::use_slabs(const Slabs& slabs, PairTile* pairs) const {
  pairs->key_stride = slabs.key_stride;
  pairs->value_stride = slabs.value_stride;
  for (int64_t s = 0; s < kTileSlabs; ++s) {
    if (cache_.dtype == DType::kF8E4M3) {
      pairs->f8_keys[s] = reinterpret_cast<const uint8_t*>(slabs.keys[s]);
      pairs->f8_values[s] = reinterpret_cast<const uint8_t*>(slabs.values[s]);
    } else {
      pairs->keys[s] = reinterpret_cast<const uint16_t*>(slabs.keys[s]);
      pairs->values[s] = reinterpret_cast<const uint16_t*>(slabs.values[s]);
    }
  }
}

// fp8 to the same pairs in bf16.
void GqaSource::widen_slabs_f8(const Slabs& slabs, int64_t count, const TileMemory& memory, PairTile* pairs) const {
  const int64_t dim = padded_dim();
  uint16_t* keys = reinterpret_cast<uint16_t*>(memory.keys);
  uint16_t* values = reinterpret_cast<uint16_t*>(memory.values);
  pairs->key_stride = 2 * kSlab;
  pairs->value_stride = 2 * dim;
  for (int64_t s = 0; s < kTileSlabs; ++s) {
    pairs->keys[s] = keys + s * kSlab * dim;
    pairs->values[s] = values + s * kSlab * dim;
    if (s >= slabs_of(count)) continue;
    const uint8_t* source = reinterpret_cast<const uint8_t*>(slabs.keys[s]);
    if (slabs.key_stride == 2 * kSlab) {
      isa_.f8_to_bf16(source, kSlab * dim, keys + s * kSlab * dim);
    } else {
      for (int64_t d = 0; d < dim / 2; ++d) {
        isa_.f8_to_bf16(source + d * slabs.key_stride, 2 * kSlab, keys + (s * dim + 2 * d) * kSlab);
      }
    }
    isa_.f8_to_bf16(reinterpret_cast<const uint8_t*>(slabs.values[s]), kSlab * dim, values + s * kSlab * dim);
  }
}

// Pairs of any dtype to f32, keys by dimension and values by position.
void GqaSource::split_slabs(const Slabs& slabs, int64_t count, const TileMemory& memory) const {
  const int64_t dim = padded_dim();
  const auto split = [&](const std::byte* x, int64_t element, int64_t pairs, float* first, float* second) {
    if (cache_.dtype == DType::kBf16) {
      isa_.split_pairs_bf16(reinterpret_cast<const uint16_t*>(x) + element, pairs, first, second);
    } else if (cache_.dtype == DType::kF8E4M3) {
      isa_.split_pairs_f8(reinterpret_cast<const uint8_t*>(x) + element, pairs, first, second);
    } else {
      const float* values = reinterpret_cast<const float*>(x) + element;
      for (int64_t i = 0; i < pairs; ++i) {
        first[i] = values[2 * i];
        second[i] = values[2 * i + 1];
      }
    }
  };
  for (int64_t s = 0; s < slabs_of(count); ++s) {
    for (int64_t d = 0; d < dim; d += 2) {
      float* key = memory.keys + d * kTile + s * kSlab;
      split(slabs.keys[s], d / 2 * slabs.key_stride, kSlab, key, key + kTile);
    }
    for (int64_t i = 0; i < kSlab; i += 2) {
      float* value = memory.values + (s * kSlab + i) * dim;
      split(slabs.values[s], i / 2 * slabs.value_stride, dim, value, value + dim);
    }
  }
}

bool GqaSource::widens_on_the_way(const TileRequest& request) const {
  return cache_.dtype == DType::kF8E4M3 && cache_.block_size == kSlab && shape_.head_dim % (2 * kPadding) == 0 &&
         request.queries <= 2 * kQueryBlock;
}

// Of a tile that is used where it lies, the values are asked for while keys are multiplied, then the next one's keys.
// Of one that is widened first, both must be there before it begins. The keys of a slab lie together if it is a whole
// block; of a larger block the piece is a part that some slab of it needs.
void GqaSource::plan_prefetch(const TileRequest& request, bool is_in_place, Prefetch* next) const {
  *next = Prefetch{};
  next->piece_bytes = kSlab * shape_.head_dim * dtype_bytes(cache_.dtype);
  const auto add_pieces = [&](int64_t first, int64_t count, bool keys, bool values) {
    for (int64_t position = first; position < first + count; position += kSlab) {
      const GqaHead head = head_at(request.sequence, request.kv_head, position);
      const int64_t begin = position % cache_.block_size / kSlab * next->piece_bytes;
      if (keys) next->pieces[next->num_pieces++] = head.k + begin;
      if (values) next->pieces[next->num_pieces++] = head.v + begin;
    }
  };
  if (is_in_place) add_pieces(request.first, request.count, false, true);
  add_pieces(request.first + kTile, request.next_count, true, !is_in_place);
}

Tile GqaSource::load_tile(const TileRequest& request, const TileMemory& memory) const {
  const auto& [sequence, kv_head, first, count, next_count, queries] = request;
  Tile tile;
  if (cache_.dtype == DType::kF8E4M3) {
    copy_scales(sequence, kv_head, first, count, memory.scales);
    tile.key_scales = tile.pairs.key_scales = KeyScales{memory.scales, padded_dim()};
    tile.value_scales = memory.scales + kTile;
  }
  const Slabs slabs = has_whole_slabs() ? find_slabs(sequence, kv_head, first, count)
                                        : copy_slabs(sequence, kv_head, first, count, memory.staging);
  if (!uses_pairs(isa_, cache_.dtype)) {
    split_slabs(slabs, count, memory);
    tile.keys = memory.keys;
    tile.values = memory.values;
    tile.value_stride = padded_dim();
    return tile;
  }
  const bool is_in_place = cache_.dtype == DType::kBf16 || widens_on_the_way(request);
  if (is_in_place) {
    use_slabs(slabs, &tile.pairs);
  } else {
    widen_slabs_f8(slabs, count, memory, &tile.pairs);
  }
  if (has_whole_slabs()) {
    plan_prefetch(request, is_in_place, memory.next);
    tile.pairs.next = memory.next;
  }
  return tile;
}

}  // namespace tandem::kernels::cpu
