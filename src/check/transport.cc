#include "src/check/transport.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "src/comm/shared_region.h"

#include "src/base/clock.h"

namespace tandem::check {
namespace {

constexpr int64_t kPollUs = 50'000;
constexpr int64_t kMostPending = 64;  // payloads that the transport has not taken yet

// A ping comes back as it is. Payloads are counted. The end comes back with the count of payload bytes before it.
enum class Kind : uint64_t { kPing = 1, kData = 2, kEnd = 3 };
struct Note {
  Kind kind = Kind::kPing;
  int64_t number = 0;
};

std::span<const std::byte> bytes_of(const Note& note) { return std::as_bytes(std::span(&note, 1)); }

bool read_note(std::span<const std::byte> message, Note& note) {
  if (message.size() != sizeof note) return false;
  std::memcpy(&note, message.data(), sizeof note);
  return true;
}

// As KV memory is: processes of this host may read it.
Result<comm::SharedRegion> make_payload_memory() {
  return comm::SharedRegion::create("tandem-check", comm::kMaxPayloadBytes);
}
comm::LocalMemory local_memory(const comm::SharedRegion& region) {
  return {region.data(), region.bytes(), region.address().fd};
}

}  // namespace

struct TransportEcho::Handler final : comm::MessageHandler {
  comm::Messenger* messenger = nullptr;
  std::unordered_map<comm::ConnectionId, int64_t> received_bytes;
  std::vector<std::byte> taken;
  comm::SharedRegion memory;  // both sides of shared memory must have some

  void on_accept(comm::ConnectionId connection) override { received_bytes[connection] = 0; }
  void on_message(comm::ConnectionId connection, std::span<const std::byte> message,
                  std::span<const std::byte> payload) override {
    Note note;
    if (!read_note(message, note)) return messenger->close(connection);
    taken.assign(payload.begin(), payload.end());  // as an agent does: the copy is part of what is measured
    received_bytes[connection] += std::ssize(payload);
    if (note.kind == Kind::kData) return;
    if (note.kind == Kind::kEnd) note.number = received_bytes[connection];
    messenger->send(connection, bytes_of(note));
  }
  void on_sent(comm::ConnectionId, uint64_t) override {}
  void on_closed(comm::ConnectionId connection, const Error&) override { received_bytes.erase(connection); }
};

TransportEcho::TransportEcho() : handler_(std::make_unique<Handler>()) {}

Result<std::unique_ptr<TransportEcho>> TransportEcho::start(const std::string& host, int64_t port) {
  std::unique_ptr<TransportEcho> echo(new TransportEcho());
  comm::MessengerOptions options;
  options.listen_host = host;
  options.listen_port = port;
  TANDEM_ASSIGN(echo->handler_->memory, make_payload_memory());
  options.memory = local_memory(echo->handler_->memory);
  TANDEM_ASSIGN(echo->messenger_, comm::make_messenger(options, *echo->handler_));
  echo->handler_->messenger = echo->messenger_.get();
  echo->thread_ = std::thread([raw = echo.get()] {
    while (!raw->ends_) raw->messenger_->poll(kPollUs);
  });
  return echo;
}

TransportEcho::~TransportEcho() {
  ends_ = true;
  if (messenger_ != nullptr) messenger_->wake();
  if (thread_.joinable()) thread_.join();
}

namespace {

class Measurement final : public comm::MessageHandler {
 public:
  Result<TransportReading> run(const std::string& own_host, const std::string& host, int64_t port) {
    comm::MessengerOptions options;
    options.listen_host = own_host;
    TANDEM_ASSIGN(payload_, make_payload_memory());
    options.memory = local_memory(payload_);
    TANDEM_ASSIGN(messenger_, comm::make_messenger(options, *this));
    TANDEM_ASSIGN(connection_, messenger_->connect(host, port));
    std::vector<double> round_trips_us;
    for (int64_t i = 0; i < kRoundTrips; ++i) {
      const auto start = std::chrono::steady_clock::now();
      TANDEM_TRY(ask({Kind::kPing, i}));
      const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
      round_trips_us.push_back(time.count());  // the first includes the connection
    }
    TransportReading reading;
    std::sort(round_trips_us.begin(), round_trips_us.end());
    reading.round_trip_us = round_trips_us[kRoundTrips / 2];
    const int64_t start_us = clock_.now_us();
    TANDEM_ASSIGN(reading.bytes, send_payloads(start_us + kSendingTimeUs));
    TANDEM_TRY(ask({Kind::kEnd, 0}));
    reading.time_us = clock_.now_us() - start_us;
    if (answer_.number != reading.bytes) {
      return make_error(ErrorKind::kDataLoss, "{} of {} bytes arrived", answer_.number, reading.bytes);
    }
    reading.transport = messenger_->transport_name(connection_);
    return reading;
  }

  void on_accept(comm::ConnectionId connection) override { messenger_->close(connection); }
  void on_message(comm::ConnectionId, std::span<const std::byte> message, std::span<const std::byte>) override {
    answered_ = read_note(message, answer_);
  }
  void on_sent(comm::ConnectionId, uint64_t) override { --pending_; }
  void on_closed(comm::ConnectionId, const Error& why) override { closed_ = why; }

 private:
  Status ask(const Note& note) {
    answered_ = false;
    messenger_->send(connection_, bytes_of(note));
    const int64_t end_us = clock_.now_us() + kAnswerTimeUs;
    while (!answered_) {
      if (closed_) return *closed_;
      if (clock_.now_us() > end_us) {
        return make_error(ErrorKind::kDeadlineExceeded, "no answer within {} s", kAnswerTimeUs / 1'000'000);
      }
      messenger_->poll(kPollUs);
    }
    return {};
  }

  Result<int64_t> send_payloads(int64_t end_us) {
    int64_t bytes = 0;
    const Note note{Kind::kData, 0};
    const std::span<const std::byte> payload = payload_.span().first(static_cast<size_t>(comm::kMaxPayloadBytes));
    uint64_t token = 0;
    while (clock_.now_us() < end_us && bytes + std::ssize(payload) <= kMostTransportBytes) {
      if (closed_) return *closed_;
      if (pending_ >= kMostPending) {
        messenger_->poll(kPollUs);
        continue;
      }
      const comm::SendResult sent = messenger_->send(connection_, bytes_of(note), payload, ++token);
      if (sent == comm::SendResult::kClosed) {
        messenger_->poll(0);  // on_closed says why
        return closed_.value_or(make_error(ErrorKind::kUnavailable, "the connection closed"));
      }
      bytes += std::ssize(payload);
      if (sent == comm::SendResult::kPending) ++pending_;
    }
    return bytes;
  }

  const SteadyClock clock_;
  comm::SharedRegion payload_;
  comm::ConnectionId connection_;
  Note answer_;
  bool answered_ = false;
  int64_t pending_ = 0;
  std::optional<Error> closed_;
  std::unique_ptr<comm::Messenger> messenger_;  // first to go: it calls back
};

}  // namespace

Result<TransportReading> measure_transport(const std::string& own_host, const std::string& host, int64_t port) {
  return Measurement().run(own_host, host, port);
}

}  // namespace tandem::check
