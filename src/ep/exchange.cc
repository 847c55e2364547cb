#include "src/ep/exchange.h"

#include <algorithm>
#include <utility>

#include "src/base/check.h"
#include "src/ep/limits.h"

namespace tandem::ep {

using group::RankId;
using kernels::DType;
using kernels::Tensor;
using model::ReceivedSlots;

namespace {

constexpr int64_t kPrefetchedTags = 16;

// Of the second lane. Rounded up: tensor ranks share the rows of each part.
model::ExchangeShape second_shape(const model::ExchangeShape& first) {
  model::ExchangeShape shape = first;
  shape.max_rows = (first.max_rows + 1) / 2;
  return shape;
}

ExchangeOptions second_options(const ExchangeOptions& first, int64_t window_offset) {
  ExchangeOptions options = first;
  options.num_lanes = 1;
  options.window_offset = window_offset;
  return options;
}

}  // namespace

int64_t Exchange::window_bytes(const ExchangeOptions& options, const kernels::Ops& ops,
                               const model::ExchangeShape& shape, int32_t num_ranks) {
  const int64_t first = plan_window(options, ops, shape, num_ranks).bytes;
  if (options.num_lanes == 1) return first;
  return first + plan_window(second_options(options, 0), ops, second_shape(shape), num_ranks).bytes;
}

Exchange::Exchange(model::ExpertShard shard, const ExchangeOptions& options, LaneChannels channels)
    : shard_(std::move(shard)), options_(options), channels_(channels) {
  CHECK_EQ(options.window_offset % 64, 0);
  CHECK(options.num_lanes == 1 || options.num_lanes == 2);
}

Exchange::~Exchange() = default;

// The window's outputs take the place of a buffer that a rank with all experts has, too. A second lane has none to
// replace.
int64_t Exchange::extra_bytes(const kernels::Ops& ops, const model::ExchangeShape& shape) const {
  const WindowPlan first = plan_window(options_, ops, shape, shard_.num_ranks);
  return window_bytes(options_, ops, shape, shard_.num_ranks) - (first.bytes - first.outputs);
}

int64_t Exchange::window_end() const {
  return second_ != nullptr ? second_->window_end() : options_.window_offset + plan_.bytes;
}

Exchange& Exchange::lane(int index) {
  if (index == 0) return *this;
  CHECK_EQ(index, 1);
  CHECK(second_ != nullptr);
  return *second_;
}

void Exchange::prepare(kernels::Ops& ops, kernels::Stream& stream, const model::ExchangeShape& shape) {
  CHECK(ops_ == nullptr);
  ops_ = &ops;
  stream_ = &stream;
  shape_ = shape;
  plan_ = plan_window(options_, ops, shape, shard_.num_ranks);
  const ExpertMap map = ExpertMap::contiguous(shard_.num_ranks, static_cast<int32_t>(shape.num_experts));
  maps_.assign(shape.formats.size(), map);
  max_slots_ = options_.max_slots > 0 ? options_.max_slots : shape.max_rows * shape.top_k;
  order_ = model::DeviceTensor(ops, DType::kI32, max_slots_, 1);
  targets_ = model::DeviceTensor(ops, DType::kI64, max_slots_, 1);
  offsets_ = model::DeviceTensor(ops, DType::kI32, std::ssize(shard_.slots) + 1, 1);
  counts_ = eplb::ExpertLoad(std::ssize(shape.formats), shape.num_experts);
  if (options_.num_lanes == 1) return;
  second_ = std::make_unique<Exchange>(shard_, second_options(options_, window_end()), kSecondLane);
  second_->prepare(ops, stream, second_shape(shape));
}

void Exchange::set_map(int64_t layer, ExpertMap map) {
  CHECK(phase_ == Phase::kIdle || phase_ == Phase::kFailed);
  CHECK_EQ(map.num_experts(), shape_.num_experts);
  CHECK_EQ(map.slots_per_rank(), std::ssize(shard_.slots));
  if (second_ != nullptr) second_->set_map(layer, map);
  maps_[static_cast<size_t>(layer)] = std::move(map);
}

void Exchange::take_counts(eplb::ExpertLoad& counts) {
  std::swap(counts, counts_);
  counts_.clear();
  if (second_ == nullptr) return;
  counts.add(second_->counts_);
  second_->counts_.clear();
}

void Exchange::attach(group::Fabric& fabric) {
  CHECK(ops_ != nullptr);
  CHECK_EQ(fabric.size(), shard_.num_ranks);
  CHECK_EQ(fabric.rank().value, shard_.rank);
  CHECK_GE(std::ssize(fabric.window()), options_.window_offset + plan_.bytes);
  fabric_ = &fabric;
  own_part_ = fabric.window().data() + options_.window_offset;
  dispatcher_ = make_dispatcher({fabric, plan_, options_.window_offset, channels_});
  sequence_ = 0;
  phase_ = Phase::kIdle;
  why_failed_.reset();
  const size_t ranks = static_cast<size_t>(fabric.size());
  output_bases_.assign(ranks, 0);
  is_mapped_.assign(ranks, true);
  outgoing_.rows_of_rank.resize(ranks);
  for (size_t r = 0; r < ranks; ++r) {
    std::byte* const peer = fabric.direct(RankId(static_cast<int32_t>(r)));
    is_mapped_[r] = peer != nullptr;
    if (peer == nullptr) continue;
    const int64_t distance = static_cast<int64_t>(reinterpret_cast<intptr_t>(peer) -
                                                  reinterpret_cast<intptr_t>(fabric.window().data()));
    CHECK_EQ(distance % static_cast<int64_t>(sizeof(float)), 0);
    output_bases_[r] = distance / static_cast<int64_t>(sizeof(float));
  }
  const bool has_remote = std::find(is_mapped_.begin(), is_mapped_.end(), false) != is_mapped_.end();
  if (has_remote && staging_.bytes() == 0) staging_ = model::DeviceTensor(*ops_, DType::kF32, max_slots_, plan_.hidden);
  has_unsent_outputs_ = false;
  has_unsent_records_ = false;
  if (second_ != nullptr) second_->attach(fabric);
}

void Exchange::detach() {
  dispatcher_.reset();
  fabric_ = nullptr;
  if (second_ != nullptr) second_->detach();
}

Status Exchange::fail(Status status) {
  if (status.ok() || phase_ == Phase::kFailed) return status;
  phase_ = Phase::kFailed;
  why_failed_ = status.error();
  return status;
}

Status Exchange::dispatch(int64_t layer, const Tensor& hidden, const Tensor& ids) {
  if (fabric_ == nullptr) return make_error(ErrorKind::kUnavailable, "the group of ranks does not stand");
  if (phase_ == Phase::kFailed) return *why_failed_;
  CHECK(phase_ == Phase::kIdle);
  CHECK_LE(hidden.rows, plan_.max_rows);
  CHECK_EQ(ids.rows, hidden.rows);
  CHECK_EQ(ids.cols, plan_.top_k);
  TANDEM_TRY(fail(fabric_->status()));
  fabric_->beat();
  layer_ = layer;
  ++sequence_;
  owes_.assign(output_bases_.size(), false);
  arrivals_.clear();
  next_arrival_ = 0;
  outgoing_.num_rows = hidden.rows;
  // Not sooner: until now what left with the exchange before could travel beside other work.
  if (std::exchange(has_unsent_records_, false)) TANDEM_TRY(fail(fabric_->flush()));
  write_records(hidden, ids);
  TANDEM_TRY(fail(dispatcher_->send(sequence_, outgoing_)));
  has_unsent_records_ = true;
  phase_ = Phase::kReceiving;
  return {};
}

// Rows are encoded where they will be read: own ones never move.
void Exchange::write_records(const Tensor& hidden, const Tensor& ids) {
  for (std::vector<int32_t>& rows : outgoing_.rows_of_rank) rows.clear();
  if (hidden.rows == 0) return;
  const kernels::WeightFormat& format = shape_.formats[static_cast<size_t>(layer_)];
  const int64_t row_bytes = ops_->expert_row_bytes(options_.row_format, format, plan_.hidden);
  std::byte* const records = own_part_ + plan_.record_offset(plan_.first_own(shard_.rank));
  const Tensor rows{records, DType::kU8, hidden.rows, row_bytes, plan_.record_bytes};
  ops_->encode_expert_rows(*stream_, hidden, format, {rows, options_.row_format});
  ids_.resize(static_cast<size_t>(ids.rows * ids.cols));
  const bool is_dense = ids.stride == ids.cols;
  const int64_t piece_rows = is_dense ? ids.rows : 1;
  for (int64_t t = 0; t < ids.rows; t += piece_rows) {
    const std::span<int32_t> piece = std::span(ids_).subspan(static_cast<size_t>(t * ids.cols),
                                                             static_cast<size_t>(piece_rows * ids.cols));
    ops_->read_back(*stream_, ids.address + t * ids.stride * int64_t{sizeof(int32_t)}, std::as_writable_bytes(piece));
  }
  const std::span<int64_t> counts = counts_.layer(layer_);
  for (const int32_t expert : ids_) ++counts[static_cast<size_t>(expert)];
  const ExpertMap& map = maps_[static_cast<size_t>(layer_)];
  for (int64_t t = 0; t < ids.rows; ++t) {
    int32_t* const tag = reinterpret_cast<int32_t*>(records + t * plan_.record_bytes + plan_.tag_offset());
    tag[0] = static_cast<int32_t>(t);
    for (int64_t j = 0; j < plan_.top_k; ++j) {
      // Successive steps choose other copies for the same row.
      const int64_t key = t + static_cast<int64_t>(sequence_);
      const int32_t slot = map.slot_of(ids_[static_cast<size_t>(t * plan_.top_k + j)], key);
      tag[1 + j] = slot;
      std::vector<int32_t>& to = outgoing_.rows_of_rank[static_cast<size_t>(slot / map.slots_per_rank())];
      if (to.empty() || to.back() != t) to.push_back(static_cast<int32_t>(t));
    }
  }
  ops_->synchronize(*stream_);
}

Result<ReceivedSlots> Exchange::receive() {
  if (phase_ == Phase::kFailed) return *why_failed_;
  CHECK(phase_ == Phase::kReceiving);
  if (next_arrival_ == arrivals_.size()) {
    const Status taken = fail(take_batch());
    if (!taken.ok()) return taken.error();
  }
  if (arrivals_.empty()) {
    tell_owners();
    phase_ = Phase::kCollecting;
    return ReceivedSlots{};
  }
  const size_t count = std::min(arrivals_.size() - next_arrival_, static_cast<size_t>(max_slots_));
  const std::span<const Arrival> slots = std::span<const Arrival>(arrivals_).subspan(next_arrival_, count);
  next_arrival_ += count;
  // The outputs are staged where the last ones were.
  if (std::exchange(has_unsent_outputs_, false)) {
    const Status flushed = fail(fabric_->flush());
    if (!flushed.ok()) return flushed.error();
  }
  phase_ = Phase::kComputing;
  return sort_slots(slots);
}

// The next slots to be computed here; none when there are no more.
Status Exchange::take_batch() {
  arrivals_.clear();
  next_arrival_ = 0;
  while (arrivals_.empty()) {
    TANDEM_ASSIGN(const RecordBatch batch, dispatcher_->next());
    if (batch.empty()) return {};
    for (const RecordRange& range : batch) TANDEM_TRY(take_slots(range));
  }
  return {};
}

// What a peer has written is checked before anything is computed or written by it.
Status Exchange::take_slots(const RecordRange& range) {
  if (range.count > plan_.max_rows) {
    return make_error(ErrorKind::kDataLoss, "rank {} has sent {} rows at once; a step has at most {}", range.source,
                      range.count, plan_.max_rows);
  }
  if (range.source != shard_.rank) owes_[static_cast<size_t>(range.source)] = true;
  const int32_t slots_per_rank = maps_[static_cast<size_t>(layer_)].slots_per_rank();
  const int32_t first = shard_.rank * slots_per_rank;
  const int32_t num_local = static_cast<int32_t>(shard_.slots.size());
  const int64_t end = range.first_record + range.count;
  for (int64_t record = range.first_record; record < end; ++record) {
    // Tags are far apart, and in another core's cache.
    __builtin_prefetch(record_tag(std::min(record + kPrefetchedTags, end - 1)));
    const int32_t* const tag = record_tag(record);
    const int64_t row = tag[0];
    if (row < 0 || row >= plan_.max_rows) {
      return make_error(ErrorKind::kDataLoss, "a record of rank {} is of row {}; a step has at most {}", range.source,
                        row, plan_.max_rows);
    }
    for (int64_t j = 0; j < plan_.top_k; ++j) {
      const int32_t local = tag[1 + j] - first;
      if (local < 0 || local >= slots_per_rank) continue;
      if (local >= num_local) {
        return make_error(ErrorKind::kDataLoss, "a record of rank {} asks for expert {} of rank {}, which has {}",
                          range.source, local, shard_.rank, num_local);
      }
      arrivals_.push_back({static_cast<int32_t>(record * plan_.top_k + j), local, range.source,
                           static_cast<int32_t>(row * plan_.top_k + j)});
    }
  }
  return {};
}

// By expert: a counting sort.
ReceivedSlots Exchange::sort_slots(std::span<const Arrival> arrivals) {
  sorted_offsets_.assign(shard_.slots.size() + 1, 0);
  sorted_order_.resize(arrivals.size());
  sorted_targets_.resize(arrivals.size());
  for (const Arrival& arrival : arrivals) ++sorted_offsets_[static_cast<size_t>(arrival.local) + 1];
  for (size_t e = 0; e < shard_.slots.size(); ++e) sorted_offsets_[e + 1] += sorted_offsets_[e];
  std::vector<int32_t> next(sorted_offsets_.begin(), sorted_offsets_.end() - 1);
  staged_.clear();
  for (const Arrival& arrival : arrivals) {
    const size_t place = static_cast<size_t>(next[static_cast<size_t>(arrival.local)]++);
    sorted_order_[place] = arrival.place;
    sorted_targets_[place] = target_of(arrival.source, arrival.slot);
  }

  ReceivedSlots slots;
  slots.count = std::ssize(arrivals);
  const int64_t row_bytes = ops_->expert_row_bytes(options_.row_format, shape_.formats[static_cast<size_t>(layer_)],
                                                   plan_.hidden);
  slots.rows = {Tensor{own_part_ + plan_.records, DType::kU8, plan_.num_records, row_bytes, plan_.record_bytes},
                options_.row_format};
  slots.order = order_.upload(*ops_, *stream_, std::span<const int32_t>(sorted_order_));
  slots.offsets = offsets_.upload(*ops_, *stream_, std::span<const int32_t>(sorted_offsets_));
  slots.targets = targets_.upload(*ops_, *stream_, std::span<const int64_t>(sorted_targets_));
  slots.out = reinterpret_cast<float*>(own_part_ + plan_.outputs);
  return slots;
}

// In floats from this rank's outputs.
int64_t Exchange::target_of(int32_t source, int64_t slot) {
  const size_t owner = static_cast<size_t>(source);
  if (is_mapped_[owner]) return output_bases_[owner] + slot * plan_.hidden;
  const intptr_t staging = reinterpret_cast<intptr_t>(staging_.all().address);
  const intptr_t own = reinterpret_cast<intptr_t>(own_part_ + plan_.outputs);
  const int64_t place = std::ssize(staged_);
  staged_.push_back({source, slot});
  return static_cast<int64_t>(staging - own) / static_cast<int64_t>(sizeof(float)) + place * plan_.hidden;
}

Status Exchange::give_back() {
  if (phase_ == Phase::kFailed) return *why_failed_;
  CHECK(phase_ == Phase::kComputing);
  ops_->synchronize(*stream_);
  fabric_->beat();
  const int64_t bytes = plan_.hidden * int64_t{sizeof(float)};
  for (size_t i = 0; i < staged_.size(); ++i) {
    const std::byte* const from = staging_.all().address + static_cast<int64_t>(i) * bytes;
    fabric_->put(RankId(staged_[i].source), options_.window_offset + plan_.output_offset(staged_[i].slot),
                 std::span(from, static_cast<size_t>(bytes)));
  }
  has_unsent_outputs_ = !staged_.empty();
  phase_ = Phase::kReceiving;
  return {};
}

void Exchange::tell_owners() {
  for (int32_t i = 1; i < shard_.num_ranks; ++i) {
    const int32_t owner = (shard_.rank + i) % shard_.num_ranks;
    if (owes_[static_cast<size_t>(owner)]) fabric_->signal(RankId(owner), channels_.combine, sequence_);
  }
}

Result<Tensor> Exchange::collect() {
  if (phase_ == Phase::kFailed) return *why_failed_;
  CHECK(phase_ == Phase::kCollecting);
  for (int32_t i = 1; i < shard_.num_ranks; ++i) {
    const int32_t from = (shard_.rank + i) % shard_.num_ranks;
    if (!dispatcher_->has_sent_to(from)) continue;
    const Status done = fail(fabric_->wait(RankId(from), channels_.combine, sequence_));
    if (!done.ok()) return done.error();
  }
  phase_ = Phase::kIdle;
  const int64_t slots = outgoing_.num_rows * plan_.top_k;
  return Tensor{own_part_ + plan_.outputs, DType::kF32, slots, plan_.hidden, plan_.hidden};
}

}  // namespace tandem::ep
