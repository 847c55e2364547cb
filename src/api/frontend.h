// The OpenAI API in front of a Worker: HTTP in, token requests out; token events in, JSON and server-sent events out.
// `tandem serve` puts it before an engine, `tandem route` before a routed worker.
//
//   Frontend frontend(io, options, clock, registry);
//   auto server = HttpServer::listen(io, host, port, frontend.http_options());
//   frontend.add_routes(**server);
//   (*server)->start();              // answers /health with 503 and everything else with "loading"
//   …
//   frontend.open(served, worker);        // on the I/O thread, once the model is there
//
// Threads: everything runs on the thread of `io`. The worker calls its sinks on a thread of its own; they only put the
// event into a mailbox. Detokenizing a token takes about a microsecond and is done in line. Parsing, rendering and
// tokenizing are done in line for bodies up to kInlineBodyBytes, which takes less than two thread switches are worth;
// larger ones go to a text thread, so that a long prompt does not stop the streams of others, and those above
// kLargeBodyBytes to one of their own, so that it does not stop the prompts of others either.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/api/http_server.h"
#include "src/api/openai_request.h"
#include "src/api/served_text.h"
#include "src/base/clock.h"
#include "src/base/metrics.h"
#include "src/engine/worker.h"

namespace boost::asio {
class io_context;
}

namespace tandem::api {

// POST: nobody comes for a publication (pull). The body is {"kv_transfer_params":{…}} with remote_engine_id and
// remote_request_id of the object that the prefill leg's answer carried (other fields are ignored). Refused with 400
// unless RequestPolicy::accepts_kv_transfer; otherwise 202, whether or not there is such a publication.
inline constexpr const char* kReleasePath = "/tandem/v1/release_publication";

// What /health says. Ready: 200, else 503; the body is {"status":…,"progress":…}.
struct Health {
  bool ready = false;
  std::string status = "loading";  // "ok", "loading", "dead", …
  std::optional<double> progress;  // 0 … 1
};

struct FrontendOptions {
  std::string model_name;  // the label of request metrics; empty: the first served name
  std::vector<std::string> api_keys;
  RequestPolicy policy;
  // X-Data-Parallel-Rank may name one of ranks [first_rank, first_rank + num_ranks); none: the header is refused.
  int32_t first_rank = 0;
  int32_t num_ranks = 0;
  // May x-prefiller-host-port name this "host:port"? Unset: the header is refused.
  std::function<Status(const std::string&)> check_prefiller;
  double request_timeout_s = 600;
  int64_t max_concurrent_requests = 4096;  // more are answered with 429
  std::string version;
  std::function<Health()> health;  // unset: ready once open() was called
  std::function<int64_t()> server_load;  // what GET /load says; unset: the requests that run here
  SpanSink* spans = nullptr;       // null: requests are not traced, and a client's trace context goes on unchanged
};

class Frontend {
 public:
  static constexpr size_t kInlineBodyBytes = 16UL << 10;
  static constexpr size_t kLargeBodyBytes = 1UL << 20;

  // `clock` must be the one that the worker's deadlines are on. All three references must outlive this.
  Frontend(boost::asio::io_context& io, FrontendOptions options, const Clock& clock, Registry& registry);
  ~Frontend();  // requests that still run end with 503
  Frontend(const Frontend&) = delete;
  Frontend& operator=(const Frontend&) = delete;

  // Limits, keys and the metrics of HTTP. The front end must outlive the server.
  HttpServerOptions http_options() const;
  void add_routes(HttpServer& server);

  // Serves from now on. `worker` must outlive this or the next close().
  void open(ServedText served, engine::Worker& worker);
  // Running requests end with `why`, later ones are refused with it.
  void close(Error why);
  // Running requests go on, later ones are refused with `why`, and /health says "draining".
  void drain(Error why);
  int64_t num_requests() const;  // from any thread

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace tandem::api
