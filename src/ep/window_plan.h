// What lies where in the window of every rank. All ranks have the same plan, so a peer's places are known without
// asking.
//
//   counts    high_throughput: [2][ranks][ranks] int32, rows from one rank to another, of even and odd exchanges
//   records   rows that wait for their experts, own ones and those of others
//   outputs   f32 [max_rows * top_k, H]: of this rank's slots, each written by the rank that computes it
//
// A record is a row as Ops::encode_expert_rows writes it, then int32: its number in its owner's batch, and the physical
// slot (ExpertMap) of each of its top_k experts. It is the same for all receivers; each takes what names its own slots.
#pragma once

#include <cstdint>

#include "src/ep/all2all.h"
#include "src/kernels/ops.h"
#include "src/model/expert_exchange.h"

namespace tandem::ep {

struct ExchangeOptions {
  All2All backend = All2All::kAllGather;
  kernels::RowFormat row_format = kernels::RowFormat::kExact;
  // Most slots of one receive(): it bounds the scratch of expert_mlp_encoded. 0: max_rows * top_k, those of one rank.
  int64_t max_slots = 0;
  // high_throughput: rows of others that a rank takes at once. 0: twice max_rows. More come in further rounds.
  int64_t received_rows = 0;
  // Where the exchange's part of the windows begins; a multiple of 64.
  int64_t window_offset = 0;
  // 2: a second exchange behind it, for the second part of a step, which has at most half of the rows.
  int num_lanes = 1;
};

struct WindowPlan {
  All2All backend = All2All::kAllGather;
  int32_t num_ranks = 1;
  int64_t max_rows = 0;
  int64_t top_k = 0;
  int64_t hidden = 0;
  int64_t row_bytes = 0;      // of the widest row of all layers
  int64_t record_bytes = 0;   // multiple of 64
  int64_t received_rows = 0;  // records of others that fit; rank-major backends: of each rank, own included
  int64_t num_records = 0;

  // Offsets from the begin of the exchange's part.
  int64_t records = 0;
  int64_t outputs = 0;
  int64_t bytes = 0;

  bool is_rank_major() const { return backend == All2All::kLowLatency || backend == All2All::kAllGather; }
  // Where the records of a rank begin in its own window, and where those of others do.
  int64_t first_own(int32_t rank) const { return is_rank_major() ? rank * max_rows : 0; }
  int64_t first_received(int32_t source) const { return is_rank_major() ? source * max_rows : max_rows; }
  int64_t record_offset(int64_t record) const { return records + record * record_bytes; }
  // In a row of `row_bytes` or less, the integers begin here.
  int64_t tag_offset() const { return row_bytes; }
  int64_t count_offset(uint64_t sequence, int32_t source) const {
    return (static_cast<int64_t>(sequence % 2) * num_ranks + source) * num_ranks * int64_t{sizeof(int32_t)};
  }
  int64_t output_offset(int64_t slot) const { return outputs + slot * hidden * int64_t{sizeof(float)}; }
};

WindowPlan plan_window(const ExchangeOptions& options, const kernels::Ops& ops, const model::ExchangeShape& shape,
                       int32_t num_ranks);

}  // namespace tandem::ep
