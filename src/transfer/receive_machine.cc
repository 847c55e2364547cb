#include "src/transfer/receive_machine.h"

#include <algorithm>

namespace tandem::transfer {

ReceiveMachine::ReceiveMachine(const ReceiveSpec& spec, int64_t now_us)
    : spec_(spec),
      state_(spec.pull ? State::kRequested : State::kExpecting),
      last_heard_us_(now_us),
      last_progress_us_(now_us) {
  CHECK_GT(spec.num_tokens, 0);
  CHECK_GE(spec.first_token, 0);
  CHECK_LE(spec.first_token, spec.num_tokens);
  CHECK_GT(spec.idle_timeout_us, 0);
}

void ReceiveMachine::set_sender_grid(const PartGrid& grid) {
  CHECK_EQ(grid.num_tokens, spec_.num_tokens);
  if (!have_.empty()) {
    CHECK_EQ(grid.block_tokens, grid_.block_tokens);
    return;
  }
  grid_ = grid;
  const int64_t first_block = grid.first_block(spec_.first_token);
  first_part_ = first_block * grid.parts_per_block();
  expected_bytes_ = grid.bytes_from(first_block);
  have_.assign(static_cast<size_t>(grid.num_layers * grid.parts_per_layer()), false);
}

void ReceiveMachine::start(int64_t now_us, Actions& out) {
  CHECK(spec_.pull);
  out.push_back(Tell{Pull{spec_.handle, spec_.num_tokens, spec_.first_token, remaining_us(spec_.deadline_us, now_us), spec_.prompt}});
}

void ReceiveMachine::receive(const Message& message, int64_t payload_bytes, bool intact, int64_t now_us, Actions& out) {
  if (state_ == State::kEnded) return;
  CHECK(!have_.empty());
  last_heard_us_ = now_us;
  if (const Begin* begin = std::get_if<Begin>(&message)) return on_begin(*begin, now_us, out);
  if (const Data* data = std::get_if<Data>(&message)) return on_data(*data, payload_bytes, intact, now_us, out);
  if (const Commit* commit = std::get_if<Commit>(&message)) return on_commit(*commit, now_us, out);
  if (std::get_if<Heartbeat>(&message) != nullptr) return;
  if (const Abort* abort = std::get_if<Abort>(&message)) {
    out.push_back(Tell{AbortAck{spec_.handle, Side::kSender}});
    return finish(make_error(ErrorKind::kAborted, "the prefill side ended transfer {}: {}", spec_.handle.short_name(),
                             abort->text),
                  out);
  }
  // Of an earlier transfer of the same handle, which was aborted here: nothing that this one waits for.
  if (std::get_if<AbortAck>(&message) != nullptr) return;
  if (const Fault* fault = std::get_if<Fault>(&message)) return finish(to_error(*fault, "the prefill side"), out);
  refuse(FaultCode::kProtocol, ErrorKind::kInternal,
         fmt::format("a receiver got the message '{}'", message_name(message)), out);
}

void ReceiveMachine::on_begin(const Begin& begin, int64_t now_us, Actions& out) {
  if (state_ == State::kReceiving && !spec_.pull) return;  // a repetition
  if (state_ != State::kExpecting) {
    return refuse(FaultCode::kProtocol, ErrorKind::kInternal, "a pull was answered with 'begin'", out);
  }
  if (begin.num_tokens != spec_.num_tokens) {
    return refuse(FaultCode::kWrongLength, ErrorKind::kInternal,
                  fmt::format("{} tokens were reserved, {} are offered", spec_.num_tokens, begin.num_tokens), out);
  }
  if (begin.prompt != spec_.prompt) {
    return refuse(FaultCode::kOtherPrompt, ErrorKind::kInvalidArgument,
                  "the prefill leg was given another prompt than the decode leg; send both the same tokens", out);
  }
  if (begin.first_token > spec_.first_token) {
    return refuse(FaultCode::kOutOfRange, ErrorKind::kInternal,
                  fmt::format("tokens are needed from {} on, offered from {} on", spec_.first_token, begin.first_token),
                  out);
  }
  state_ = State::kReceiving;
  last_progress_us_ = now_us;
  spec_.deadline_us = earlier_deadline(spec_.deadline_us, begin.remaining_us, now_us);
  out.push_back(Tell{Accept{spec_.handle, spec_.first_token}});
}

bool ReceiveMachine::is_in_range(const Data& data) const {
  // Numbers of the wire are below 2^48, so the sum cannot overflow.
  return data.layer < grid_.num_layers && data.num_parts >= 1 && data.first_part >= first_part_ &&
         data.first_part + data.num_parts <= grid_.parts_per_layer();
}

int64_t ReceiveMachine::count_present(const Data& data) const {
  const auto begin = have_.begin() + data.layer * grid_.parts_per_layer() + data.first_part;
  return std::count(begin, begin + data.num_parts, true);
}

std::optional<Write> ReceiveMachine::find_place(const Data& data, int64_t payload_bytes) const {
  if (state_ == State::kEnded || state_ == State::kExpecting || !is_in_range(data)) return std::nullopt;
  if (payload_bytes != grid_.bytes_of(data.first_part, data.num_parts)) return std::nullopt;
  if (count_present(data) != 0) return std::nullopt;
  return Write{data.layer, data.first_part, data.num_parts};
}

void ReceiveMachine::on_data(const Data& data, int64_t payload_bytes, bool intact, int64_t now_us, Actions& out) {
  if (state_ == State::kExpecting) {
    return refuse(FaultCode::kProtocol, ErrorKind::kInternal, "data came before 'begin'", out);
  }
  state_ = State::kReceiving;
  if (!is_in_range(data)) {
    return refuse(
        FaultCode::kOutOfRange, ErrorKind::kInternal,
        fmt::format("layer {} parts {} + {}; {} layers and parts {} … {} were asked for", data.layer, data.first_part,
                    data.num_parts, grid_.num_layers, first_part_, grid_.parts_per_layer() - 1),
        out);
  }
  const int64_t bytes = grid_.bytes_of(data.first_part, data.num_parts);
  if (payload_bytes != bytes) {
    return refuse(FaultCode::kWrongLength, ErrorKind::kInternal,
                  fmt::format("{} bytes for {} parts that have {}", payload_bytes, data.num_parts, bytes), out);
  }
  const int64_t already = count_present(data);
  if (already == data.num_parts) return;  // a repetition is never written
  if (already != 0) {
    return refuse(FaultCode::kProtocol, ErrorKind::kInternal,
                  fmt::format("{} of {} parts had come before", already, data.num_parts), out);
  }
  if (!intact) {
    return refuse(
        FaultCode::kChecksum, ErrorKind::kDataLoss,
        fmt::format("the checksum of layer {} parts {} + {} is wrong", data.layer, data.first_part, data.num_parts),
        out);
  }
  std::fill_n(have_.begin() + data.layer * grid_.parts_per_layer() + data.first_part, data.num_parts, true);
  received_bytes_ += bytes;
  last_progress_us_ = now_us;
  out.push_back(Write{data.layer, data.first_part, data.num_parts});
  try_complete(out);
}

void ReceiveMachine::on_commit(const Commit& commit, int64_t now_us, Actions& out) {
  if (state_ == State::kExpecting) {
    return refuse(FaultCode::kProtocol, ErrorKind::kInternal, "'commit' came before 'begin'", out);
  }
  state_ = State::kReceiving;
  if (commit_.has_value()) return;  // a repetition
  if (commit.num_tokens != spec_.num_tokens || commit.num_bytes != expected_bytes_) {
    return refuse(FaultCode::kWrongLength, ErrorKind::kInternal,
                  fmt::format("{} tokens and {} bytes were committed instead of {} and {}", commit.num_tokens,
                              commit.num_bytes, spec_.num_tokens, expected_bytes_),
                  out);
  }
  if (commit.first_token.has_value() == spec_.pull) {
    return refuse(FaultCode::kProtocol, ErrorKind::kInternal,
                  spec_.pull ? "a pull was committed with a first token" : "a push was committed without a first token",
                  out);
  }
  commit_ = commit;
  last_progress_us_ = now_us;
  try_complete(out);
}

void ReceiveMachine::try_complete(Actions& out) {
  if (!commit_.has_value() || received_bytes_ != expected_bytes_) return;
  out.push_back(Tell{Ack{spec_.handle, received_bytes_}});
  state_ = State::kEnded;
  out.push_back(Finish{{}, commit_->first_token, received_bytes_});
}

void ReceiveMachine::refuse(FaultCode code, ErrorKind kind, std::string text, Actions& out) {
  out.push_back(Tell{Fault{spec_.handle, Side::kSender, code, text}});
  finish(make_error(kind, "transfer {}: {}", spec_.handle.short_name(), text), out);
}

void ReceiveMachine::finish(Status status, Actions& out) {
  state_ = State::kEnded;
  out.push_back(Finish{std::move(status), std::nullopt, received_bytes_});
}

void ReceiveMachine::lose_peer(const Error& why, Actions& out) {
  if (state_ == State::kEnded) return;
  finish(make_error(ErrorKind::kUnavailable, "transfer {} after {}: {}", spec_.handle.short_name(), describe_progress(),
                    why.message),
         out);
}

void ReceiveMachine::abort(Actions& out) {
  if (state_ == State::kEnded) return;
  if (state_ != State::kExpecting) {
    out.push_back(Tell{Abort{spec_.handle, Side::kSender, "the decode side ended the request", spec_.prompt}});
  }
  finish(make_error(ErrorKind::kAborted, "transfer {} was aborted here after {}", spec_.handle.short_name(),
                    describe_progress()),
         out);
}

int64_t ReceiveMachine::next_expiry_us() const {
  if (state_ == State::kEnded) return kNever;
  const int64_t deadline_us = spec_.deadline_us == 0 ? kNever : spec_.deadline_us;
  // Nobody heartbeats before Begin: prefill may not even have the request. Then the deadline alone is the limit.
  if (state_ == State::kExpecting && spec_.deadline_us != 0) return deadline_us;
  return std::min({deadline_us, last_heard_us_ + spec_.idle_timeout_us, last_progress_us_ + kMaxQuietUs});
}

void ReceiveMachine::expire(int64_t now_us, Actions& out) {
  if (now_us < next_expiry_us()) return;
  const bool late = spec_.deadline_us != 0 && now_us >= spec_.deadline_us;
  const std::string text =
      late ? fmt::format("the deadline passed after {}", describe_progress())
           : fmt::format("nothing came for {} ms after {}", (now_us - last_heard_us_) / 1000, describe_progress());
  if (state_ != State::kExpecting) out.push_back(Tell{Abort{spec_.handle, Side::kSender, text, spec_.prompt}});
  const bool silent = state_ != State::kExpecting && now_us - last_heard_us_ >= spec_.idle_timeout_us;
  state_ = State::kEnded;
  out.push_back(Finish{make_error(late ? ErrorKind::kDeadlineExceeded : ErrorKind::kUnavailable, "transfer {}: {}",
                                  spec_.handle.short_name(), text),
                       std::nullopt, received_bytes_, silent});
}

std::string ReceiveMachine::describe_progress() const {
  switch (state_) {
    case State::kExpecting:
      return "no word from the prefill side";
    case State::kRequested:
      return "no answer to the pull";
    default:
      return fmt::format("{} of {} bytes", received_bytes_, expected_bytes_);
  }
}

}  // namespace tandem::transfer
