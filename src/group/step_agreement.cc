#include "src/group/step_agreement.h"

#include <cstring>

namespace tandem::group {
namespace {

// Two records per source, used in turn: a rank may be one round ahead of another, never two, since a round ends only
// when all have entered it.
int64_t record_offset(RankId source, uint64_t round) {
  return (int64_t{source.value} * 2 + static_cast<int64_t>(round % 2)) * static_cast<int64_t>(sizeof(StepIntent));
}

}  // namespace

int64_t StepAgreement::window_bytes(int32_t size) { return size * 2 * static_cast<int64_t>(sizeof(StepIntent)); }

bool StepAgreement::is_called() const {
  for (int32_t r = 0; r < fabric_.size(); ++r) {
    if (RankId(r) != fabric_.rank() && fabric_.signalled(RankId(r), Channel::kStep) > rounds_) return true;
  }
  return false;
}

Result<std::vector<StepIntent>> StepAgreement::agree(const StepIntent& mine) {
  TANDEM_TRY(fabric_.status());
  const uint64_t round = rounds_ + 1;
  const int64_t offset = record_offset(fabric_.rank(), round);
  for (int32_t r = 0; r < fabric_.size(); ++r) {
    fabric_.put(RankId(r), offset, std::as_bytes(std::span(&mine, 1)));
    fabric_.signal(RankId(r), Channel::kStep, round);
  }
  TANDEM_TRY(fabric_.flush());
  std::vector<StepIntent> intents(static_cast<size_t>(fabric_.size()));
  for (int32_t r = 0; r < fabric_.size(); ++r) {
    TANDEM_TRY(fabric_.wait(RankId(r), Channel::kStep, round));
    std::memcpy(&intents[static_cast<size_t>(r)], fabric_.window().data() + record_offset(RankId(r), round),
                sizeof(StepIntent));
  }
  rounds_ = round;
  return intents;
}

}  // namespace tandem::group
