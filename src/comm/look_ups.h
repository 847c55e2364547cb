// Host names are looked up beside a messenger's thread, because the system's resolver may take seconds.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "src/comm/address.h"
#include "src/comm/messenger.h"

namespace tandem::comm {

inline constexpr int64_t kMaxLookUps = 8;  // at a time

class LookUps {
 public:
  // `wake_fd`, an eventfd that outlives this object, is raised with every result.
  explicit LookUps(int wake_fd);
  ~LookUps();  // waits for nobody: results of look-ups under way are dropped
  LookUps(const LookUps&) = delete;
  LookUps& operator=(const LookUps&) = delete;

  // An error if kMaxLookUps are running.
  Status start(ConnectionId id, const std::string& host, int64_t port);
  // What has come since the last call.
  std::vector<std::pair<ConnectionId, Result<SocketAddress>>> take();

 private:
  struct Shared {
    std::mutex mutex;
    bool open = true;
    int wake_fd = -1;
    int64_t running = 0;
    std::vector<std::pair<ConnectionId, Result<SocketAddress>>> done;
  };
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
};

}  // namespace tandem::comm
