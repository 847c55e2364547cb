// The engine's part in transfers of KV: beginning, feeding and ending them.
#include <utility>

#include "src/base/check.h"
#include "src/base/log.h"
#include "src/engine/engine.h"

namespace tandem::engine {
namespace {

constexpr const char* kTag = "engine";

// Names the prompt of a transfer: KV must never be filed under other tokens than those it was computed from.
Hash256 hash_prompt(std::span<const TokenId> prompt) {
  return Sha256().add("prompt:").add(std::as_bytes(prompt)).finish();
}

Hash256 prompt_hash(const Sequence& sequence) {
  return hash_prompt({sequence.tokens.data(), static_cast<size_t>(sequence.prompt_length)});
}

}  // namespace

// What prefill published for a request that will not fetch it: nobody else comes for it.
void Engine::decline(const TokenRequest& request) {
  agent_->decline(*request.kv_transfer, hash_prompt(request.prompt));
}

// Its blocks come back with its Done. The handle alone says who may: it travels in one object with the prompt's tokens,
// so that to demand their hash as well would keep nobody out.
void Engine::release(const Release& publication) {
  if (agent_ == nullptr || publication.engine_id != agent_->engine_id()) return;
  agent_->release(publication.handle);
}

std::vector<BlockId> Engine::prompt_blocks(const Sequence& sequence, int64_t first_block) const {
  const int64_t count = scheduler_.blocks_for(sequence.prompt_length);
  CHECK_LE(count, static_cast<int64_t>(sequence.blocks.size()));
  return {sequence.blocks.begin() + first_block, sequence.blocks.begin() + count};
}

transfer::TransferId Engine::open_transfer(Sequence& sequence, std::vector<BlockId> blocks, bool sending) {
  const transfer::TransferId id(next_transfer_++);
  pool_.pin_all(blocks);
  transfers_.emplace(id, OpenTransfer{std::move(blocks), sequence.id, sequence.request.external_id, sending});
  sequence.transfer = id;
  return id;
}

// The KV of a finished prefill leg stays for whoever has these parameters.
transfer::KvTransferParams Engine::publish(Sequence& sequence) {
  const std::vector<BlockId> blocks = prompt_blocks(sequence, 0);
  const transfer::TransferId id = open_transfer(sequence, blocks, true);
  transfer::KvTransferParams params;
  params.do_remote_prefill = true;
  params.remote_engine_id = agent_->engine_id();
  params.remote_request_id = agent_->publish(id, {0, blocks, sequence.prompt_length, prompt_hash(sequence)});
  params.remote_host = options_.kv_host;
  params.remote_port = agent_->port();
  params.remote_num_tokens = sequence.prompt_length;
  params.remote_block_ids.emplace_back();
  for (BlockId block : blocks) params.remote_block_ids.back().push_back(block.value);
  params.prompt_token_ids = sequence.request.prompt;
  sequence.transfer.reset();  // the publication outlives the request
  transfers_.at(id).lent_blocks = std::ssize(blocks);
  scheduler_.lend(std::ssize(blocks));
  return params;
}

// Sequences that just got their blocks start their transfers; the others only their clocks.
void Engine::begin_transfers(const StepPlan& plan) {
  for (const Admission& admission : plan.admitted) {
    Sequence& sequence = *scheduler_.find(admission.id);
    if (sequence.first_scheduled_us == 0) {
      sequence.first_scheduled_us = clock_.now_us();
      probe_.queue_time(sequence.first_scheduled_us - sequence.arrival_us);
      probe_.prefix_lookup(sequence.prompt_length, sequence.cached_tokens);
    }
    const int64_t deadline_us = sequence.request.deadline_us;
    switch (sequence.role) {
      case TransferRole::kNone:
      case TransferRole::kPullPublish:
        break;
      case TransferRole::kPushSend: {
        const transfer::KvTransferParams& remote = *sequence.request.kv_transfer;
        const int64_t first_block = remote.remote_cached_tokens / options_.limits.block_size;
        const std::vector<BlockId> blocks = prompt_blocks(sequence, first_block);
        const transfer::TransferId id = open_transfer(sequence, blocks, true);
        agent_->begin_send(id, remote, {first_block, blocks, sequence.prompt_length, prompt_hash(sequence)}, deadline_us);
        break;
      }
      case TransferRole::kPushReceive: {
        const int64_t first_block = admission.cached_blocks;
        const std::vector<BlockId> blocks = prompt_blocks(sequence, first_block);
        const transfer::TransferId id = open_transfer(sequence, blocks, false);
        transfer::KvTransferParams params;
        params.do_remote_decode = true;
        params.mode = transfer::TransferMode::kPush;
        params.remote_engine_id = agent_->engine_id();
        params.remote_request_id = agent_->expect(id, {first_block, blocks, sequence.prompt_length, prompt_hash(sequence)}, deadline_us);
        params.remote_host = options_.kv_host;
        params.remote_port = agent_->port();
        params.remote_num_tokens = sequence.prompt_length;
        params.remote_cached_tokens = first_block * options_.limits.block_size;
        TokenEvent event;
        event.kv_transfer = std::move(params);
        event.usage = usage(sequence);
        sequence.sink(std::move(event));
        break;
      }
      case TransferRole::kPullReceive: {
        const int64_t first_block = admission.cached_blocks;
        const std::vector<BlockId> blocks = prompt_blocks(sequence, first_block);
        const transfer::TransferId id = open_transfer(sequence, blocks, false);
        agent_->pull(id, *sequence.request.kv_transfer, {first_block, blocks, sequence.prompt_length, prompt_hash(sequence)}, deadline_us);
        break;
      }
      case TransferRole::kMadeUp:
        for (const BlockId block : prompt_blocks(sequence, admission.cached_blocks)) {
          cache_.fill(block, *options_.synthetic_fill);
          if (orders_ != nullptr) news_.filled.push_back(block);
        }
        news_.fill_value = *options_.synthetic_fill;
        start_received(sequence, sequence.prompt_length - 1);
        break;
    }
  }
}

// A layer's KV for this step is in the cache: hand complete blocks of sending sequences to the agent.
void Engine::push_layer(const StepPlan& plan, int64_t layer) {
  for (const ScheduledRows& rows : plan.rows) {
    Sequence& sequence = *scheduler_.find(rows.id);
    if (sequence.role != TransferRole::kPushSend || !sequence.transfer) continue;
    const int64_t end = rows.first_position + rows.num_tokens;
    const int64_t complete =
        end == sequence.prompt_length ? scheduler_.blocks_for(end) : end / options_.limits.block_size;
    if (complete > sequence.blocks_sent) {
      agent_->send_blocks(*sequence.transfer, layer, sequence.blocks_sent, complete - sequence.blocks_sent);
    }
  }
}

void Engine::collect_transfers() {
  if (agent_ == nullptr) return;
  for (const transfer::Done& done : agent_->take_done()) finish_transfer(done);
}

void Engine::finish_transfer(const transfer::Done& done) {
  const auto found = transfers_.find(done.id);
  CHECK(found != transfers_.end());
  const OpenTransfer open = std::move(found->second);
  transfers_.erase(found);
  probe_.transfer_done(open.sending, done.status, done.bytes, done.duration_us, done.peer);
  if (!done.status.ok() && done.status.error().kind != ErrorKind::kAborted) {  // then its own request has ended
    log_warning(kTag, "[{}] KV was not {}: {}", open.external_id, open.sending ? "sent" : "received",
                done.status.error().message);
  }
  pool_.unpin_all(open.blocks);
  scheduler_.lend(-open.lent_blocks);

  Sequence* sequence = scheduler_.find(open.sequence);
  if (sequence == nullptr || sequence->transfer != done.id) return;
  sequence->transfer.reset();
  if (open.sending) {
    finish_send(*sequence, done);
  } else {
    // In a cache that the tensor ranks share it is where they look for it.
    if (orders_ != nullptr && !cache_.is_part() && done.status.ok()) {
      news_.received.insert(news_.received.end(), open.blocks.begin(), open.blocks.end());
    }
    finish_receive(*sequence, done);
  }
}

void Engine::finish_receive(Sequence& sequence, const transfer::Done& done) {
  if (!done.status.ok()) return fail(sequence, done.status.error());
  if (done.first_token) sequence.cached_tokens = std::max(sequence.cached_tokens, done.first_token->cached_tokens);
  if (sequence.role == TransferRole::kPullReceive || options_.first_token_from_decode) {
    // The last prompt token is computed here, for its logits.
    return start_received(sequence, sequence.prompt_length - 1);
  }
  CHECK(done.first_token.has_value());
  const transfer::FirstToken& first = *done.first_token;
  if (first.token < 0 || first.token >= options_.sampled_vocab) {
    return fail(sequence, make_error(ErrorKind::kDataLoss, "prefill sent first token {}, the vocabulary is 0 … {}",
                                     first.token, options_.sampled_vocab - 1));
  }
  start_received(sequence, sequence.prompt_length);
  append_token(sequence, {first.token, first.logprob, first.top_logprobs});
}

// The prompt's KV is here without having been computed here.
void Engine::start_received(Sequence& sequence, int64_t num_computed) {
  sequence.kv_received = true;
  scheduler_.start_received(sequence, num_computed);
  sequence.role = TransferRole::kNone;  // local from now on, also after a preemption
  probe_.prompt_done(sequence.prompt_length, sequence.cached_tokens, true);
}

void Engine::finish_send(Sequence& sequence, const transfer::Done& done) {
  if (!done.status.ok()) return fail(sequence, done.status.error());
  if (sequence.state != SequenceState::kSending || !sequence.final_token) {
    return fail(sequence, make_error(ErrorKind::kInternal, "a transfer was done before its prompt was computed"));
  }
  TokenEvent event;
  event.finish = FinishReason::kLength;
  event.tokens.push_back(*sequence.final_token);
  finish(sequence, std::move(event));
}

}  // namespace tandem::engine
