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

// A thread's memory, all in floats.
struct Layout {
  int64_t query_stride;
  int64_t value_stride;  // of values in a tile; the keys' where they are the same
  int64_t acc_dim;
  int64_t state_floats;  // kMaxQueries states, then as many acc

  explicit Layout(const AttentionShape& shape)
      : query_stride(round_up(shape.query_dim, kPadding)),
        value_stride(shape.values_are_keys ? query_stride : round_up(shape.value_dim, kPadding)),
        acc_dim(round_up(shape.value_dim, kPadding)),
        state_floats(kMaxQueries * (2 + acc_dim)) {}

  int64_t queries() const { return kMaxQueries * query_stride; }
  int64_t keys() const { return kTile * query_stride; }
  int64_t values() const { return kTile * value_stride; }
  int64_t weights() const { return kMaxQueries * kTile; }
  int64_t worker_floats() const { return queries() + keys() + values() + weights() + 2 * state_floats; }
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
  void compute_whole(const Item& item, float* memory) const;
  void compute_one_split(const Item& item, int64_t split, float* memory, Partial part) const;
  void finish_item(const Item& item, float* memory, float* partials) const;

 private:
  void load_queries(const Item& item, float* queries) const;
  void compute_tile(const Item& item, int64_t tile_begin, int64_t tile_end, float* memory, Partial part) const;
  void compute_split(const Item& item, int64_t split, float* memory, Partial part) const;
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

void Attention::load_queries(const Item& item, float* queries) const {
  for (int64_t i = 0; i < item.queries(); ++i) {
    float* query = queries + i * layout_.query_stride;
    source_.load_query(item.first_row + i / item.heads, item.first_head + i % item.heads, query);
    std::fill(query + shape_.query_dim, query + layout_.query_stride, 0.0F);
  }
}

void Attention::compute_tile(const Item& item, int64_t tile_begin, int64_t tile_end, float* memory,
                             Partial part) const {
  float* queries = memory;
  float* keys = queries + layout_.queries();
  float* values = keys + layout_.keys();
  float* weights = values + layout_.values();
  const int64_t count = tile_end - tile_begin;
  source_.load_tile(item.sequence, item.kv_head, tile_begin, count, keys, layout_.query_stride, values,
                    layout_.value_stride);
  if (shape_.values_are_keys) values = keys;

  // Rounded down to a block, so that `scores` reads whole blocks of queries inside the memory.
  const int64_t first = item.first_query_at(tile_begin);
  const int64_t first_block = first / kQueryBlock * kQueryBlock;
  isa_.scores(queries + first_block * layout_.query_stride, layout_.query_stride, item.queries() - first_block, keys,
              layout_.query_stride, count, layout_.query_stride, weights + first_block * kTile);
  for (int64_t i = first; i < item.queries(); ++i) {
    const int64_t visible = std::min(item.visible(i) - tile_begin, count);
    isa_.softmax_tile(weights + i * kTile, visible, shape_.scale, &part.states[i], part.acc + i * layout_.acc_dim,
                      layout_.acc_dim);
  }
  for (int64_t i = first; i < item.queries(); i += kQueryBlock) {
    const int64_t block = std::min(kQueryBlock, item.queries() - i);
    const int64_t common = std::min(item.visible(i) - tile_begin, count);
    isa_.accumulate(weights + i * kTile, block, values, layout_.value_stride, 0, common, layout_.acc_dim,
                    part.acc + i * layout_.acc_dim, layout_.acc_dim);
    for (int64_t j = i + 1; j < i + block; ++j) {  // later rows see some positions more
      const int64_t visible = std::min(item.visible(j) - tile_begin, count);
      if (visible == common) continue;
      isa_.accumulate(weights + j * kTile, 1, values, layout_.value_stride, common, visible, layout_.acc_dim,
                      part.acc + j * layout_.acc_dim, layout_.acc_dim);
    }
  }
}

void Attention::compute_split(const Item& item, int64_t split, float* memory, Partial part) const {
  part.clear(item.queries(), layout_.acc_dim);
  const int64_t end = std::min((split + 1) * kSplit, item.positions());
  for (int64_t tile = split * kSplit; tile < end; tile += kTile) {
    compute_tile(item, tile, std::min(tile + kTile, end), memory, part);
  }
}

void Attention::fold_split(const Item& item, int64_t split, Partial total, Partial part) const {
  for (int64_t i = item.first_query_at(split * kSplit); i < item.queries(); ++i) {
    isa_.fold(&total.states[i], total.acc + i * layout_.acc_dim, &part.states[i], part.acc + i * layout_.acc_dim,
              layout_.acc_dim);
  }
}

void Attention::write_results(const Item& item, Partial total) const {
  for (int64_t i = 0; i < item.queries(); ++i) {
    isa_.finish(&total.states[i], total.acc + i * layout_.acc_dim, shape_.value_dim,
                source_.result(item.first_row + i / item.heads, item.first_head + i % item.heads));
  }
}

void Attention::compute_whole(const Item& item, float* memory) const {
  float* states = memory + layout_.worker_floats() - 2 * layout_.state_floats;
  Partial total(states);
  const Partial part(states + layout_.state_floats);
  load_queries(item, memory);
  total.clear(item.queries(), layout_.acc_dim);
  for (int64_t split = 0; split < item.splits(); ++split) {
    compute_split(item, split, memory, part);
    fold_split(item, split, total, part);
  }
  write_results(item, total);
}

void Attention::compute_one_split(const Item& item, int64_t split, float* memory, Partial part) const {
  load_queries(item, memory);
  compute_split(item, split, memory, part);
}

void Attention::finish_item(const Item& item, float* memory, float* partials) const {
  Partial total(memory + layout_.worker_floats() - layout_.state_floats);
  total.clear(item.queries(), layout_.acc_dim);
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

  // A task is a whole item, or one split of an item that has room for partial results.
  struct Task {
    const Item* item;
    int64_t split;
  };
  std::vector<Task> tasks;
  std::vector<const Item*> split_items;
  for (const Item& item : items) {
    if (item.first_partial < 0) {
      tasks.push_back(Task{&item, 0});
      continue;
    }
    split_items.push_back(&item);
    for (int64_t split = 0; split < item.splits(); ++split) tasks.push_back(Task{&item, split});
  }

  const auto run_task = [&](int64_t index, int worker) {
    const Task& task = tasks[static_cast<size_t>(index)];
    float* memory = worker_memory + worker * layout.worker_floats();
    if (task.item->first_partial < 0) return attention.compute_whole(*task.item, memory);
    float* partial = partial_memory + (task.item->first_partial + task.split) * layout.state_floats;
    attention.compute_one_split(*task.item, task.split, memory, Partial(partial));
  };
  if (count_products(items, shape) <= kInlineProducts) {
    for (size_t index = 0; index < tasks.size(); ++index) run_task(static_cast<int64_t>(index), 0);
  } else {
    pool.run(static_cast<int64_t>(tasks.size()), run_task);
  }
  pool.run(static_cast<int64_t>(split_items.size()), [&](int64_t index, int worker) {
    attention.finish_item(*split_items[static_cast<size_t>(index)], worker_memory + worker * layout.worker_floats(),
                          partial_memory);
  });
}

}  // namespace tandem::kernels::cpu
