// naive: the ranks take turns. In its turn a rank writes all its rows to all others, which compute their slots of them
// before the next one's turn. Turns are counted over all exchanges.
//
// The area for others' rows is one. So a rank begins its turn only when all others have told it that they are done with
// the turn before.
#include "src/ep/dispatcher.h"
#include "src/ep/limits.h"

namespace tandem::ep {
namespace {

using group::RankId;

class NaiveDispatcher final : public Dispatcher {
 public:
  using Dispatcher::Dispatcher;

  Status send(uint64_t sequence, const OutgoingRows& rows) override {
    sequence_ = sequence;
    rows_ = &rows;
    turn_ = 0;
    return {};
  }

  Result<RecordBatch> next() override {
    while (turn_ < num_ranks()) {
      if (turn_ > 0) tell_successor(turn_ - 1);
      const int32_t sender = turn_++;
      TANDEM_ASSIGN(const RecordRange range, sender == own_rank() ? send_own() : receive_from(sender));
      if (range.count > 0) return RecordBatch{range};
    }
    if (turn_ == num_ranks()) {
      tell_successor(turn_ - 1);
      ++turn_;
    }
    return RecordBatch{};
  }

  bool has_sent_to(int32_t rank) const override { return rank != own_rank() && rows_->num_rows > 0; }

 private:
  uint64_t turn_number(int32_t sender) const {
    return sequence_ * static_cast<uint64_t>(num_ranks()) + static_cast<uint64_t>(sender);
  }
  // That this rank is done with the turn of `sender`.
  void tell_successor(int32_t sender) {
    const int32_t successor = (sender + 1) % num_ranks();
    if (successor != own_rank()) fabric_.signal(RankId(successor), channels_.counts, turn_number(sender));
  }

  Result<RecordRange> send_own() {
    const bool is_first_turn = sequence_ == 1 && own_rank() == 0;
    for (int32_t i = 0; i < num_peers(); ++i) {
      const int32_t to = peer(i);
      if (!is_first_turn) TANDEM_TRY(fabric_.wait(RankId(to), channels_.counts, turn_number(own_rank()) - 1));
      send_all_records(to, rows_->num_rows, plan_.first_received(own_rank()));
      fabric_.signal(RankId(to), channels_.dispatch, count_value(turn_number(own_rank()), rows_->num_rows));
    }
    return own_range(*rows_);
  }

  // The counter cannot have gone on to a later turn of `sender`: that one begins when this rank is done with this.
  Result<RecordRange> receive_from(int32_t sender) {
    TANDEM_TRY(fabric_.wait(RankId(sender), channels_.dispatch, count_value(turn_number(sender), 0)));
    const int64_t count = count_of(fabric_.signalled(RankId(sender), channels_.dispatch));
    return RecordRange{sender, plan_.first_received(sender), count};
  }

  uint64_t sequence_ = 0;
  const OutgoingRows* rows_ = nullptr;
  int32_t turn_ = 0;
};

}  // namespace

std::unique_ptr<Dispatcher> make_naive_dispatcher(const DispatcherParts& parts) {
  return std::make_unique<NaiveDispatcher>(parts);
}

}  // namespace tandem::ep
