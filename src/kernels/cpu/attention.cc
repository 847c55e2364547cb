#include "src/kernels/cpu/attention.h"

#include <algorithm>
#include <limits>

#include "src/base/check.h"

namespace tandem::kernels::cpu {
namespace {

static_assert(kSplit % kTile == 0);
static_assert(kMaxQueries % kQueryBlock == 0);

// Some rows × some heads of one kv head: query vectors that share keys and values. Vector i belongs to row
// first_row + i / heads and head first_head + i % heads, so what vectors see grows with i.
struct Item {
  int64_t sequence = 0;
  int64_t kv_head = 0;
  int64_t first_head = 0;
  int64_t heads = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t first_position = 0;
  int64_t first_partial = -1;  // where the item's splits store their results; -1: one thread does all of them

  int64_t queries() const { return rows * heads; }
  int64_t positions() const { return first_position + rows; }
  int64_t splits() const { return (positions() + kSplit - 1) / kSplit; }
  // Positions that query vector i sees.
  int64_t visible(int64_t i) const { return first_position + i / heads + 1; }
  // The first query vector that sees `position`.
  int64_t first_query_at(int64_t position) const { return std::max(int64_t{0}, position - first_position) * heads; }
};

// A thread's memory, all in floats; every part is a multiple of 64 bytes.
struct Layout {
  int64_t query_stride;
  int64_t value_stride;
  int64_t query_floats;  // of all query vectors, f32 or bf16
  int64_t state_floats;  // kMaxQueries states, then as many acc

  explicit Layout(const AttentionShape& shape)
      : query_stride(shape.query_stride()),
        value_stride(shape.value_stride()),
        query_floats(kMaxQueries * query_stride / (shape.use_pairs ? 2 : 1)),
        state_floats(kMaxQueries * (2 + value_stride)) {}

  int64_t keys() const { return kTile * query_stride; }
  int64_t values() const { return kTile * value_stride; }
  int64_t block() const { return kQueryBlock * kTile; }
  int64_t worker_floats() const {
    return query_floats + query_stride + 2 * (keys() + values()) + 2 * kTile + 2 * block() + 2 * state_floats;
  }
};

// One thread's share of the scratch memory, cut up.
struct Workspace {
  float* queries;
  float* query;  // one, before it is rounded
  TileMemory tile;
  float* scores;             // of one block of queries
  uint16_t* narrow_weights;  // the same as bf16
  float* states;
  Prefetch next;
  Workspace(const Workspace&) = delete;  // `tile` points into it

  Workspace(float* memory, const Layout& layout) {
    const auto take = [&memory](int64_t floats) {
      float* start = memory;
      memory += floats;
      return start;
    };
    queries = take(layout.query_floats);
    query = take(layout.query_stride);
    tile.keys = take(layout.keys());
    tile.values = take(layout.values());
    tile.staging = reinterpret_cast<std::byte*>(take(layout.keys() + layout.values()));
    tile.scales = take(2 * kTile);
    tile.next = &next;
    scores = take(layout.block());
    narrow_weights = reinterpret_cast<uint16_t*>(take(layout.block()));
    states = take(2 * layout.state_floats);
  }
};

static_assert(sizeof(SoftmaxState) == 2 * sizeof(float));

// Results of up to kMaxQueries query vectors over some positions.
struct Partial {
  SoftmaxState* states;
  float* acc;

  explicit Partial(float* memory) : states(reinterpret_cast<SoftmaxState*>(memory)), acc(memory + 2 * kMaxQueries) {}
  void clear(int64_t queries, int64_t acc_dim) {
    std::fill_n(states, queries, SoftmaxState{-std::numeric_limits<float>::infinity(), 0.0F});
    std::fill_n(acc, queries * acc_dim, 0.0F);
  }
};

class Attention {
 public:
  Attention(const Isa& isa, const AttentionShape& shape, const AttentionSource& source)
      : isa_(isa), shape_(shape), source_(source), layout_(shape) {}

  const Layout& layout() const { return layout_; }

  std::vector<Item> plan(const std::vector<AttentionRows>& sequences) const;
  void compute_whole(const Item& item, const Workspace& work) const;
  void compute_splits(const Item& item, int64_t begin, int64_t end, const Workspace& work, float* partials) const;
  void finish_item(const Item& item, const Workspace& work, float* partials) const;

 private:
  void load_queries(const Item& item, const Workspace& work) const;
  void compute_tile(const Item& item, int64_t first, int64_t count, int64_t next_count, const Workspace& work,
                    Partial part) const;
  void score(const Tile& tile, int64_t first_query, int64_t queries, int64_t positions, const Workspace& work) const;
  void take_weights(const Item& item, const Tile& tile, int64_t first_query, int64_t queries, int64_t tile_begin,
                    int64_t count, const Workspace& work, Partial part) const;
  void accumulate(const Tile& tile, int64_t query, int64_t row, int64_t queries, int64_t begin, int64_t end,
                  const Workspace& work, Partial part) const;
  void accumulate_block(const Item& item, const Tile& tile, int64_t first_query, int64_t queries, int64_t tile_begin,
                        int64_t count, const Workspace& work, Partial part) const;
  void compute_split(const Item& item, int64_t split, int64_t end, const Workspace& work, Partial part) const;
  void fold_split(const Item& item, int64_t split, Partial total, Partial part) const;
  void write_results(const Item& item, Partial total) const;

  const Isa& isa_;
  const AttentionShape& shape_;
  const AttentionSource& source_;
  const Layout layout_;
};

std::vector<Item> Attention::plan(const std::vector<AttentionRows>& sequences) const {
  const int64_t heads_per_item = std::min(shape_.group, kMaxQueries);
  const int64_t rows_per_item = std::max(int64_t{1}, kMaxQueries / shape_.group);
  std::vector<Item> items;
  for (const AttentionRows& sequence : sequences) {
    for (int64_t row = 0; row < sequence.rows; row += rows_per_item) {
      for (int64_t kv_head = 0; kv_head < shape_.kv_heads; ++kv_head) {
        for (int64_t head = 0; head < shape_.group; head += heads_per_item) {
          Item item;
          item.sequence = sequence.sequence;
          item.kv_head = kv_head;
          item.first_head = kv_head * shape_.group + head;
          item.heads = std::min(heads_per_item, shape_.group - head);
          item.first_row = sequence.first_row + row;
          item.rows = std::min(rows_per_item, sequence.rows - row);
          item.first_position = sequence.first_position + row;
          items.push_back(item);
        }
      }
    }
  }
  // The longest first, so that threads end together.
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.positions() > b.positions(); });
  return items;
}

void Attention::load_queries(const Item& item, const Workspace& work) const {
  for (int64_t i = 0; i < item.queries(); ++i) {
    float* query = shape_.use_pairs ? work.query : work.queries + i * layout_.query_stride;
    source_.load_query(item.first_row + i / item.heads, item.first_head + i % item.heads, query);
    std::fill(query + shape_.query_dim, query + layout_.query_stride, 0.0F);
    if (!shape_.use_pairs) continue;
    isa_.round_pairs(query, layout_.query_stride, reinterpret_cast<uint16_t*>(work.queries) + i * layout_.query_stride);
  }
}

void Attention::score(const Tile& tile, int64_t first_query, int64_t queries, int64_t positions,
                      const Workspace& work) const {
  const int64_t stride = layout_.query_stride;
  if (shape_.use_pairs) {
    isa_.score_pairs(reinterpret_cast<const uint16_t*>(work.queries) + first_query * stride, stride, queries,
                     tile.pairs, positions, stride / 2, work.scores);
  } else {
    isa_.scores(work.queries + first_query * stride, stride, queries, tile.keys, tile.key_scales, positions, stride,
                work.scores);
  }
}

// Of the block of `queries` query vectors from `first_query` on, those that see alike go together.
void Attention::take_weights(const Item& item, const Tile& tile, int64_t first_query, int64_t queries,
                             int64_t tile_begin, int64_t count, const Workspace& work, Partial part) const {
  constexpr float kLog2E = 1.44269504F;
  const auto visible = [&](int64_t i) { return std::min(item.visible(first_query + i) - tile_begin, count); };
  for (int64_t i = 0; i < queries;) {
    int64_t end = i + 1;
    while (end < queries && visible(end) == visible(i)) ++end;
    isa_.softmax_tile(SoftmaxTile{.queries = end - i,
                                  .scores = work.scores + i * kTile,
                                  .visible = visible(i),
                                  .scale = shape_.scale * kLog2E,
                                  .value_scales = tile.value_scales,
                                  .states = &part.states[first_query + i],
                                  .acc = part.acc + (first_query + i) * layout_.value_stride,
                                  .dim = layout_.value_stride,
                                  .narrow_weights = shape_.use_pairs ? work.narrow_weights + i * kTile : nullptr});
    i = end;
  }
}

void Attention::accumulate(const Tile& tile, int64_t query, int64_t row, int64_t queries, int64_t begin, int64_t end,
                           const Workspace& work, Partial part) const {
  if (begin >= end) return;
  const int64_t dim = layout_.value_stride;
  float* acc = part.acc + query * dim;
  if (shape_.use_pairs) {
    isa_.accumulate_pairs(work.narrow_weights + row * kTile, queries, tile.pairs, begin, end, dim, acc, dim);
  } else {
    isa_.accumulate(work.scores + row * kTile, queries, tile.values, tile.value_stride, begin, end, dim, acc, dim);
  }
}

void Attention::accumulate_block(const Item& item, const Tile& tile, int64_t first_query, int64_t queries,
                                 int64_t tile_begin, int64_t count, const Workspace& work, Partial part) const {
  const auto visible = [&](int64_t i) { return std::min(item.visible(first_query + i) - tile_begin, count); };
  int64_t common = visible(0);
  if (visible(queries - 1) != common) common = common / 2 * 2;  // a pair is added at once or not at all
  accumulate(tile, first_query, 0, queries, 0, common, work, part);
  for (int64_t i = 0; i < queries;) {  // later rows see some positions more
    int64_t end = i + 1;
    while (end < queries && visible(end) == visible(i)) ++end;
    accumulate(tile, first_query + i, i, end - i, common, visible(i), work, part);
    i = end;
  }
}

void Attention::compute_tile(const Item& item, int64_t first, int64_t count, int64_t next_count, const Workspace& work,
                             Partial part) const {
  const TileRequest request{item.sequence, item.kv_head, first, count, next_count, item.queries()};
  Tile tile = source_.load_tile(request, work.tile);
  for (int64_t query = item.first_query_at(first); query < item.queries(); query += kQueryBlock) {
    const int64_t queries = std::min(kQueryBlock, item.queries() - query);
    const int64_t positions = std::min(item.visible(query + queries - 1) - first, count);
    score(tile, query, queries, positions, work);
    take_weights(item, tile, query, queries, first, count, work, part);
    accumulate_block(item, tile, query, queries, first, count, work, part);
    tile.pairs.next = nullptr;  // what comes next was asked for, once
  }
}

// The positions of `split`; a thread that goes on with the next one says so by a later `end`.
void Attention::compute_split(const Item& item, int64_t split, int64_t end, const Workspace& work, Partial part) const {
  part.clear(item.queries(), layout_.value_stride);
  const int64_t split_end = std::min((split + 1) * kSplit, item.positions());
  for (int64_t tile = split * kSplit; tile < split_end; tile += kTile) {
    const int64_t next_count = std::clamp<int64_t>(end - tile - kTile, 0, kTile);
    compute_tile(item, tile, std::min(kTile, split_end - tile), next_count, work, part);
  }
}

void Attention::fold_split(const Item& item, int64_t split, Partial total, Partial part) const {
  for (int64_t i = item.first_query_at(split * kSplit); i < item.queries(); ++i) {
    isa_.fold(&total.states[i], total.acc + i * layout_.value_stride, &part.states[i],
              part.acc + i * layout_.value_stride, layout_.value_stride);
  }
}

void Attention::write_results(const Item& item, Partial total) const {
  for (int64_t i = 0; i < item.queries(); ++i) {
    isa_.finish(&total.states[i], total.acc + i * layout_.value_stride, shape_.value_dim,
                source_.result(item.first_row + i / item.heads, item.first_head + i % item.heads));
  }
}

void Attention::compute_whole(const Item& item, const Workspace& work) const {
  Partial total(work.states);
  const Partial part(work.states + layout_.state_floats);
  load_queries(item, work);
  total.clear(item.queries(), layout_.value_stride);
  for (int64_t split = 0; split < item.splits(); ++split) {
    compute_split(item, split, item.positions(), work, part);
    fold_split(item, split, total, part);
  }
  write_results(item, total);
}

void Attention::compute_splits(const Item& item, int64_t begin, int64_t end, const Workspace& work,
                               float* partials) const {
  load_queries(item, work);
  for (int64_t split = begin; split < end; ++split) {
    compute_split(item, split, std::min(end * kSplit, item.positions()), work,
                  Partial(partials + (item.first_partial + split) * layout_.state_floats));
  }
}

void Attention::finish_item(const Item& item, const Workspace& work, float* partials) const {
  Partial total(work.states);
  total.clear(item.queries(), layout_.value_stride);
  for (int64_t split = 0; split < item.splits(); ++split) {
    fold_split(item, split, total, Partial(partials + (item.first_partial + split) * layout_.state_floats));
  }
  write_results(item, total);
}

// With few items, gives long ones room for the results of their splits. Returns how many results that makes.
int64_t plan_partials(std::vector<Item>& items, int64_t partial_bytes, int threads) {
  constexpr int64_t kItemsPerThread = 4;
  if (threads == 1 || static_cast<int64_t>(items.size()) >= threads * kItemsPerThread) return 0;
  int64_t partials = 0;
  for (Item& item : items) {
    if (item.splits() < 2 || (partials + item.splits()) * partial_bytes > kMaxPartialBytes) continue;
    item.first_partial = partials;
    partials += item.splits();
  }
  return partials;
}

// Multiply-adds of all items together.
int64_t count_products(const std::vector<Item>& items, const AttentionShape& shape) {
  int64_t products = 0;
  for (const Item& item : items) products += item.queries() * item.positions() * (shape.query_dim + shape.value_dim);
  return products;
}

constexpr int64_t kTasksPerThread = 4;  // of those that are parts of items

// Attention of fewer multiply-adds, about 20 µs, stays on the calling thread: waking another costs as much.
constexpr int64_t kInlineProducts = 256 * 1024;

}  // namespace

void attend(const Isa& isa, ThreadPool& pool, CpuStream& stream, const AttentionShape& shape,
            const AttentionSource& source, const std::vector<AttentionRows>& sequences) {
  const Attention attention(isa, shape, source);
  const Layout& layout = attention.layout();
  std::vector<Item> items = attention.plan(sequences);
  if (items.empty()) return;
  const int64_t partials = plan_partials(items, layout.state_floats * int64_t{sizeof(float)}, pool.num_threads());
  float* partial_memory = stream.partials.get<float>(partials * layout.state_floats);
  float* worker_memory = stream.workers.get<float>(pool.num_threads() * layout.worker_floats());

  // A task is a whole item, or some splits of an item that has room for partial results: as many together as leave
  // every thread a few tasks, since what lies ahead of a task is not prefetched.
  struct Task {
    const Item* item;
    int64_t begin;
    int64_t end;
  };
  const int64_t splits_per_task = std::max(int64_t{1}, partials / (kTasksPerThread * pool.num_threads()));
  std::vector<Task> tasks;
  std::vector<const Item*> split_items;
  for (const Item& item : items) {
    if (item.first_partial < 0) {
      tasks.push_back(Task{&item, 0, item.splits()});
      continue;
    }
    split_items.push_back(&item);
    for (int64_t split = 0; split < item.splits(); split += splits_per_task) {
      tasks.push_back(Task{&item, split, std::min(split + splits_per_task, item.splits())});
    }
  }

  const auto run_task = [&](int64_t index, int worker) {
    const Task& task = tasks[static_cast<size_t>(index)];
    const Workspace work(worker_memory + worker * layout.worker_floats(), layout);
    if (task.item->first_partial < 0) return attention.compute_whole(*task.item, work);
    attention.compute_splits(*task.item, task.begin, task.end, work, partial_memory);
  };
  if (count_products(items, shape) <= kInlineProducts) {
    for (size_t index = 0; index < tasks.size(); ++index) run_task(static_cast<int64_t>(index), 0);
  } else {
    pool.run(static_cast<int64_t>(tasks.size()), run_task);
  }
  pool.run(static_cast<int64_t>(split_items.size()), [&](int64_t index, int worker) {
    const Workspace work(worker_memory + worker * layout.worker_floats(), layout);
    attention.finish_item(*split_items[static_cast<size_t>(index)], work, partial_memory);
  });
}

}  // namespace tandem::kernels::cpu
