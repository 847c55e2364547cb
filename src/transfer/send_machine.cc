#include "src/transfer/send_machine.h"

#include <algorithm>

namespace tandem::transfer {

SendMachine::SendMachine(const SendSpec& spec, int64_t now_us)
    : spec_(spec),
      state_(spec.pull ? State::kPublished : State::kOffered),
      added_(static_cast<size_t>(spec.grid.num_layers * spec.grid.num_blocks), false),
      wanted_block_(spec.first_block),
      last_progress_us_(now_us),
      last_told_us_(now_us),
      lease_end_us_(now_us + spec.lease_us) {
  CHECK_GT(spec.num_tokens, 0);
  CHECK_GE(spec.first_block, 0);
  CHECK_LE(spec.first_block, spec.grid.num_blocks);
  CHECK_GT(spec.idle_timeout_us, 0);
}

void SendMachine::start(int64_t now_us, Actions& out) {
  CHECK(!spec_.pull);
  const int64_t first_token = std::min(spec_.first_block * spec_.grid.block_tokens, spec_.num_tokens);
  out.push_back(
      Tell{Begin{spec_.handle, spec_.num_tokens, first_token, remaining_us(spec_.deadline_us, now_us), spec_.prompt}});
}

void SendMachine::add_blocks(int64_t layer, int64_t first, int64_t count, int64_t now_us) {
  if (state_ == State::kEnded) return;
  CHECK(!spec_.pull);
  CHECK_GE(layer, 0);
  CHECK_LT(layer, spec_.grid.num_layers);
  CHECK_GE(first, 0);
  CHECK_LE(first + count, spec_.grid.num_blocks);
  const int64_t skipped = std::clamp<int64_t>(spec_.first_block - first, 0, count);
  first += skipped;
  count -= skipped;
  for (int64_t block = first; block < first + count; ++block) {
    const size_t index = static_cast<size_t>(layer * spec_.grid.num_blocks + block);
    CHECK(!added_[index]);
    added_[index] = true;
  }
  num_added_ += count;
  if (count == 0) return;
  if (!waits_for_peer()) last_progress_us_ = now_us;  // the wait for the peer begins here
  ready_.push_back({layer, first * spec_.grid.parts_per_block(), count * spec_.grid.parts_per_block()});
}

void SendMachine::commit(const FirstToken& first_token, int64_t now_us) {
  if (state_ == State::kEnded) return;
  CHECK(!spec_.pull);
  CHECK(!all_added_);
  CHECK_EQ(num_added_, spec_.grid.num_layers * (spec_.grid.num_blocks - spec_.first_block));
  if (!waits_for_peer()) last_progress_us_ = now_us;
  first_token_ = first_token;
  all_added_ = true;
}

void SendMachine::receive(const Message& message, int64_t now_us, Actions& out) {
  if (state_ == State::kEnded) return;
  if (const Accept* accept = std::get_if<Accept>(&message)) return on_accept(*accept, now_us, out);
  if (const Pull* pull = std::get_if<Pull>(&message)) return on_pull(*pull, now_us, out);
  if (const Ack* ack = std::get_if<Ack>(&message)) return on_ack(*ack, out);
  if (std::get_if<Heartbeat>(&message) != nullptr) {
    lease_end_us_ = std::max(lease_end_us_, now_us + spec_.lease_us);
    return;
  }
  if (const Abort* abort = std::get_if<Abort>(&message)) {
    out.push_back(Tell{AbortAck{spec_.handle, Side::kReceiver}});
    // As with a pull: who means another prompt may have the handle, but the KV is not theirs to give up.
    if (spec_.pull && abort->prompt != spec_.prompt) return;
    return finish(make_error(ErrorKind::kAborted, "the decode side ended transfer {}: {}", spec_.handle.short_name(),
                             abort->text),
                  out);
  }
  // Of an earlier transfer of the same handle, which was aborted here: nothing that this one waits for.
  if (std::get_if<AbortAck>(&message) != nullptr) return;
  if (const Fault* fault = std::get_if<Fault>(&message)) return finish(to_error(*fault, "the decode side"), out);
  refuse(FaultCode::kProtocol, ErrorKind::kInternal,
         fmt::format("a sender got the message '{}'", message_name(message)), out);
}

void SendMachine::on_accept(const Accept& accept, int64_t now_us, Actions& out) {
  if (spec_.pull) return refuse(FaultCode::kProtocol, ErrorKind::kInternal, "a publication was accepted", out);
  if (state_ != State::kOffered) return;  // a repetition
  const int64_t first_block = spec_.grid.first_block(accept.first_token);
  if (first_block < spec_.first_block || accept.first_token > spec_.num_tokens) {
    return refuse(FaultCode::kOutOfRange, ErrorKind::kInternal,
                  fmt::format("tokens from {} on are wanted; {} … {} are offered", accept.first_token,
                              spec_.first_block * spec_.grid.block_tokens, spec_.num_tokens - 1),
                  out);
  }
  begin_streaming(first_block, now_us);
}

void SendMachine::on_pull(const Pull& pull, int64_t now_us, Actions& out) {
  if (!spec_.pull) return refuse(FaultCode::kProtocol, ErrorKind::kInternal, "a push was pulled", out);
  if (state_ != State::kPublished) return;  // a repetition
  // A wrong request leaves the publication as it is: a right one may still come.
  const auto answer = [&](FaultCode code, std::string text) {
    out.push_back(Tell{Fault{spec_.handle, Side::kReceiver, code, std::move(text)}});
  };
  if (pull.num_tokens != spec_.num_tokens) {
    return answer(FaultCode::kWrongLength,
                  fmt::format("{} tokens are published, {} are asked for", spec_.num_tokens, pull.num_tokens));
  }
  if (pull.prompt != spec_.prompt) {
    return answer(FaultCode::kOtherPrompt,
                  "the decode leg was given another prompt than the prefill leg; send both the same tokens");
  }
  if (pull.first_token > spec_.num_tokens) {
    return answer(FaultCode::kOutOfRange, fmt::format("tokens from {} on are asked for; there are {}", pull.first_token,
                                                      spec_.num_tokens));
  }
  spec_.deadline_us = earlier_deadline(spec_.deadline_us, pull.remaining_us, now_us);
  begin_streaming(spec_.grid.first_block(pull.first_token), now_us);
  const int64_t first_part = wanted_block_ * spec_.grid.parts_per_block();
  const int64_t num_parts = spec_.grid.parts_per_layer() - first_part;
  for (int64_t layer = 0; num_parts > 0 && layer < spec_.grid.num_layers; ++layer) {
    ready_.push_back({layer, first_part, num_parts});
  }
  all_added_ = true;
  advance(now_us, out);
}

void SendMachine::begin_streaming(int64_t first_block, int64_t now_us) {
  state_ = State::kStreaming;
  wanted_block_ = first_block;
  last_progress_us_ = now_us;
}

void SendMachine::on_ack(const Ack& ack, Actions& out) {
  if (state_ != State::kCommitted || ack.num_bytes != sent_bytes_) {
    return refuse(FaultCode::kProtocol, ErrorKind::kInternal,
                  fmt::format("{} bytes were acknowledged after {} were sent", ack.num_bytes, sent_bytes_), out);
  }
  finish({}, out);
}

std::optional<PartRange> SendMachine::next_data(int64_t now_us) {
  if (state_ != State::kStreaming || in_flight_ >= kMaxDataInFlight) return std::nullopt;
  skip_unwanted();
  if (ready_.empty()) return std::nullopt;
  PartRange& front = ready_.front();
  const PartRange range{front.layer, front.first_part, std::min(front.num_parts, spec_.grid.parts_per_message())};
  front.first_part += range.num_parts;
  front.num_parts -= range.num_parts;
  if (front.num_parts == 0) ready_.pop_front();
  sent_bytes_ += spec_.grid.bytes_of(range.first_part, range.num_parts);
  ++in_flight_;
  last_told_us_ = now_us;
  return range;
}

void SendMachine::skip_unwanted() {
  const int64_t lowest_part = wanted_block_ * spec_.grid.parts_per_block();
  while (!ready_.empty()) {
    PartRange& front = ready_.front();
    const int64_t skipped = std::clamp<int64_t>(lowest_part - front.first_part, 0, front.num_parts);
    front.first_part += skipped;
    front.num_parts -= skipped;
    if (front.num_parts > 0) return;
    ready_.pop_front();
  }
}

void SendMachine::data_sent(int64_t now_us) {
  CHECK_GT(in_flight_, 0);
  --in_flight_;
  last_progress_us_ = now_us;
}

void SendMachine::advance(int64_t now_us, Actions& out) {
  if (state_ != State::kStreaming || !all_added_) return;
  skip_unwanted();
  if (!ready_.empty()) return;
  CHECK_EQ(sent_bytes_, spec_.grid.bytes_from(wanted_block_));
  state_ = State::kCommitted;
  last_progress_us_ = now_us;
  out.push_back(Tell{Commit{spec_.handle, spec_.num_tokens, sent_bytes_, first_token_}});
}

void SendMachine::refuse(FaultCode code, ErrorKind kind, std::string text, Actions& out) {
  out.push_back(Tell{Fault{spec_.handle, Side::kReceiver, code, text}});
  finish(make_error(kind, "transfer {}: {}", spec_.handle.short_name(), text), out);
}

void SendMachine::finish(Status status, Actions& out) {
  state_ = State::kEnded;
  ready_.clear();
  out.push_back(Finish{std::move(status), std::nullopt, sent_bytes_});
}

void SendMachine::lose_peer(const Error& why, Actions& out) {
  if (state_ == State::kEnded) return;
  finish(make_error(ErrorKind::kUnavailable, "transfer {} {}: {}", spec_.handle.short_name(), describe_progress(),
                    why.message),
         out);
}

void SendMachine::abort(Actions& out) {
  if (state_ == State::kEnded) return;
  if (state_ != State::kPublished) {
    out.push_back(Tell{Abort{spec_.handle, Side::kReceiver, "the prefill side ended the request"}});
  }
  finish(make_error(ErrorKind::kAborted, "transfer {} was aborted here {}", spec_.handle.short_name(),
                    describe_progress()),
         out);
}

// While true, the peer (or the line to it) has to do something.
bool SendMachine::waits_for_peer() const {
  return state_ == State::kOffered || state_ == State::kCommitted ||
         (state_ == State::kStreaming && (in_flight_ > 0 || !ready_.empty()));
}

int64_t SendMachine::next_limit_us() const {
  if (state_ == State::kPublished) return lease_end_us_;
  const int64_t deadline_us = spec_.deadline_us == 0 ? kNever : spec_.deadline_us;
  return std::min(deadline_us, last_progress_us_ + (waits_for_peer() ? spec_.idle_timeout_us : kMaxQuietUs));
}

int64_t SendMachine::next_expiry_us() const {
  if (state_ == State::kEnded) return kNever;
  if (state_ != State::kStreaming || peer_idle_timeout_us_ == 0) return next_limit_us();
  return std::min(next_limit_us(), last_told_us_ + peer_idle_timeout_us_ / kHeartbeatsPerIdle);
}

void SendMachine::expire(int64_t now_us, Actions& out) {
  if (now_us < next_expiry_us()) return;
  if (now_us < next_limit_us()) {
    last_told_us_ = now_us;
    out.push_back(Tell{Heartbeat{spec_.handle, Side::kReceiver}});
    return;
  }
  if (state_ == State::kPublished) {
    Error error = make_error(ErrorKind::kDeadlineExceeded, "nobody fetched transfer {} within its lease of {} s",
                             spec_.handle.short_name(), spec_.lease_us / 1'000'000);
    error.code = "kv_transfer_expired";
    return finish(std::move(error), out);
  }
  const bool late = spec_.deadline_us != 0 && now_us >= spec_.deadline_us;
  const bool silent = !late && waits_for_peer();
  const std::string text =
      late ? fmt::format("the deadline passed {}", describe_progress())
           : fmt::format("no progress for {} ms {}", (now_us - last_progress_us_) / 1000, describe_progress());
  out.push_back(Tell{Abort{spec_.handle, Side::kReceiver, text}});
  state_ = State::kEnded;
  ready_.clear();
  out.push_back(Finish{make_error(late ? ErrorKind::kDeadlineExceeded : ErrorKind::kUnavailable, "transfer {}: {}",
                                  spec_.handle.short_name(), text),
                       std::nullopt, sent_bytes_, silent});
}

std::string SendMachine::describe_progress() const {
  switch (state_) {
    case State::kPublished:
      return "before it was fetched";
    case State::kOffered:
      return "before the decode side accepted it";
    case State::kCommitted:
      return fmt::format("after all {} bytes were sent", sent_bytes_);
    default:
      return fmt::format("after {} of {} bytes", sent_bytes_, spec_.grid.bytes_from(wanted_block_));
  }
}

}  // namespace tandem::transfer
