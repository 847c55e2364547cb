#include "src/transfer/test_peer.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>
#include <thread>

#include "src/base/log.h"

namespace tandem::transfer {
namespace {

constexpr uint64_t kChildSeed = 1000;

uint64_t pattern(uint64_t seed, int64_t layer) {
  return (seed * 977 + static_cast<uint64_t>(layer) + 1) * 0x9e3779b97f4a7c15;
}

}  // namespace

model::KvLayout peer_layout() {
  model::KvLayout layout;
  layout.kind = model::KvKind::kMla;
  layout.num_layers = 4;
  layout.block_size = 16;
  layout.bytes_per_token = 512;
  layout.latent_dim = 224;
  layout.rope_dim = 32;
  return layout;
}

std::vector<BlockId> first_blocks(int64_t count, int64_t first) {
  std::vector<BlockId> blocks;
  for (int64_t i = 0; i < count; ++i) blocks.emplace_back(static_cast<int32_t>(first + i));
  return blocks;
}

AgentOptions make_options(const std::string& engine_id, comm::Transport transport) {
  AgentOptions options;
  options.engine_id = engine_id;
  options.model_fingerprint = "model-a";
  options.transport = transport;
  options.idle_timeout_us = 2'000'000;
  return options;
}

LocalPeer::LocalPeer(const AgentOptions& options, const model::KvLayout& layout, int64_t num_blocks)
    : ops_(kernels::make_ops("ref", 1).value()), cache_(std::make_unique<model::KvCache>(*ops_, layout, num_blocks, /*shareable=*/true)) {
  agent_ = make_agent(*cache_, options, [this] {
             const std::lock_guard<std::mutex> lock(mutex_);
             has_news_ = true;
             woken_.notify_all();
           }).value();
}

void LocalPeer::fill(BlockId block, uint64_t seed) {
  const size_t words = static_cast<size_t>(cache_->layout().block_bytes()) / sizeof(uint64_t);
  for (int64_t layer = 0; layer < cache_->layout().num_layers; ++layer) {
    uint64_t value = pattern(seed, layer);
    for (size_t i = 0; i < words; ++i, value += 0x1234567) {
      std::memcpy(cache_->block_address(layer, block) + i * sizeof value, &value, sizeof value);
    }
  }
}

bool LocalPeer::holds(BlockId block, uint64_t seed) {
  const size_t words = static_cast<size_t>(cache_->layout().block_bytes()) / sizeof(uint64_t);
  for (int64_t layer = 0; layer < cache_->layout().num_layers; ++layer) {
    uint64_t value = pattern(seed, layer);
    for (size_t i = 0; i < words; ++i, value += 0x1234567) {
      if (std::memcmp(cache_->block_address(layer, block) + i * sizeof value, &value, sizeof value) != 0) return false;
    }
  }
  return true;
}

void LocalPeer::collect() {
  for (Done& done : agent_->take_done()) {
    if (seen_[done.id]) ++duplicate_dones;
    seen_[done.id] = true;
    done_.emplace(done.id, std::move(done));
  }
}

std::optional<Done> LocalPeer::wait_done(TransferId id, int64_t limit_us) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(limit_us);
  while (true) {
    collect();
    const auto found = done_.find(id);
    if (found != done_.end()) {
      Done done = std::move(found->second);
      done_.erase(found);
      return done;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    if (!woken_.wait_until(lock, end, [this] { return has_news_; })) return std::nullopt;
    has_news_ = false;
  }
}

std::vector<Done> LocalPeer::take_done() {
  collect();
  std::vector<Done> list;
  for (auto& [id, done] : done_) list.push_back(std::move(done));
  done_.clear();
  return list;
}

KvTransferParams LocalPeer::address(const std::string& handle) {
  KvTransferParams params;
  params.remote_engine_id = agent_->engine_id();
  params.remote_request_id = handle;
  params.remote_host = "127.0.0.1";
  params.remote_port = agent_->port();
  return params;
}

// --- the child process ---

namespace {

// Sends blocks 0 … in four chunks, layer by layer, as a prefill engine would.
void push_slowly(LocalPeer& peer, TransferId id, int64_t num_blocks, int64_t pause_us) {
  const int64_t chunk = (num_blocks + 3) / 4;
  for (int64_t first = 0; first < num_blocks; first += chunk) {
    for (int64_t layer = 0; layer < peer_layout().num_layers; ++layer) {
      if (pause_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
      peer.agent().send_blocks(id, layer, first, std::min(chunk, num_blocks - first));
    }
  }
  peer.agent().commit_send(id, FirstToken{11, -0.5F, {}, 0});
}

std::string answer(LocalPeer& peer, std::vector<TransferId>& open, const std::string& line) {
  std::istringstream in(line);
  std::string verb;
  in >> verb;
  const int64_t block_size = peer_layout().block_size;
  const auto span_of = [&](int64_t tokens) {
    return BlockSpan{0, first_blocks((tokens + block_size - 1) / block_size), tokens};
  };
  if (verb == "publish" || verb == "expect") {
    int64_t tokens = 0;
    in >> tokens;
    open.push_back(peer.next_id());
    return verb == "publish" ? peer.agent().publish(open.back(), span_of(tokens))
                             : peer.agent().expect(open.back(), span_of(tokens), 0);
  }
  if (verb == "push" || verb == "pull") {
    KvTransferParams remote;
    int64_t tokens = 0;
    int64_t pause_us = 0;
    in >> remote.remote_request_id >> remote.remote_engine_id >> remote.remote_port >> tokens >> pause_us;
    remote.remote_host = "127.0.0.1";
    open.push_back(peer.next_id());
    const BlockSpan span = span_of(tokens);
    if (verb == "pull") {
      peer.agent().pull(open.back(), remote, span, 0);
    } else {
      peer.agent().begin_send(open.back(), remote, span, 0);
      std::thread([&peer, id = open.back(), count = std::ssize(span.blocks), pause_us] {
        push_slowly(peer, id, count, pause_us);
      }).detach();
    }
    return "started";
  }
  if (verb == "wait") {
    if (open.empty()) return "nothing";
    const std::optional<Done> done = peer.wait_done(open.front());
    open.erase(open.begin());
    if (!done.has_value()) return "never";
    return done->status.ok() ? "ok" : error_kind_name(done->status.error().kind);
  }
  if (verb == "check") {
    int64_t tokens = 0;
    in >> tokens;
    for (BlockId block : span_of(tokens).blocks) {
      if (!peer.holds(block, kChildSeed + static_cast<uint64_t>(block.value))) return "different";
    }
    return "equal";
  }
  return "what?";
}

}  // namespace

int run_child(int argc, char** argv) {
  CHECK_EQ(argc, 5);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  init_log(LogLevel::kError, "child");
  AgentOptions options = make_options(argv[2], *comm::parse_transport(argv[3]));
  options.listen_port = std::stoll(argv[4]);
  LocalPeer peer(options, peer_layout(), kPeerBlocks);
  for (int32_t i = 0; i < kPeerBlocks; ++i) peer.fill(BlockId(i), kChildSeed + static_cast<uint64_t>(i));
  std::cout << peer.agent().engine_id() << ' ' << peer.agent().port() << std::endl;
  std::vector<TransferId> open;
  std::string line;
  while (std::getline(std::cin, line)) std::cout << answer(peer, open, line) << std::endl;
  return 0;
}

ChildPeer::ChildPeer(const std::string& engine_id, comm::Transport transport, int64_t port) {
  int in[2];
  int out[2];
  CHECK_EQ(pipe2(in, O_CLOEXEC), 0);
  CHECK_EQ(pipe2(out, O_CLOEXEC), 0);
  const std::string port_text = std::to_string(port);
  pid_ = fork();
  CHECK_GE(pid_, 0);
  if (pid_ == 0) {
    dup2(in[0], STDIN_FILENO);
    dup2(out[1], STDOUT_FILENO);
    execl("/proc/self/exe", "transfer_test", kChildFlag, engine_id.c_str(), comm::transport_option(transport),
          port_text.c_str(), static_cast<char*>(nullptr));
    _exit(127);
  }
  close(in[0]);
  close(out[1]);
  to_child_ = in[1];
  from_child_ = out[0];
  std::istringstream hello(read_line());
  hello >> engine_id_ >> port_;
}

ChildPeer::~ChildPeer() {
  kill_now();
  close(to_child_);
  close(from_child_);
}

std::string ChildPeer::read_line() {
  std::string line;
  char c = 0;
  while (true) {
    pollfd event{from_child_, POLLIN, 0};
    if (poll(&event, 1, 30'000) != 1 || read(from_child_, &c, 1) != 1) return "(no answer)";
    if (c == '\n') return line;
    line.push_back(c);
  }
}

std::string ChildPeer::ask(const std::string& command) {
  const std::string line = command + "\n";
  if (write(to_child_, line.data(), line.size()) != std::ssize(line)) return "(gone)";
  return read_line();
}

void ChildPeer::signal(int number) const {
  ::kill(pid_, number);
  if (number != SIGSTOP) return;
  siginfo_t stopped{};
  ::waitid(P_PID, static_cast<id_t>(pid_), &stopped, WSTOPPED | WNOWAIT);  // on a busy machine that takes a while
}

void ChildPeer::kill_now() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

KvTransferParams ChildPeer::address(const std::string& handle) const {
  KvTransferParams params;
  params.remote_engine_id = engine_id_;
  params.remote_request_id = handle;
  params.remote_host = "127.0.0.1";
  params.remote_port = port_;
  return params;
}

}  // namespace tandem::transfer
