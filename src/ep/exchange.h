// Experts spread over the ranks of a group: model::ExpertExchange over the windows of a fabric.
//
// An exchange writes each row with the slots of its experts into a record (window_plan.h), a backend brings the records
// to where their experts are (dispatcher.h), and the rank that computes a slot writes its output straight to its place
// in the owner's window: each place has one writer. A counter then says that all outputs for an owner are there.
//
// An owner's outputs may be overwritten by its next dispatch only: nobody computes a slot of a row that was not sent.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "src/ep/dispatcher.h"
#include "src/ep/expert_map.h"
#include "src/ep/window_plan.h"
#include "src/eplb/expert_load.h"
#include "src/group/fabric.h"
#include "src/model/device_tensor.h"
#include "src/model/expert_exchange.h"

namespace tandem::ep {

class Exchange final : public model::ExpertExchange, public group::FabricUser {
 public:
  // Bytes of every window from options.window_offset on. Windows must be memory that operations of `ops` can address.
  static int64_t window_bytes(const ExchangeOptions& options, const kernels::Ops& ops,
                              const model::ExchangeShape& shape, int32_t num_ranks);

  // `shard` is one of make_shard().
  Exchange(model::ExpertShard shard, const ExchangeOptions& options, LaneChannels channels = {});
  ~Exchange() override;

  const ExchangeOptions& options() const { return options_; }
  const WindowPlan& plan() const { return plan_; }
  // Where the part of the windows ends that belongs to this exchange, its second lane included.
  int64_t window_end() const;

  // Between steps and after prepare(). The fabric has as many ranks as the shard says.
  void attach(group::Fabric& fabric) override;
  void detach() override;
  // Between steps, on all ranks alike: the experts of one layer lie so from now on. The weights have moved already.
  void set_map(int64_t layer, ExpertMap map);

  // Adds to nothing, replaces: how often this rank's rows chose each expert since the last call.
  void take_counts(eplb::ExpertLoad& counts);

  const model::ExpertShard& shard() const override { return shard_; }
  Exchange& lane(int index) override;
  int64_t extra_bytes(const kernels::Ops& ops, const model::ExchangeShape& shape) const override;
  void prepare(kernels::Ops& ops, kernels::Stream& stream, const model::ExchangeShape& shape) override;
  Status dispatch(int64_t layer, const kernels::Tensor& hidden, const kernels::Tensor& ids) override;
  Result<model::ReceivedSlots> receive() override;
  Status give_back() override;
  Result<kernels::Tensor> collect() override;

 private:
  enum class Phase : uint8_t { kIdle, kReceiving, kComputing, kCollecting, kFailed };

  // A slot of the present batch that is computed here.
  struct Arrival {
    int32_t place = 0;  // record * top_k + j
    int32_t local = 0;  // expert
    int32_t source = 0;
    int32_t slot = 0;  // row * top_k + j of its owner
  };
  // A slot that goes to a rank whose window is not mapped.
  struct StagedOutput {
    int32_t source = 0;
    int64_t slot = 0;
  };

  const int32_t* record_tag(int64_t record) const {
    return reinterpret_cast<const int32_t*>(own_part_ + plan_.record_offset(record) + plan_.tag_offset());
  }
  void write_records(const kernels::Tensor& hidden, const kernels::Tensor& ids);
  Status take_batch();
  Status take_slots(const RecordRange& range);
  model::ReceivedSlots sort_slots(std::span<const Arrival> slots);
  int64_t target_of(int32_t source, int64_t slot);
  void tell_owners();
  Status fail(Status status);

  const model::ExpertShard shard_;
  const ExchangeOptions options_;
  const LaneChannels channels_;
  std::unique_ptr<Exchange> second_;  // lane 1; null without
  WindowPlan plan_;
  model::ExchangeShape shape_;
  kernels::Ops* ops_ = nullptr;
  kernels::Stream* stream_ = nullptr;
  std::vector<ExpertMap> maps_;  // of each layer
  int64_t max_slots_ = 0;
  model::DeviceTensor order_;    // [max_slots, 1]
  model::DeviceTensor targets_;  // [max_slots, 1]
  model::DeviceTensor offsets_;  // [slots per rank + 1, 1]
  model::DeviceTensor staging_;  // [max_slots, H]; only with ranks whose windows are not mapped

  group::Fabric* fabric_ = nullptr;
  std::byte* own_part_ = nullptr;  // of this rank's window
  std::unique_ptr<Dispatcher> dispatcher_;
  std::vector<int64_t> output_bases_;  // per rank: of its outputs, in floats from those of this rank
  std::vector<bool> is_mapped_;

  Phase phase_ = Phase::kIdle;
  std::optional<Error> why_failed_;
  uint64_t sequence_ = 0;  // exchanges of this epoch
  int64_t layer_ = 0;
  OutgoingRows outgoing_;
  std::vector<int32_t> ids_;  // [T, k]
  eplb::ExpertLoad counts_;
  std::vector<Arrival> arrivals_;
  size_t next_arrival_ = 0;
  std::vector<bool> owes_;  // per rank: this one has got records of it
  std::vector<int32_t> sorted_order_;
  std::vector<int64_t> sorted_targets_;
  std::vector<int32_t> sorted_offsets_;
  std::vector<StagedOutput> staged_;
  bool has_unsent_outputs_ = false;  // staging_ may still be read
  bool has_unsent_records_ = false;
};

}  // namespace tandem::ep
