// A benchmark of decode workers with one prompt (`--repeat-d-times`): each request that comes is sent `copies` times
// more once its first token is there. By then its prompt stands in the prefill worker's prefix cache, so that prefill
// computes it once (but for its last block) and hands its KV to a decode worker once for each copy. The client gets the
// answer of its own request; those of the copies are compared with it, counted and dropped.
#pragma once

#include <cstdint>
#include <memory>

#include "src/base/metrics.h"
#include "src/engine/worker.h"

namespace boost::asio {
class io_context;
}

namespace tandem::router {

class RepeatingWorker final : public engine::Worker {
 public:
  // Everything runs on the thread of `io`, also the events of `inner`, none of which may come from inside submit(). All
  // references must outlive this; what happens to copies after it is not counted.
  RepeatingWorker(boost::asio::io_context& io, engine::Worker& inner, int64_t copies, Registry& metrics);
  ~RepeatingWorker() override;

  // A copy ends at the deadline of its request. It is the same if it has the same tokens in the same order.
  RequestId submit(engine::TokenRequest request, engine::EventSink sink) override;
  // The client has left: its copies go as well.
  void cancel(RequestId id) override;
  void release(const transfer::KvTransferParams& publication) override;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace tandem::router
