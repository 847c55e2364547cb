#include "src/tp/batch_bytes.h"

#include <bit>

namespace tandem::tp {
namespace {

class Writer {
 public:
  Writer() : numbers_{0} {}
  void add(int32_t value) { numbers_.push_back(value); }
  template <typename T>
  void add(const std::vector<T>& values) {
    add(static_cast<int32_t>(values.size()));
    for (const T& value : values) add(number_of(value));
  }
  std::vector<int32_t> finish() {
    numbers_[0] = static_cast<int32_t>(numbers_.size()) - 1;
    return std::move(numbers_);
  }

 private:
  static int32_t number_of(int32_t value) { return value; }
  static int32_t number_of(BlockId block) { return block.value; }

  std::vector<int32_t> numbers_;
};

class Reader {
 public:
  explicit Reader(std::span<const int32_t> numbers) : rest_(numbers) {}
  bool is_good() const { return is_good_; }
  bool is_at_end() const { return rest_.empty(); }
  int32_t next() {
    if (rest_.empty()) {
      is_good_ = false;
      return 0;
    }
    const int32_t value = rest_.front();
    rest_ = rest_.subspan(1);
    return value;
  }
  // How many things of at least one number each follow.
  int32_t next_count() {
    const int32_t count = next();
    if (count >= 0 && static_cast<size_t>(count) <= rest_.size()) return count;
    is_good_ = false;
    return 0;
  }
  template <typename T>
  void read(std::vector<T>& values) {
    const int32_t count = next_count();
    values.reserve(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i) values.push_back(T(next()));
  }

 private:
  std::span<const int32_t> rest_;
  bool is_good_ = true;
};

}  // namespace

std::vector<int32_t> write_order(const model::Batch& batch, const CacheNews& news, bool has_part) {
  Writer out;
  out.add(has_part ? 1 : 0);
  out.add(batch.tokens);
  out.add(batch.logit_rows);
  out.add(batch.split_row);
  out.add(static_cast<int32_t>(batch.chunks.size()));
  for (const model::Chunk& chunk : batch.chunks) {
    out.add(chunk.first_row);
    out.add(chunk.num_rows);
    out.add(chunk.first_position);
    out.add(chunk.is_prompt ? 1 : 0);
    out.add(chunk.blocks);
  }
  out.add(news.received);
  out.add(news.filled);
  out.add(std::bit_cast<int32_t>(news.fill_value));
  return out.finish();
}

Result<StepOrder> read_order(std::span<const int32_t> numbers) {
  Reader in(numbers);
  StepOrder order;
  order.has_part = in.next() != 0;
  in.read(order.batch.tokens);
  in.read(order.batch.logit_rows);
  order.batch.split_row = in.next();
  const int32_t num_chunks = in.next_count();
  for (int32_t i = 0; i < num_chunks && in.is_good(); ++i) {
    model::Chunk chunk;
    chunk.first_row = in.next();
    chunk.num_rows = in.next();
    chunk.first_position = in.next();
    chunk.is_prompt = in.next() != 0;
    in.read(chunk.blocks);
    order.batch.chunks.push_back(std::move(chunk));
  }
  in.read(order.news.received);
  in.read(order.news.filled);
  order.news.fill_value = std::bit_cast<float>(in.next());
  if (in.is_good() && in.is_at_end()) return order;
  return make_error(ErrorKind::kDataLoss, "an order of {} numbers to a tensor rank cannot be read; run the same program on "
                                          "all ranks",
                    numbers.size());
}

}  // namespace tandem::tp
