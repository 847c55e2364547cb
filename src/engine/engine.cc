#include "src/engine/engine.h"

#include <algorithm>
#include <utility>

#include "src/base/check.h"
#include "src/base/log.h"
#include "src/engine/sampler.h"

namespace tandem::engine {
namespace {

constexpr const char* kTag = "engine";
// While requests wait for something outside (a transfer, a deadline) the loop looks at its clock this often.
constexpr int64_t kIdleTickUs = 20'000;
// Without any request it sleeps until the bell rings; this only bounds one sleep.
constexpr int64_t kLongSleepUs = 3'600'000'000;
// A request that finds the rank group broken waits this long for it to form again: the ranks are told one by one.
constexpr int64_t kGroupGraceUs = 1'000'000;
// How often a peer is told that a request still waits here for the KV it published; far below its lease of 30 s.
constexpr int64_t kRenewLeasesUs = 5'000'000;

EngineFacts make_facts(const model::KvCache& cache, const EngineOptions& options) {
  return {options.model_name, cache.layout().block_size, cache.num_blocks(), kernels::dtype_name(cache.layout().dtype),
          options.limits.prefix_caching};
}

int64_t rows_of(const StepPlan& plan) {
  int64_t rows = 0;
  for (const ScheduledRows& scheduled : plan.rows) rows += scheduled.num_tokens;
  return rows;
}

// The limits of a worker that takes both legs keep room for what ends other workers' waiting; at most half of the cache.
SchedulerLimits with_room(const EngineOptions& options, int64_t num_blocks, int64_t max_model_len) {
  SchedulerLimits limits = options.limits;
  if (options.kv_role != KvRole::kBoth || limits.room_blocks != 0) return limits;
  const int64_t longest = (max_model_len + limits.block_size - 1) / limits.block_size;
  limits.room_blocks = std::max<int64_t>(1, std::min(longest, num_blocks / 2));
  return limits;
}

bool is_sender(TransferRole role) { return role == TransferRole::kPushSend || role == TransferRole::kPullPublish; }

}  // namespace

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kAbort:
      return "abort";
    case FinishReason::kError:
      return "error";
  }
  return "error";
}

Engine::Engine(model::Model& model, model::KvCache& cache, EngineOptions options, const Clock& clock,
               Registry& registry)
    : model_(model),
      cache_(cache),
      options_(std::move(options)),
      clock_(clock),
      probe_(registry, make_facts(cache, options_)),
      pool_(cache.num_blocks()),
      scheduler_(with_room(options_, cache.num_blocks(), model.info().max_model_len), pool_) {
  CHECK_GE(options_.limits.max_num_batched_tokens, options_.limits.max_num_seqs);
  CHECK_GE(cache.num_blocks() * options_.limits.block_size, model.info().max_model_len);
  CHECK_GT(options_.sampled_vocab, 0);
  CHECK_LE(options_.sampled_vocab, model.info().vocab_size);
}

Engine::~Engine() { stop(); }

void Engine::start() {
  CHECK(!thread_.joinable());
  update_gauges();
  thread_ = std::thread([this] { run(); });
}

void Engine::attach(Lockstep* lockstep) {
  CHECK(!thread_.joinable());
  lockstep_ = lockstep;
  bell_ = lockstep == nullptr ? &own_bell_ : &lockstep->bell();
}

void Engine::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  bell_->ring();
  if (thread_.joinable()) thread_.join();
}

void Engine::wake() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
  }
  bell_->ring();
}

RequestId Engine::submit(TokenRequest request, EventSink sink) {
  RequestId id;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    id = RequestId(next_request_++);
    commands_.push_back(Submit{id, std::move(request), std::move(sink)});
  }
  bell_->ring();
  return id;
}

void Engine::cancel(RequestId id) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    commands_.push_back(Cancel{id});
  }
  bell_->ring();
}

void Engine::release(const transfer::KvTransferParams& publication) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    commands_.emplace_back(Release{publication.remote_engine_id, publication.remote_request_id});
  }
  bell_->ring();
}

// The step loop.
void Engine::run() {
  for (Turn turn = run_once(); turn != Turn::kStopped; turn = run_once()) {
    if (turn == Turn::kIdle) wait_for_work();
  }
}

Engine::Turn Engine::run_once() {
  if (!receive_commands()) return Turn::kStopped;
  collect_transfers();
  expire_deadlines();
  renew_leases();
  if (lockstep_ != nullptr && !lockstep_->is_standing()) {
    wait_for_group();
    return Turn::kIdle;
  }
  has_group_ = true;
  if (lockstep_ != nullptr && std::exchange(epoch_, lockstep_->epoch()) != lockstep_->epoch()) enter_group();
  step_times_ = {};
  step_times_.begin_us = clock_.now_us();
  const StepPlan plan = scheduler_.plan();
  if (plan.empty() && (lockstep_ == nullptr || !lockstep_->is_called())) return Turn::kIdle;
  if (lockstep_ != nullptr && !join_round(plan)) return Turn::kWorked;
  scheduler_.commit(plan);
  if (populator_ != nullptr) populator_->note_used(pool_.num_ever_used());
  begin_transfers(plan);
  // From here the blocks of every planned row are held by its sequence.
  const Result<int64_t> step_us = compute(plan);
  if (!step_us.ok()) {
    lose_group(step_us.error());
    return Turn::kWorked;
  }
  scheduler_.advance(plan);
  scheduler_.learn(plan, *step_us);
  take_results(plan);
  update_gauges();
  log_step(plan, *step_us);
  return Turn::kWorked;
}

void Engine::log_step(const StepPlan& plan, int64_t compute_us) {
  if (plan.rows.empty() && round_rows_ == 0) return;  // only transfers began
  step_times_.rows = rows_of(plan);
  step_times_.compute_us = compute_us;
  step_times_.total_us = clock_.now_us() - step_times_.begin_us;
  step_log_.add(step_times_);
}

// Takes what other threads asked for since the last step. False when the engine shall end.
bool Engine::receive_commands() {
  std::vector<Command> commands;
  bool stopping = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    commands.swap(commands_);
    stopping = stopping_;
  }
  for (Command& command : commands) {
    if (Submit* submit = std::get_if<Submit>(&command)) {
      accept(std::move(*submit));
    } else if (const Cancel* cancel = std::get_if<Cancel>(&command)) {
      drop(cancel->id);
    } else {
      release(std::get<Release>(command));
    }
  }
  if (!stopping) return true;
  fail_all(make_error(ErrorKind::kUnavailable, "the server is shutting down; try another one"));
  return false;
}

void Engine::fail_all(const Error& why) {
  std::vector<RequestId> open;
  for (const auto& entry : scheduler_.sequences()) open.push_back(entry.first);
  for (RequestId id : open) fail(*scheduler_.find(id), why);
}

// Rows are computed by all ranks of the group together. False: a rank is lost, and with it what ran.
bool Engine::join_round(const StepPlan& plan) {
  const bool has_streams = !plan.rows.empty() && plan.rows.front().is_stream;
  round_rows_ = 0;
  is_split_ = false;
  if (plan.rows.empty() && !lockstep_->is_called()) return true;  // only transfers begin
  // Streams come first in a plan.
  const bool has_prompt_rows = !plan.rows.empty() && !plan.rows.back().is_stream;
  const bool would_split = can_split(options_.dual_batch, rows_of(plan), has_prompt_rows);
  const Result<AgreedStep> agreed = lockstep_->agree(rows_of(plan), has_streams, would_split);
  if (!agreed.ok()) {
    lose_group(agreed.error());
    return false;
  }
  scheduler_.set_streams_elsewhere(agreed->streams_elsewhere);
  round_rows_ = agreed->total_rows;
  is_split_ = agreed->is_split;
  const int64_t begin_us = std::exchange(step_times_, agreed->times).begin_us;
  step_times_.begin_us = begin_us;
  return true;
}

// Another tensor rank may have begun with an empty cache, so that no prefix is known on all of them.
void Engine::enter_group() {
  if (orders_ == nullptr) return;
  // An epoch may have come and gone between two looks, and what ran in it is still here.
  std::vector<RequestId> running;
  for (const auto& entry : scheduler_.sequences()) {
    if (entry.second->state != SequenceState::kWaiting) running.push_back(entry.first);
  }
  const Error why = make_error(ErrorKind::kUnavailable, "the rank group has formed anew; retry");
  for (const RequestId id : running) fail(*scheduler_.find(id), why);
  pool_.forget_prefixes();
  news_ = {};
}

// What ran in an epoch that is over has ended with it; what came later waits a while for the next one.
void Engine::wait_for_group() {
  const Status group = lockstep_->status();
  // Whatever keeps the group from standing, it is not the client's fault.
  const Error why = make_error(ErrorKind::kUnavailable, "{}",
                               group.ok() ? "the rank group forms again; retry" : group.error().message);
  if (std::exchange(has_group_, false)) return fail_all(why);
  const int64_t oldest_us = clock_.now_us() - kGroupGraceUs;
  std::vector<RequestId> late;
  for (const auto& entry : scheduler_.sequences()) {
    if (entry.second->arrival_us < oldest_us) late.push_back(entry.first);
  }
  for (RequestId id : late) fail(*scheduler_.find(id), why);
}

// What this step was to write is void, and what ran before cannot go on: every request ends with an error that says so.
void Engine::lose_group(const Error& why) {
  log_warning(kTag, "{}", why.message);
  lockstep_->abandon(why);
  has_group_ = false;
  fail_all(why);
}

void Engine::wait_for_work() {
  update_gauges();
  const bool has_work = scheduler_.num_sequences() > 0;
  if (!has_work) pool_.check_integrity();
  const int64_t end_us = clock_.now_us() + (has_work ? kIdleTickUs : kLongSleepUs);
  while (true) {
    const uint32_t rung = bell_->count();
    if (has_news()) return;
    const int64_t left_us = end_us - clock_.now_us();
    if (left_us <= 0) return;
    bell_->wait(rung, left_us);
  }
}

// Something to look at, from this process or from a rank that has begun a round.
bool Engine::has_news() {
  if (lockstep_ != nullptr && lockstep_->has_news()) return true;
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool woken = std::exchange(woken_, false);
  return woken || !commands_.empty() || stopping_;
}

void Engine::update_gauges() {
  probe_.set_load(scheduler_.num_running(), scheduler_.num_waiting(), scheduler_.num_receiving());
  probe_.set_blocks(pool_.num_available(), pool_.num_pinned());
}

void Engine::expire_deadlines() {
  const int64_t now_us = clock_.now_us();
  std::vector<RequestId> expired;
  for (const auto& entry : scheduler_.sequences()) {
    const int64_t deadline_us = entry.second->request.deadline_us;
    if (deadline_us != 0 && now_us > deadline_us) expired.push_back(entry.first);
  }
  for (RequestId id : expired) {
    Sequence& sequence = *scheduler_.find(id);
    fail(sequence, make_error(ErrorKind::kDeadlineExceeded,
                              "the request's deadline passed after {:.1f} s with {} of {} tokens generated",
                              static_cast<double>(now_us - sequence.arrival_us) * 1e-6, sequence.num_generated(),
                              sequence.request.sampling.max_tokens));
  }
}

// A request that waits here for blocks must not lose the KV that waits for it over there.
void Engine::renew_leases() {
  const int64_t now_us = clock_.now_us();
  if (agent_ == nullptr || now_us - leases_renewed_us_ < kRenewLeasesUs) return;
  leases_renewed_us_ = now_us;
  for (const auto& entry : scheduler_.sequences()) {
    const Sequence& sequence = *entry.second;
    if (sequence.state == SequenceState::kWaiting && sequence.role == TransferRole::kPullReceive) {
      agent_->renew_lease(*sequence.request.kv_transfer);
    }
  }
}

// ---- Requests --------------------------------------------------------------------------------------------------

void Engine::accept(Submit submit) {
  const auto refuse = [&submit](Error error) {
    TokenEvent event;
    event.error = std::move(error);
    submit.sink(std::move(event));
  };
  if (submit.request.kv_transfer && submit.request.kv_transfer->do_remote_prefill &&
      !submit.request.kv_transfer->prompt_token_ids.empty()) {
    submit.request.prompt = submit.request.kv_transfer->prompt_token_ids;
  }
  if (Status checked = check_request(submit.request); !checked.ok()) return refuse(checked.error());
  Result<TransferRole> role = choose_role(submit.request);
  if (!role.ok()) return refuse(role.error());

  if (Status room = check_room(*role, std::ssize(submit.request.prompt)); !room.ok()) {
    if (*role == TransferRole::kPullReceive) decline(submit.request);
    return refuse(room.error());
  }
  std::unique_ptr<Sequence> sequence =
      std::make_unique<Sequence>(submit.id, std::move(submit.request), submit.sink, options_.limits.block_size);
  sequence->role = *role;
  sequence->arrival_us = clock_.now_us();
  // A prefill leg computes the first token only, whatever the client's max_tokens was.
  if (is_sender(*role)) sequence->request.sampling.max_tokens = 1;
  if (!scheduler_.add(std::move(sequence))) {
    refuse(make_error(ErrorKind::kResourceExhausted, "{} requests are waiting already, the limit is {}; retry later",
                      scheduler_.num_waiting(), options_.limits.max_num_waiting));
  }
}

Status Engine::check_request(const TokenRequest& request) const {
  const int64_t length = std::ssize(request.prompt) + std::ssize(request.resumed);
  if (request.prompt.empty()) return invalid_argument("prompt", "the prompt has no tokens");
  if (length >= model_.info().max_model_len) {
    Error error = invalid_argument(
        "prompt", "the prompt has {} tokens, this server's context is {} including at least one new token", length,
        model_.info().max_model_len);
    error.code = "context_length_exceeded";
    return error;
  }
  for (const std::vector<TokenId>* tokens : {&request.prompt, &request.resumed}) {
    for (const TokenId token : *tokens) {
      if (token >= 0 && token < model_.info().vocab_size) continue;
      return invalid_argument("prompt", "token id {} is outside the vocabulary 0 … {}", token,
                              model_.info().vocab_size - 1);
    }
  }
  if (std::ssize(request.resumed) >= request.sampling.max_tokens) {
    return invalid_argument("resume_token_ids", "{} tokens are there already, at most {} are wanted",
                            request.resumed.size(), request.sampling.max_tokens);
  }
  if (!request.resumed.empty() && request.kv_transfer) {
    return invalid_argument("resume_token_ids", "an answer that goes on cannot take part in a KV transfer");
  }
  CHECK_GE(request.sampling.max_tokens, 1);
  return {};
}

// A worker with both roles moves only what cannot make two of them wait for each other.
Status Engine::check_room(TransferRole role, int64_t prompt_tokens) const {
  if (scheduler_.has_room(role, prompt_tokens)) return {};
  const int64_t room = scheduler_.limits().room_blocks;
  Error error = make_error(
      ErrorKind::kTooLarge,
      "the KV of a prompt of {} tokens takes {} blocks; this kv_both worker with {} blocks and --max-num-seqs {} "
      "reserves or publishes at most {} and sends or fetches at most {}; send the prompt without kv_transfer_params, or "
      "give the worker one role or a larger KV cache",
      prompt_tokens, scheduler_.blocks_for(prompt_tokens + 1), pool_.num_blocks(), options_.limits.max_num_seqs,
      pool_.num_blocks() - room, room);
  error.code = kNoRoom;
  return error;
}

Result<TransferRole> Engine::choose_role(const TokenRequest& request) const {
  if (options_.synthetic_fill && request.resumed.empty() && !request.kv_transfer) return TransferRole::kMadeUp;
  if (!request.kv_transfer) return TransferRole::kNone;
  const transfer::KvTransferParams& params = *request.kv_transfer;
  if (params.do_remote_decode && params.do_remote_prefill) {
    return invalid_argument("kv_transfer_params", "do_remote_decode and do_remote_prefill are both true; set one");
  }
  if (!params.do_remote_decode && !params.do_remote_prefill) return TransferRole::kNone;
  if (agent_ == nullptr) {
    return invalid_argument("kv_transfer_params",
                            "this server was started without --kv-transfer-config, so it cannot move KV");
  }
  const bool push = params.mode == transfer::TransferMode::kPush;
  if (params.do_remote_decode) {
    if (options_.kv_role == KvRole::kConsumer) {
      return invalid_argument(
          "kv_transfer_params",
          "do_remote_decode asks for a prefill leg, this server's kv_role is {}; ask one with kv_producer or kv_both",
          kv_role_name(options_.kv_role));
    }
    if (push && (params.remote_host.empty() || params.remote_port <= 0 || params.remote_request_id.empty())) {
      return invalid_argument("kv_transfer_params",
                              "a push needs remote_host, remote_port and remote_request_id of the decode side");
    }
    if (push && params.remote_num_tokens != static_cast<int64_t>(request.prompt.size())) {
      return invalid_argument("kv_transfer_params.remote_num_tokens",
                              "decode expects {} prompt tokens, the prompt has {}", params.remote_num_tokens,
                              request.prompt.size());
    }
    if (!push) return TransferRole::kPullPublish;
    const int64_t cached = params.remote_cached_tokens;
    // It may end inside one of our blocks if decode's have another size; that block is sent whole.
    if (cached < 0 || cached >= params.remote_num_tokens) {
      return invalid_argument("kv_transfer_params.remote_cached_tokens", "{} is not below the prompt's {} tokens", cached,
                              params.remote_num_tokens);
    }
    return TransferRole::kPushSend;
  }
  if (options_.kv_role == KvRole::kProducer) {
    return invalid_argument(
        "kv_transfer_params",
        "do_remote_prefill asks for a decode leg, this server's kv_role is {}; ask one with kv_consumer or kv_both",
        kv_role_name(options_.kv_role));
  }
  if (push) return TransferRole::kPushReceive;
  if (params.remote_host.empty() || params.remote_port <= 0 || params.remote_request_id.empty() ||
      params.remote_engine_id.empty()) {
    return invalid_argument("kv_transfer_params",
                            "do_remote_prefill needs remote_engine_id, remote_request_id, remote_host and remote_port "
                            "from the prefill response");
  }
  if (params.remote_num_tokens != 0 && params.remote_num_tokens != static_cast<int64_t>(request.prompt.size())) {
    return invalid_argument("kv_transfer_params.remote_num_tokens", "prefill holds KV of {} tokens, the prompt has {}",
                            params.remote_num_tokens, request.prompt.size());
  }
  return TransferRole::kPullReceive;
}

// The client has left, or the request is over: blocks go back now, an open transfer's pins when it is done.
void Engine::drop(RequestId id) {
  Sequence* sequence = scheduler_.find(id);
  if (sequence == nullptr) return;
  if (sequence->transfer) {
    agent_->abort(*sequence->transfer);
  } else if (sequence->role == TransferRole::kPullReceive && sequence->state == SequenceState::kWaiting) {
    // One that has asked and was refused has no right to what was published: the rightful one may still come.
    decline(sequence->request);
  }
  scheduler_.remove(id);
}

void Engine::fail(Sequence& sequence, Error error) {
  TokenEvent event;
  trace_stages(sequence, error.message);
  event.error = std::move(error);
  event.usage = usage(sequence);
  sequence.sink(std::move(event));
  drop(sequence.id);
}

void Engine::finish(Sequence& sequence, TokenEvent event) {
  const int64_t now_us = clock_.now_us();
  probe_.finished(now_us - sequence.first_token_us, now_us - sequence.first_scheduled_us);
  trace_stages(sequence, "");
  event.usage = usage(sequence);
  sequence.sink(std::move(event));
  CHECK(!sequence.transfer.has_value());
  scheduler_.remove(sequence.id);
}

TokenUsage Engine::usage(const Sequence& sequence) const { return {sequence.prompt_length, sequence.cached_tokens}; }

// Where a request's time went: a span for each stage it reached. The last one carries the error.
void Engine::trace_stages(const Sequence& sequence, const std::string& error) const {
  if (options_.spans == nullptr || !sequence.request.trace.sampled) return;
  const int64_t now_us = clock_.now_us();
  const bool is_sender = sequence.role == TransferRole::kPushSend;
  const auto add = [&](const char* name, int64_t from_us, int64_t to_us) {
    if (from_us == 0) return;
    Span span;
    span.name = name;
    span.context = child_of(sequence.request.trace);
    span.parent = sequence.request.trace.span_id;
    span.start_us = wall_us(from_us, now_us);
    span.end_us = wall_us(to_us == 0 ? now_us : to_us, now_us);
    span.attributes = {{"gen_ai.request.id", sequence.request.external_id},
                       {"gen_ai.usage.prompt_tokens", sequence.prompt_length},
                       {"gen_ai.usage.completion_tokens", sequence.num_generated()}};
    if (to_us == 0) span.error = error;
    options_.spans->add(std::move(span));
  };
  add("queue", sequence.arrival_us, sequence.first_scheduled_us);
  const bool receives = sequence.kv_received || sequence.state == SequenceState::kReceiving;
  add(receives ? "receive" : "prefill", sequence.first_scheduled_us, sequence.first_token_us);
  add(is_sender ? "send" : "decode", sequence.first_token_us, 0);
}

// ---- A step ----------------------------------------------------------------------------------------------------

// Returns how long it took.
Result<int64_t> Engine::compute(const StepPlan& plan) {
  if (plan.rows.empty() && round_rows_ == 0) return 0;
  batch_.tokens.clear();
  batch_.chunks.clear();
  batch_.logit_rows.clear();
  for (const ScheduledRows& rows : plan.rows) {
    const Sequence& sequence = *scheduler_.find(rows.id);
    model::Chunk chunk;
    chunk.first_row = static_cast<int32_t>(batch_.tokens.size());
    chunk.num_rows = static_cast<int32_t>(rows.num_tokens);
    chunk.first_position = static_cast<int32_t>(rows.first_position);
    chunk.is_prompt = rows.first_position < sequence.prompt_length;
    const int64_t num_blocks = scheduler_.blocks_for(rows.first_position + rows.num_tokens);
    chunk.blocks.assign(sequence.blocks.begin(), sequence.blocks.begin() + num_blocks);
    const auto first = sequence.tokens.begin() + rows.first_position;
    batch_.tokens.insert(batch_.tokens.end(), first, first + rows.num_tokens);
    if (rows.wants_logits) batch_.logit_rows.push_back(static_cast<int32_t>(batch_.tokens.size()) - 1);
    batch_.chunks.push_back(std::move(chunk));
  }
  batch_.split_row = is_split_ ? choose_split(batch_.chunks) : 0;
  const bool pushes = std::any_of(plan.rows.begin(), plan.rows.end(), [this](const ScheduledRows& rows) {
    return scheduler_.find(rows.id)->role == TransferRole::kPushSend;
  });
  const int64_t begin_us = clock_.now_us();
  if (orders_ != nullptr) TANDEM_TRY(send_order());
  TANDEM_TRY(model_.forward(batch_, cache_,
                            pushes ? model::LayerDone([&](int layer) { push_layer(plan, layer); }) : nullptr));
  const int64_t step_us = clock_.now_us() - begin_us;
  if (expert_load_ != nullptr) expert_load_->add_step(batch_, model_);
  probe_.step(static_cast<int64_t>(batch_.tokens.size()), step_us);
  return step_us;
}

// The other tensor ranks compute the same batch, and get KV that only this one has received.
Status Engine::send_order() {
  TANDEM_TRY(orders_->send(batch_, news_, cache_));
  news_ = {};
  return {};
}

// Samples for every sequence whose last row was computed, and ends those that are complete.
void Engine::take_results(const StepPlan& plan) {
  size_t logit_index = 0;
  for (const ScheduledRows& rows : plan.rows) {
    Sequence& sequence = *scheduler_.find(rows.id);
    if (sequence.role == TransferRole::kPushSend) {
      const int64_t complete = sequence.num_computed == sequence.prompt_length
                                   ? scheduler_.blocks_for(sequence.prompt_length)
                                   : sequence.num_computed / options_.limits.block_size;
      sequence.blocks_sent = std::max(sequence.blocks_sent, complete);
    }
    if (rows.wants_logits) take_token(sequence, logit_index++);
  }
  for (RequestId id : plan.preempted) {
    probe_.preempted();
    log_debug(kTag, "request {} preempted: KV blocks ran out", id);
  }
}

void Engine::take_token(Sequence& sequence, size_t logit_index) {
  const std::span<const float> logits = model_.logits(logit_index).first(static_cast<size_t>(options_.sampled_vocab));
  Result<GeneratedToken> token =
      sample_token({logits, sequence.tokens, sequence.prompt_length, options_.eos_ids}, sequence.request.sampling);
  if (!token.ok()) {
    probe_.corrupted();
    log_error(kTag, "request {} ({}): {}", sequence.id, sequence.request.external_id, token.error().message);
    return fail(sequence, token.error());
  }
  if (sequence.first_token_us == 0 && !sequence.kv_received) {
    probe_.prompt_done(sequence.prompt_length, sequence.cached_tokens, false);
  }
  if (sequence.role == TransferRole::kPushSend) {
    const transfer::FirstToken first{token->token, token->logprob, token->top_logprobs, sequence.cached_tokens};
    sequence.final_token = std::move(*token);
    sequence.first_token_us = clock_.now_us();
    scheduler_.park_sending(sequence);
    CHECK(sequence.transfer.has_value());
    agent_->commit_send(*sequence.transfer, first);
    return;
  }
  append_token(sequence, std::move(*token));
}

// The sequence got its next token, computed here or received with the first KV.
void Engine::append_token(Sequence& sequence, GeneratedToken token) {
  const int64_t now_us = clock_.now_us();
  if (sequence.first_token_us == 0) {
    sequence.first_token_us = now_us;
    probe_.prefill_time(now_us - sequence.first_scheduled_us);
  }
  sequence.tokens.push_back(token.token);
  probe_.tokens_generated(1);

  TokenEvent event;
  event.finish = finish_reason(sequence);
  if (event.finish == FinishReason::kStop) event.stop_token = token.token;
  event.tokens.push_back(std::move(token));
  event.usage = usage(sequence);
  if (!event.finish) {
    sequence.sink(std::move(event));
    return;
  }
  if (sequence.role == TransferRole::kPullPublish) event.kv_transfer = publish(sequence);
  finish(sequence, std::move(event));
}

std::optional<FinishReason> Engine::finish_reason(const Sequence& sequence) const {
  const SamplingParams& params = sequence.request.sampling;
  const TokenId last = sequence.tokens.back();
  const auto contains = [last](const std::vector<TokenId>& ids) {
    return std::find(ids.begin(), ids.end(), last) != ids.end();
  };
  if (sequence.num_generated() >= params.min_tokens) {
    if (!params.ignore_eos && contains(options_.eos_ids)) return FinishReason::kStop;
    if (contains(params.stop_token_ids)) return FinishReason::kStop;
  }
  if (sequence.num_generated() >= params.max_tokens) return FinishReason::kLength;
  if (sequence.length() >= model_.info().max_model_len) return FinishReason::kLength;
  return std::nullopt;
}

}  // namespace tandem::engine
