// low_latency and allgather_reducescatter: every rank has a place for max_rows records of each other one and takes them
// there at any time; their number travels with the counter that announces them. low_latency sends a row to the ranks
// that have a slot of it, the other one all rows to all.
//
// A place may be written again without asking. A rank sends the next records to a peer only after it has collected the
// outputs of the last ones that it sent there, and outputs come after the records are consumed.
//
// For the same reason a counter that is one exchange ahead says that its rank has sent nothing here in the present one:
// it would otherwise still wait for outputs. Two ahead it cannot be, since it waits for this rank's counter too.
#include "src/ep/dispatcher.h"
#include "src/ep/limits.h"

namespace tandem::ep {
namespace {

using group::RankId;

class RankMajorDispatcher final : public Dispatcher {
 public:
  using Dispatcher::Dispatcher;

  Status send(uint64_t sequence, const OutgoingRows& rows) override {
    sequence_ = sequence;
    rows_ = &rows;
    is_received_ = false;
    for (int32_t i = 0; i < num_peers(); ++i) {
      const int32_t to = peer(i);
      const int64_t first = plan_.first_received(own_rank());
      if (plan_.backend == All2All::kAllGather) {
        send_all_records(to, rows.num_rows, first);
      } else {
        send_records(to, rows.rows_of_rank[static_cast<size_t>(to)], first);
      }
      fabric_.signal(RankId(to), channels_.dispatch, count_value(sequence, num_sent_to(to)));
    }
    return {};
  }

  Result<RecordBatch> next() override {
    RecordBatch batch;
    if (is_received_) return batch;
    is_received_ = true;
    if (rows_->num_rows > 0) batch.push_back(own_range(*rows_));
    for (int32_t i = num_peers(); i-- > 0;) {  // who sent here first comes first
      const int32_t source = peer(i);
      TANDEM_TRY(fabric_.wait(RankId(source), channels_.dispatch, count_value(sequence_, 0)));
      const uint64_t value = fabric_.signalled(RankId(source), channels_.dispatch);
      const int64_t count = sequence_of(value) == sequence_ ? count_of(value) : 0;
      if (count > 0) batch.push_back({source, plan_.first_received(source), count});
    }
    return batch;
  }

  bool has_sent_to(int32_t rank) const override { return rank != own_rank() && num_sent_to(rank) > 0; }

 private:
  int64_t num_sent_to(int32_t rank) const {
    if (plan_.backend == All2All::kAllGather) return rows_->num_rows;
    return std::ssize(rows_->rows_of_rank[static_cast<size_t>(rank)]);
  }

  uint64_t sequence_ = 0;
  const OutgoingRows* rows_ = nullptr;
  bool is_received_ = false;
};

}  // namespace

std::unique_ptr<Dispatcher> make_rank_major_dispatcher(const DispatcherParts& parts) {
  return std::make_unique<RankMajorDispatcher>(parts);
}

}  // namespace tandem::ep
