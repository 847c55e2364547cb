#include "src/engine/scheduler.h"

#include <algorithm>
#include <limits>
#include <unordered_set>

#include "src/base/check.h"

namespace tandem::engine {
namespace {

bool is_receiver(TransferRole role) {
  return role == TransferRole::kPushReceive || role == TransferRole::kPullReceive || role == TransferRole::kMadeUp;
}

// Another worker waits with its blocks for this.
bool ends_waiting(TransferRole role) { return role == TransferRole::kPushSend || role == TransferRole::kPullReceive; }
// Its blocks wait for what another worker does.
bool waits_elsewhere(TransferRole role) {
  return role == TransferRole::kPushReceive || role == TransferRole::kPullPublish;
}

// One row is left, and it is of the answer.
bool is_stream(const Sequence& sequence) {
  return !sequence.in_prompt() && sequence.length() - sequence.num_computed == 1;
}

}  // namespace

// A plan in the making: what is left of each resource if the plan so far is carried out.
struct Scheduler::Draft {
  StepPlan plan;
  int64_t tokens_left = 0;
  int64_t seats_left = 0;
  int64_t blocks_left = 0;
  int64_t waiting_blocks_left = std::numeric_limits<int64_t>::max();  // of blocks_left: for waits_elsewhere()
  int64_t reservations_left = std::numeric_limits<int64_t>::max();    // of seats_left
  std::optional<double> prompt_us_left;  // set while there are streams and steps are limited
  bool has_prompt_rows = false;
  std::unordered_set<RequestId> scheduled;
  std::unordered_set<RequestId> preempted;
};

Sequence& Scheduler::get(RequestId id) {
  const auto found = sequences_.find(id);
  CHECK(found != sequences_.end());
  return *found->second;
}

const Sequence& Scheduler::get(RequestId id) const { return const_cast<Scheduler*>(this)->get(id); }

Sequence* Scheduler::find(RequestId id) {
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? nullptr : found->second.get();
}

bool Scheduler::add(std::unique_ptr<Sequence> sequence) {
  if (num_waiting() >= limits_.max_num_waiting) return false;
  sequence->hashes.extend(sequence->tokens, sequence->length());
  waiting_.push_back(sequence->id);
  const RequestId id = sequence->id;
  const bool inserted = sequences_.emplace(id, std::move(sequence)).second;
  CHECK(inserted);
  return true;
}

StepPlan Scheduler::plan() const {
  Draft draft;
  draft.tokens_left = limits_.max_num_batched_tokens;
  draft.seats_left = limits_.max_num_seqs - num_running() - num_receiving_ - num_sending_;
  draft.blocks_left = pool_.num_available();
  if (limits_.room_blocks > 0) {
    draft.waiting_blocks_left = pool_.num_blocks() - limits_.room_blocks - waiting_blocks_;
    draft.reservations_left = limits_.max_num_seqs - 1 - num_reserved_;
  }
  plan_running(draft);
  // New work while others lose their blocks would only be the next to lose them.
  if (draft.plan.preempted.empty()) plan_waiting(draft);
  return std::move(draft.plan);
}

void Scheduler::plan_running(Draft& draft) const {
  for (const bool streams : {true, false}) {
    for (RequestId id : running_) {
      const Sequence& sequence = get(id);
      if (is_stream(sequence) == streams && !draft.preempted.contains(id)) plan_rows(draft, sequence);
    }
    if (streams && (!draft.plan.rows.empty() || streams_elsewhere_)) draft.prompt_us_left = budget_.prompt_us();
  }
}

// Rows from `position` on that this step may still take besides its streams.
int64_t Scheduler::rows_in_budget(const Draft& draft, int64_t position) const {
  if (!draft.prompt_us_left) return draft.tokens_left;
  int64_t rows = budget_.rows_within(*draft.prompt_us_left, position);
  if (!draft.has_prompt_rows) rows = std::max(rows, StepBudget::kRowMultiple);
  return std::min(rows, draft.tokens_left);
}

void Scheduler::take_from_budget(Draft& draft, const ScheduledRows& rows) const {
  draft.tokens_left -= rows.num_tokens;
  if (rows.is_stream) return;
  draft.has_prompt_rows = true;
  if (draft.prompt_us_left) *draft.prompt_us_left -= budget_.cost_us(rows.num_tokens, rows.first_position);
}

// Somebody in the queue would end the waiting of another worker.
bool Scheduler::ends_some_waiting() const {
  return std::any_of(waiting_.begin(), waiting_.end(), [this](RequestId id) { return ends_waiting(get(id).role); });
}

// Schedules the next rows of a running sequence if tokens and blocks allow.
bool Scheduler::plan_rows(Draft& draft, const Sequence& sequence) const {
  const int64_t end = sequence.in_prompt() ? sequence.prompt_length : sequence.length();
  const int64_t most = is_stream(sequence) ? draft.tokens_left : rows_in_budget(draft, sequence.num_computed);
  const int64_t num_tokens = std::min(end - sequence.num_computed, most);
  if (num_tokens <= 0) return false;
  const int64_t blocks_held = static_cast<int64_t>(sequence.blocks.size());
  const int64_t blocks_needed = std::max<int64_t>(0, blocks_for(sequence.num_computed + num_tokens) - blocks_held);
  if (!make_room(draft, sequence, blocks_needed)) return false;
  draft.blocks_left -= blocks_needed;
  draft.scheduled.insert(sequence.id);
  draft.plan.rows.push_back({sequence.id, sequence.num_computed, num_tokens,
                             sequence.num_computed + num_tokens == sequence.length(), is_stream(sequence)});
  take_from_budget(draft, draft.plan.rows.back());
  return true;
}

// Preempts the latest arrivals that are not yet scheduled until `blocks_needed` are free. False if that is impossible
// now; the sequence itself may have been preempted then.
bool Scheduler::make_room(Draft& draft, const Sequence& sequence, int64_t blocks_needed) const {
  // The last one would only compute the same again; but it must not keep others out of the room.
  const bool may_take_all = waiting_blocks_ > 0 && limits_.room_blocks > 0 && ends_some_waiting();
  for (size_t i = running_.size(); blocks_needed > draft.blocks_left && i-- > 0;) {
    const Sequence& victim = get(running_[i]);
    const bool only_one_left = running_.size() == draft.preempted.size() + 1 && !may_take_all;
    if (victim.transfer || draft.scheduled.contains(victim.id) || draft.preempted.contains(victim.id) ||
        only_one_left) {
      continue;
    }
    for (BlockId block : victim.blocks) {
      if (pool_.holders(block) == 1) ++draft.blocks_left;
    }
    draft.preempted.insert(victim.id);
    draft.plan.preempted.push_back(victim.id);
    if (victim.id == sequence.id) return false;
  }
  return blocks_needed <= draft.blocks_left;
}

// Leading tokens whose blocks may be looked up in, or offered to, the prefix cache.
int64_t Scheduler::shareable_tokens(const Sequence& sequence) const {
  if (!limits_.prefix_caching) return 0;
  return limits_.rows_depend_on_role ? sequence.prompt_length : sequence.length();
}

int64_t Scheduler::count_cached_blocks(const Sequence& sequence) const {
  // At least the last token is computed, for its logits.
  const int64_t limit = std::min(shareable_tokens(sequence), sequence.length() - 1) / limits_.block_size;
  const std::span<const Hash256> hashes = sequence.hashes.known(limit);
  int64_t count = 0;
  while (count < limit && pool_.find_prefix(hashes[static_cast<size_t>(count)])) ++count;
  return count;
}

// First come, first served; but on a worker with both roles (room_blocks) what ends the waiting of another worker is
// kept back neither by those that may have to wait for that worker nor by those that wait for blocks of such. All the
// room is its own then: it comes in whatever waits. The others keep their order, and since nothing new that waits passes
// them, what holds them up comes to an end.
void Scheduler::plan_waiting(Draft& draft) const {
  bool is_held_up = false;
  for (RequestId id : waiting_) {
    const Sequence& sequence = get(id);
    const bool remote = is_receiver(sequence.role);
    if (draft.seats_left <= 0 || (!remote && draft.tokens_left <= 0)) return;

    // Room for the whole sequence and one more token, so that an admitted prompt is not soon stuck half way.
    const int64_t whole_blocks = blocks_for(sequence.length() + 1);
    const bool waits = waits_elsewhere(sequence.role);
    if (is_held_up && !ends_waiting(sequence.role)) continue;
    if (waits && whole_blocks > draft.waiting_blocks_left) continue;
    if (sequence.role == TransferRole::kPushReceive && draft.reservations_left <= 0) continue;
    const int64_t cached_blocks = count_cached_blocks(sequence);
    int64_t cached_unheld = 0;  // available now, but no longer once this sequence holds them
    for (const Hash256& hash : sequence.hashes.known(cached_blocks)) {
      if (pool_.holders(*pool_.find_prefix(hash)) == 0) ++cached_unheld;
    }
    if (whole_blocks - cached_blocks + cached_unheld > draft.blocks_left) {
      if (limits_.room_blocks <= 0 || waiting_blocks_ == 0) return;
      is_held_up = true;
      continue;
    }

    const int64_t computed = cached_blocks * limits_.block_size;
    const int64_t end = computed < sequence.prompt_length ? sequence.prompt_length : sequence.length();
    const int64_t num_tokens = remote ? 0 : std::min(end - computed, rows_in_budget(draft, computed));
    if (!remote && num_tokens <= 0) return;
    // A transfer names all its blocks at once; others grow chunk by chunk.
    const bool all_blocks = sequence.role != TransferRole::kNone;
    const int64_t total_blocks = remote       ? whole_blocks
                                 : all_blocks ? blocks_for(sequence.length())
                                              : blocks_for(computed + num_tokens);
    draft.blocks_left -= total_blocks - cached_blocks + cached_unheld;
    --draft.seats_left;
    if (waits) draft.waiting_blocks_left -= total_blocks;
    if (sequence.role == TransferRole::kPushReceive) --draft.reservations_left;
    draft.plan.admitted.push_back({id, cached_blocks, total_blocks});
    if (!remote) {
      draft.plan.rows.push_back({id, computed, num_tokens, computed + num_tokens == sequence.length(), false});
      take_from_budget(draft, draft.plan.rows.back());
    }
  }
}

void Scheduler::commit(const StepPlan& plan) {
  for (RequestId id : plan.preempted) preempt(get(id));
  // All prefix hits are held before any block is allocated, since allocation evicts what nobody holds.
  for (const Admission& admission : plan.admitted) hold_cached(admission);
  for (const Admission& admission : plan.admitted) admit(admission);
  for (const ScheduledRows& rows : plan.rows) {
    Sequence& sequence = get(rows.id);
    CHECK_EQ(rows.first_position, sequence.num_computed);
    const int64_t needed = blocks_for(rows.first_position + rows.num_tokens);
    const int64_t held = static_cast<int64_t>(sequence.blocks.size());
    if (needed > held) {
      const std::vector<BlockId> grown = pool_.allocate(needed - held);
      sequence.blocks.insert(sequence.blocks.end(), grown.begin(), grown.end());
    }
  }
}

void Scheduler::preempt(Sequence& sequence) {
  CHECK(sequence.state == SequenceState::kRunning);
  CHECK(!sequence.transfer.has_value());
  pool_.release_all(sequence.blocks);
  sequence.blocks.clear();
  count_waiting(sequence, 0);
  sequence.num_computed = 0;
  sequence.num_registered = 0;
  sequence.state = SequenceState::kWaiting;
  sequence.hashes.extend(sequence.tokens, sequence.length());
  running_.erase(std::find(running_.begin(), running_.end(), sequence.id));
  waiting_.push_front(sequence.id);
}

void Scheduler::hold_cached(const Admission& admission) {
  Sequence& sequence = get(admission.id);
  CHECK(sequence.blocks.empty());
  for (const Hash256& hash : sequence.hashes.known(admission.cached_blocks)) {
    const std::optional<BlockId> block = pool_.find_prefix(hash);
    CHECK(block.has_value());
    pool_.hold(*block);
    sequence.blocks.push_back(*block);
  }
}

void Scheduler::admit(const Admission& admission) {
  Sequence& sequence = get(admission.id);
  waiting_.erase(std::find(waiting_.begin(), waiting_.end(), admission.id));
  const std::vector<BlockId> fresh = pool_.allocate(admission.total_blocks - admission.cached_blocks);
  sequence.blocks.insert(sequence.blocks.end(), fresh.begin(), fresh.end());
  sequence.num_computed = admission.cached_blocks * limits_.block_size;
  sequence.num_registered = admission.cached_blocks;
  if (sequence.first_token_us == 0) sequence.cached_tokens = sequence.num_computed;
  if (waits_elsewhere(sequence.role)) count_waiting(sequence, admission.total_blocks);

  if (is_receiver(sequence.role)) {
    sequence.state = SequenceState::kReceiving;
    ++num_receiving_;
    if (sequence.role == TransferRole::kPushReceive) ++num_reserved_;
  } else {
    sequence.state = SequenceState::kRunning;
    running_.push_back(sequence.id);
  }
}

void Scheduler::advance(const StepPlan& plan) {
  for (const ScheduledRows& rows : plan.rows) {
    Sequence& sequence = get(rows.id);
    sequence.num_computed = rows.first_position + rows.num_tokens;
    register_prefixes(sequence);
  }
}

void Scheduler::learn(const StepPlan& plan, int64_t step_us) {
  if (plan.rows.empty()) return;
  if (!plan.rows.front().is_stream && !streams_elsewhere_) return;  // streams come first
  std::vector<ChunkRows> chunks;
  for (const ScheduledRows& rows : plan.rows) {
    if (!rows.is_stream) chunks.push_back({rows.first_position, rows.num_tokens});
  }
  budget_.learn(chunks, step_us);
}

void Scheduler::register_prefixes(Sequence& sequence) {
  const int64_t tokens = std::min(sequence.num_computed, shareable_tokens(sequence));
  const std::span<const Hash256> hashes = sequence.hashes.extend(sequence.tokens, tokens);
  for (; sequence.num_registered < static_cast<int64_t>(hashes.size()); ++sequence.num_registered) {
    const size_t index = static_cast<size_t>(sequence.num_registered);
    pool_.register_prefix(sequence.blocks[index], hashes[index]);
  }
}

// How many blocks the sequence holds that wait for another worker.
void Scheduler::count_waiting(Sequence& sequence, int64_t num_blocks) {
  waiting_blocks_ += num_blocks - std::exchange(sequence.waiting_blocks, num_blocks);
  CHECK_GE(waiting_blocks_, 0);
}

void Scheduler::end_receiving(Sequence& sequence) {
  --num_receiving_;
  if (sequence.role == TransferRole::kPushReceive) --num_reserved_;
  count_waiting(sequence, 0);
}

bool Scheduler::has_room(TransferRole role, int64_t prompt_tokens) const {
  if (limits_.room_blocks <= 0 || role == TransferRole::kNone || role == TransferRole::kMadeUp) return true;
  const bool waits = waits_elsewhere(role);
  if (role == TransferRole::kPushReceive && limits_.max_num_seqs < 2) return false;
  return blocks_for(prompt_tokens + 1) <= (waits ? pool_.num_blocks() - limits_.room_blocks : limits_.room_blocks);
}

void Scheduler::start_received(Sequence& sequence, int64_t num_computed) {
  CHECK(sequence.state == SequenceState::kReceiving);
  end_receiving(sequence);
  sequence.state = SequenceState::kRunning;
  sequence.num_computed = num_computed;
  running_.push_back(sequence.id);
  register_prefixes(sequence);
}

void Scheduler::park_sending(Sequence& sequence) {
  CHECK(sequence.state == SequenceState::kRunning);
  running_.erase(std::find(running_.begin(), running_.end(), sequence.id));
  sequence.state = SequenceState::kSending;
  ++num_sending_;
}

std::unique_ptr<Sequence> Scheduler::remove(RequestId id) {
  const auto found = sequences_.find(id);
  CHECK(found != sequences_.end());
  std::unique_ptr<Sequence> sequence = std::move(found->second);
  sequences_.erase(found);
  switch (sequence->state) {
    case SequenceState::kWaiting:
      waiting_.erase(std::find(waiting_.begin(), waiting_.end(), id));
      break;
    case SequenceState::kRunning:
      running_.erase(std::find(running_.begin(), running_.end(), id));
      break;
    case SequenceState::kReceiving:
      end_receiving(*sequence);
      break;
    case SequenceState::kSending:
      --num_sending_;
      break;
  }
  count_waiting(*sequence, 0);
  pool_.release_all(sequence->blocks);
  sequence->blocks.clear();
  return sequence;
}

}  // namespace tandem::engine
