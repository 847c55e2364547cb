// high_throughput: all ranks tell all others how many rows go from whom to whom. So every rank knows where its rows lie
// among those of a receiver, which stand there one behind the other, by source, without gaps.
//
// A receiver with less room than rows takes them in rounds: the row at position p of all that it gets comes in round
// p / room. Every rank goes through all rounds of the group, in each: it tells those who send it rows in this round that
// there is room, sends its own of this round where there is, then takes what came. All ranks finish a round's sending
// without waiting for anything but others' entering it, so nobody waits in a circle.
//
// In the first round there is room everywhere: a rank tells its counts when it is done with the exchange before.
#include <algorithm>
#include <cstring>

#include "src/ep/dispatcher.h"
#include "src/ep/limits.h"

namespace tandem::ep {
namespace {

using group::RankId;

class CountedDispatcher final : public Dispatcher {
 public:
  explicit CountedDispatcher(const DispatcherParts& parts)
      : Dispatcher(parts),
        counts_(static_cast<size_t>(num_ranks()) * static_cast<size_t>(num_ranks())),
        positions_(counts_.size() + static_cast<size_t>(num_ranks())) {}

  Status send(uint64_t sequence, const OutgoingRows& rows) override {
    sequence_ = sequence;
    rows_ = &rows;
    round_ = 0;
    TANDEM_TRY(exchange_counts());
    num_rounds_ = 1;
    for (int32_t to = 0; to < num_ranks(); ++to) {
      for (int32_t from = 0; from < num_ranks(); ++from) {
        positions_[index(from + 1, to)] = positions_[index(from, to)] + count(from, to);
      }
      const int64_t total = positions_[index(num_ranks(), to)];
      if (total > 0) num_rounds_ = std::max(num_rounds_, (total + plan_.received_rows - 1) / plan_.received_rows);
    }
    CHECK_LE(num_rounds_, kMaxRounds);
    return send_round(0);
  }

  Result<RecordBatch> next() override {
    RecordBatch batch;
    while (batch.empty() && round_ < num_rounds_) {
      if (round_ > 0) {
        offer_room(round_);
        TANDEM_TRY(send_round(round_));
      } else if (!rows_->rows_of_rank[static_cast<size_t>(own_rank())].empty()) {
        batch.push_back(own_range(*rows_));
      }
      for (int32_t i = num_peers(); i-- > 0;) {
        const int32_t source = peer(i);
        const Part part = part_of(source, own_rank(), round_);
        if (part.count == 0) continue;
        TANDEM_TRY(fabric_.wait(RankId(source), channels_.dispatch, round_value(sequence_, round_ + 1)));
        batch.push_back({source, part.first_record, part.count});
      }
      ++round_;
    }
    return batch;
  }

  bool has_sent_to(int32_t rank) const override { return rank != own_rank() && count(own_rank(), rank) > 0; }

 private:
  // Rows of one source that come to a rank in one round.
  struct Part {
    int64_t first_row = 0;  // among those of this source for this rank
    int64_t count = 0;
    int64_t first_record = 0;
  };

  size_t index(int32_t from, int32_t to) const {
    return static_cast<size_t>(from) * static_cast<size_t>(num_ranks()) + static_cast<size_t>(to);
  }
  // Rows that travel.
  int64_t count(int32_t from, int32_t to) const { return from == to ? 0 : counts_[index(from, to)]; }

  Part part_of(int32_t from, int32_t to, int64_t round) const {
    const int64_t position = positions_[index(from, to)];
    const int64_t begin = std::max(position, round * plan_.received_rows);
    const int64_t end = std::min(position + count(from, to), (round + 1) * plan_.received_rows);
    if (begin >= end) return {};
    return {begin - position, end - begin, plan_.first_received(from) + begin - round * plan_.received_rows};
  }

  Status exchange_counts() {
    std::vector<int32_t>& own = sent_counts_;
    own.resize(static_cast<size_t>(num_ranks()));
    for (size_t r = 0; r < own.size(); ++r) own[r] = static_cast<int32_t>(rows_->rows_of_rank[r].size());
    const std::span<const std::byte> bytes = std::as_bytes(std::span(own));
    for (int32_t i = 0; i < num_peers(); ++i) {
      fabric_.put(RankId(peer(i)), window_offset_ + plan_.count_offset(sequence_, own_rank()), bytes);
      fabric_.signal(RankId(peer(i)), channels_.counts, round_value(sequence_, 0));
    }
    for (int32_t source = 0; source < num_ranks(); ++source) {
      int32_t* row = counts_.data() + static_cast<size_t>(source) * own.size();
      if (source == own_rank()) {
        std::copy(own.begin(), own.end(), row);
        continue;
      }
      TANDEM_TRY(fabric_.wait(RankId(source), channels_.counts, round_value(sequence_, 0)));
      const int64_t offset = window_offset_ + plan_.count_offset(sequence_, source);
      std::memcpy(row, fabric_.window().data() + offset, own.size() * sizeof(int32_t));
      for (size_t to = 0; to < own.size(); ++to) {
        if (row[to] >= 0 && row[to] <= plan_.max_rows) continue;
        return make_error(ErrorKind::kDataLoss, "rank {} says that it sends {} rows to rank {}; a step has at most {}",
                          source, row[to], to, plan_.max_rows);
      }
    }
    return {};
  }

  void offer_room(int64_t round) {
    for (int32_t i = 0; i < num_peers(); ++i) {
      if (part_of(peer(i), own_rank(), round).count == 0) continue;
      fabric_.signal(RankId(peer(i)), channels_.counts, round_value(sequence_, round));
    }
  }

  Status send_round(int64_t round) {
    for (int32_t i = 0; i < num_peers(); ++i) {
      const int32_t to = peer(i);
      const Part part = part_of(own_rank(), to, round);
      if (part.count == 0) continue;
      if (round > 0) TANDEM_TRY(fabric_.wait(RankId(to), channels_.counts, round_value(sequence_, round)));
      const std::span<const int32_t> rows = rows_->rows_of_rank[static_cast<size_t>(to)];
      send_records(to, rows.subspan(static_cast<size_t>(part.first_row), static_cast<size_t>(part.count)),
                   part.first_record);
      fabric_.signal(RankId(to), channels_.dispatch, round_value(sequence_, round + 1));
    }
    return {};
  }

  uint64_t sequence_ = 0;
  const OutgoingRows* rows_ = nullptr;
  std::vector<int32_t> counts_;       // [ranks, ranks]: from, to
  std::vector<int64_t> positions_;    // [ranks + 1, ranks]: of the first row of `from` among all that `to` gets
  std::vector<int32_t> sent_counts_;  // own row of counts_, as peers are sent it
  int64_t num_rounds_ = 0;
  int64_t round_ = 0;
};

}  // namespace

std::unique_ptr<Dispatcher> make_counted_dispatcher(const DispatcherParts& parts) {
  return std::make_unique<CountedDispatcher>(parts);
}

}  // namespace tandem::ep
