// The agent in production: an AgentCore and a messenger on one thread, fed by the engine through a queue.
#include <atomic>
#include <mutex>
#include <thread>
#include <utility>

#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/comm/messenger.h"
#include "src/transfer/agent_core.h"

namespace tandem::transfer {
namespace {

constexpr int64_t kMaxSleepUs = 1'000'000;
constexpr size_t kMaxCommands = 1 << 20;  // far above what an engine can have open; more is a bug
constexpr size_t kIncarnationBytes = 8;

const char* describe(comm::Transport transport, bool shareable) {
  switch (transport) {
    case comm::Transport::kAuto:
      return shareable ? "shared memory within this host, TCP between hosts"
                       : "TCP, because the KV memory is not shareable";
    case comm::Transport::kSharedMemory:
      return "shared memory only";
    case comm::Transport::kTcp:
      return "TCP everywhere";
    case comm::Transport::kUcx:
      return "UCX: its shared memory within this host, its TCP between hosts";
    case comm::Transport::kUcxTcp:
      return "UCX's TCP everywhere";
  }
  return "?";
}

const char* checksum_option(KvChecksum checksum) {
  return checksum == KvChecksum::kAuto ? "auto" : checksum == KvChecksum::kOn ? "on" : "off";
}

class ThreadAgent final : public Agent, private comm::MessageHandler {
 public:
  ThreadAgent(model::KvCache& cache, const AgentOptions& options, std::function<void()> wake)
      : engine_id_(fmt::format("{}:{}", options.engine_id, random_hex(kIncarnationBytes))),
        wake_(std::move(wake)),
        memory_{cache.base(), cache.bytes(), cache.shared_fd()},
        core_(KvMemory{cache.base(), cache.layer_stride_bytes(), cache.num_blocks(), cache.layout()}, options,
              engine_id_, clock_, [this](Done&& done) { add_done(std::move(done)); }) {}

  ~ThreadAgent() override {
    if (!thread_.joinable()) return;
    stop_.store(true);
    messenger_->wake();
    thread_.join();
  }

  Status start(const AgentOptions& options, const MakeMessenger& make_messenger) {
    comm::MessengerOptions messenger_options;
    messenger_options.listen_host = options.listen_host;
    messenger_options.listen_port = options.listen_port;
    messenger_options.transport = options.transport;
    messenger_options.memory = memory_;
    TANDEM_ASSIGN(messenger_, make_messenger(messenger_options, *this));
    core_.set_messenger(messenger_.get());
    port_ = messenger_->port();
    thread_ = std::thread([this] { run(); });
    return {};
  }

  const std::string& engine_id() const override { return engine_id_; }
  int64_t port() const override { return port_; }

  std::string expect(TransferId id, const BlockSpan& span, int64_t deadline_us) override {
    const Handle handle = make_handle(id.value);
    open(1);
    post([=, this] { core_.expect(id, handle, span, deadline_us); });
    return handle.to_string();
  }
  void pull(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us) override {
    open(1);
    post([=, this] { core_.pull(id, remote, span, deadline_us); });
  }
  void begin_send(TransferId id, const KvTransferParams& remote, const BlockSpan& span, int64_t deadline_us) override {
    open(1);
    post([=, this] { core_.begin_send(id, remote, span, deadline_us); });
  }
  void send_blocks(TransferId id, int64_t layer, int64_t first, int64_t count) override {
    post([=, this] { core_.send_blocks(id, layer, first, count); });
  }
  void commit_send(TransferId id, const FirstToken& first_token) override {
    post([=, this] { core_.commit_send(id, first_token); });
  }
  std::string publish(TransferId id, const BlockSpan& span) override {
    const Handle handle = make_handle(id.value);
    open(1);
    post([=, this] { core_.publish(id, handle, span); });
    return handle.to_string();
  }
  void renew_lease(const KvTransferParams& remote) override {
    post([=, this] { core_.renew_lease(remote); });
  }
  void decline(const KvTransferParams& remote, const Hash256& prompt) override {
    post([=, this] { core_.decline(remote, prompt); });
  }
  void release(const std::string& handle) override {
    post([=, this] { core_.release(handle); });
  }
  void abort(TransferId id) override {
    post([=, this] { core_.abort(id); });
  }

  std::vector<Done> take_done() override {
    const std::lock_guard<std::mutex> lock(done_mutex_);
    return std::exchange(done_, {});
  }
  int64_t num_open() const override { return num_open_.load(); }

 private:
  using Command = std::function<void()>;

  void open(int64_t count) { num_open_.fetch_add(count); }

  void post(Command command) {
    {
      const std::lock_guard<std::mutex> lock(command_mutex_);
      CHECK_LT(commands_.size(), kMaxCommands);
      commands_.push_back(std::move(command));
      has_commands_.store(true, std::memory_order_release);
    }
    messenger_->wake();
  }

  void run_commands() {
    if (!has_commands_.load(std::memory_order_acquire)) return;
    std::vector<Command> commands;
    {
      const std::lock_guard<std::mutex> lock(command_mutex_);
      commands.swap(commands_);
      has_commands_.store(false, std::memory_order_relaxed);
    }
    for (const Command& command : commands) command();
  }

  void run() {
    while (!stop_.load()) {
      run_commands();
      const bool more = core_.pump();
      const int64_t now_us = clock_.now_us();
      const int64_t timer_us = core_.next_timer_us();
      if (timer_us <= now_us) core_.run_timers();
      const int64_t sleep_us = std::clamp<int64_t>(timer_us - now_us, 0, kMaxSleepUs);
      messenger_->poll(more || has_commands_.load(std::memory_order_acquire) ? 0 : sleep_us);
    }
    // Peers see the connections close and end their transfers at once.
    messenger_.reset();
  }

  void add_done(Done&& done) {
    {
      const std::lock_guard<std::mutex> lock(done_mutex_);
      done_.push_back(std::move(done));
    }
    num_open_.fetch_sub(1);
    wake_();
  }

  // A handle leaves this process after its command was queued, so a peer's first message can only come later; but the
  // queue may not have been looked at since. Hence commands go first.
  void on_message(comm::ConnectionId connection, std::span<const std::byte> message,
                  std::span<const std::byte> payload) override {
    run_commands();
    core_.on_message(connection, message, payload);
  }
  void on_accept(comm::ConnectionId connection) override { core_.on_accept(connection); }
  void on_borrowed_message(comm::ConnectionId connection, std::span<const std::byte> message,
                           const comm::BorrowedPayload& payload) override {
    run_commands();
    core_.on_borrowed_message(connection, message, payload);
  }
  bool find_place(comm::ConnectionId connection, std::span<const std::byte> message, int64_t payload_bytes,
                  std::vector<comm::MutableByteSpan>& pieces) override {
    return core_.find_place(connection, message, payload_bytes, pieces);
  }
  void on_placed_message(comm::ConnectionId connection, std::span<const std::byte> message,
                         int64_t payload_bytes) override {
    core_.on_placed_message(connection, message, payload_bytes);
  }
  void on_sent(comm::ConnectionId connection, uint64_t token) override { core_.on_sent(connection, token); }
  void on_closed(comm::ConnectionId connection, const Error& why) override { core_.on_closed(connection, why); }

  const SteadyClock clock_;
  const std::string engine_id_;
  const std::function<void()> wake_;
  const comm::LocalMemory memory_;
  AgentCore core_;
  std::unique_ptr<comm::Messenger> messenger_;  // goes before the core, which it calls
  int64_t port_ = 0;

  std::mutex command_mutex_;
  std::vector<Command> commands_;
  std::atomic<bool> has_commands_{false};
  std::mutex done_mutex_;
  std::vector<Done> done_;
  std::atomic<int64_t> num_open_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace

Result<std::unique_ptr<Agent>> make_agent(model::KvCache& cache, const AgentOptions& options,
                                          std::function<void()> wake, const MakeMessenger& make_messenger) {
  if (options.engine_id.empty() || options.engine_id.size() > kMaxNameBytes / 2) {
    return invalid_argument("engine_id", "the engine id has {} characters, allowed are 1 … {}",
                            options.engine_id.size(), kMaxNameBytes / 2);
  }
  if (options.model_fingerprint.size() > kMaxNameBytes) {
    return invalid_argument("model_fingerprint", "it has {} characters, allowed are {}",
                            options.model_fingerprint.size(), kMaxNameBytes);
  }
  std::unique_ptr<ThreadAgent> agent = std::make_unique<ThreadAgent>(cache, options, std::move(wake));
  TANDEM_TRY(agent->start(options, make_messenger));
  log_info("transfer", "agent {} listens on {}:{}; transport {} ({}); checksum {}", agent->engine_id(),
           options.listen_host, agent->port(), comm::transport_option(options.transport),
           describe(options.transport, cache.shared_fd() >= 0), checksum_option(options.checksum));
  return std::unique_ptr<Agent>(std::move(agent));
}

}  // namespace tandem::transfer
