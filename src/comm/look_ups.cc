#include "src/comm/look_ups.h"

#include <sys/eventfd.h>

#include <thread>

namespace tandem::comm {

LookUps::LookUps(int wake_fd) { shared_->wake_fd = wake_fd; }

LookUps::~LookUps() {
  const std::lock_guard<std::mutex> lock(shared_->mutex);
  shared_->open = false;
}

Status LookUps::start(ConnectionId id, const std::string& host, int64_t port) {
  const std::lock_guard<std::mutex> lock(shared_->mutex);
  if (shared_->running >= kMaxLookUps) {
    return make_error(ErrorKind::kResourceExhausted, "{} host names are being looked up already", kMaxLookUps);
  }
  ++shared_->running;
  std::thread([shared = shared_, id, host, port] {
    Result<SocketAddress> result = look_up_address(host, port);
    const std::lock_guard<std::mutex> result_lock(shared->mutex);
    --shared->running;
    if (!shared->open) return;
    shared->done.emplace_back(id, std::move(result));
    eventfd_write(shared->wake_fd, 1);
  }).detach();
  return {};
}

std::vector<std::pair<ConnectionId, Result<SocketAddress>>> LookUps::take() {
  const std::lock_guard<std::mutex> lock(shared_->mutex);
  return std::exchange(shared_->done, {});
}

}  // namespace tandem::comm
