// An endpoint of `tandem serve` with several ranks: HTTP, front end and router core on one thread, that of its io_context.
//
// A node has --api-server-count of them, all behind one listening socket: the kernel gives a connection to whichever is
// free. They are threads of one process, so none dies alone. Each knows all ranks and chooses among them by what it has
// sent there itself. Counters and histograms of /metrics are of all together; what is of one says which by `api_server`.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "src/api/frontend.h"
#include "src/api/http_client.h"
#include "src/api/http_server.h"
#include "src/base/options.h"
#include "src/commands/rank_options.h"
#include "src/group/coordinator.h"
#include "src/router/routed_worker.h"

namespace tandem::commands {

// What all endpoints of a node share; outlives them.
struct NodeFrontEndOptions {
  const Options& options;
  const NodeConfig& config;
  const api::ServedText& served;
  SpanSink* spans = nullptr;
  int64_t count = 1;
  std::function<int64_t()> num_requests;  // of all, from any thread: GET /load
};

class NodeFrontEnd {
 public:
  // `number`: 0 … count - 1. The first opens the port, the others share it. Takes connections once `io` runs.
  static Result<std::unique_ptr<NodeFrontEnd>> open(boost::asio::io_context& io, const NodeFrontEndOptions& options,
                                                    int64_t number, NodeFrontEnd* first, const Clock& clock,
                                                    Registry& metrics);
  ~NodeFrontEnd();

  uint16_t port() const { return server_->port(); }
  // From any thread.
  int64_t num_requests() const { return frontend_->num_requests(); }

  // All below on the thread of the io_context, or before it runs.

  // Of a node that hears nothing from a coordinator: where a rank of its own listens.
  Status add_rank(int32_t rank, const std::string& url);
  // Requests go to the ranks of the group as it is now.
  void take_status(const group::GroupStatus& status);
  // Takes no new requests.
  void drain(const Error& why);
  // Ends those that run.
  void close(const Error& why);

 private:
  NodeFrontEnd(boost::asio::io_context& io, const NodeFrontEndOptions& options);
  Status start(boost::asio::io_context& io, int64_t number, NodeFrontEnd* first, const Clock& clock, Registry& metrics);
  bool is_served_here(const group::MemberStatus& member) const;
  void take_member(const group::MemberStatus& member);
  api::Health health() const;
  void show_expert_load(std::shared_ptr<api::HttpExchange> exchange);

  struct RankWorker {
    std::string url;
    router::WorkerId id;
  };
  const NodeFrontEndOptions options_;
  std::unique_ptr<router::RoutedWorker> router_;
  std::unique_ptr<api::Frontend> frontend_;
  std::unique_ptr<api::HttpServer> server_;
  api::HttpClient client_;
  std::map<group::RankId, RankWorker> workers_;
  group::GroupStatus status_;
};

}  // namespace tandem::commands
