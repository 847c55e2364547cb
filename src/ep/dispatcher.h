// How the records of one exchange reach the ranks that compute their slots: what the backends differ in.
//
// For every exchange send() is called once, then next() until it gives nothing. A batch is consumed when next() is called
// again; until then its records stay as they are. Records of this rank never travel: they come as a range of their own,
// in a batch that the backend chooses.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "src/base/result.h"
#include "src/ep/window_plan.h"
#include "src/group/fabric.h"

namespace tandem::ep {

// Neighbouring records in this rank's window, of one source.
struct RecordRange {
  int32_t source = 0;
  int64_t first_record = 0;
  int64_t count = 0;
};
using RecordBatch = std::vector<RecordRange>;

// This rank's records of one exchange; they stand in its own window.
struct OutgoingRows {
  int64_t num_rows = 0;
  std::vector<std::vector<int32_t>> rows_of_rank;  // per rank: ascending rows that have a slot there, own rank included
};

// The counters of an exchange.
struct LaneChannels {
  group::Channel counts = group::Channel::kCounts;
  group::Channel dispatch = group::Channel::kDispatch;
  group::Channel combine = group::Channel::kCombine;
};
inline constexpr LaneChannels kSecondLane{group::Channel::kSecondCounts, group::Channel::kSecondDispatch,
                                          group::Channel::kSecondCombine};

// What a dispatcher works with; `fabric` and `plan` outlive it.
struct DispatcherParts {
  group::Fabric& fabric;
  const WindowPlan& plan;
  int64_t window_offset = 0;
  LaneChannels channels;
};

class Dispatcher {
 public:
  explicit Dispatcher(const DispatcherParts& parts)
      : fabric_(parts.fabric), plan_(parts.plan), window_offset_(parts.window_offset), channels_(parts.channels) {}
  virtual ~Dispatcher() = default;

  // `sequence` counts exchanges from 1. `rows` stays valid until the last next().
  virtual Status send(uint64_t sequence, const OutgoingRows& rows) = 0;
  // An empty batch: none are left.
  virtual Result<RecordBatch> next() = 0;
  // Of the last send(): whether records went to `rank`, which will then tell when their outputs are there.
  virtual bool has_sent_to(int32_t rank) const = 0;

 protected:
  int32_t own_rank() const { return fabric_.rank().value; }
  int32_t num_ranks() const { return plan_.num_ranks; }
  // The ranks but the own one, each rank beginning with its successor, so that not all write to the same one at once.
  int32_t peer(int32_t index) const { return (own_rank() + 1 + index) % num_ranks(); }
  int32_t num_peers() const { return num_ranks() - 1; }

  // Writes own records to `to`, one after the other from record `first_record` on.
  void send_records(int32_t to, std::span<const int32_t> rows, int64_t first_record);
  void send_all_records(int32_t to, int64_t num_rows, int64_t first_record);
  RecordRange own_range(const OutgoingRows& rows) const {
    return {own_rank(), plan_.first_own(own_rank()), rows.num_rows};
  }

  group::Fabric& fabric_;
  const WindowPlan& plan_;
  const int64_t window_offset_;
  const LaneChannels channels_;

 private:
  void send_block(int32_t to, int64_t row, int64_t count, int64_t first_record);
};

std::unique_ptr<Dispatcher> make_dispatcher(const DispatcherParts& parts);
std::unique_ptr<Dispatcher> make_naive_dispatcher(const DispatcherParts& parts);
std::unique_ptr<Dispatcher> make_rank_major_dispatcher(const DispatcherParts& parts);
std::unique_ptr<Dispatcher> make_counted_dispatcher(const DispatcherParts& parts);

}  // namespace tandem::ep
