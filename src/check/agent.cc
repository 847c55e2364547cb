#include "src/check/agent.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <csignal>

#include "src/api/http_server.h"

namespace tandem::check {
namespace {

namespace asio = boost::asio;

constexpr int kThreads = 8;           // requests answered at once: those of one check and a few more
constexpr int64_t kMaxRequests = 64;  // running and waiting
constexpr std::chrono::seconds kExpiryCheck{5};

class Agent {
 public:
  explicit Agent(ProcessExaminer examine) : responder_(std::move(examine)) {}

  Status run(const AgentOptions& options, const std::function<void(int64_t port)>& on_ready) {
    api::HttpServerOptions limits;
    limits.max_body_bytes = 4UL << 20;
    limits.max_connections = 256;
    TANDEM_ASSIGN(server_, api::HttpServer::listen(io_, options.host, static_cast<uint16_t>(options.port), limits));
    server_->add_route({"POST", kAgentPath, false,
                        [this](std::shared_ptr<api::HttpExchange> exchange) { take(std::move(exchange)); }});
    server_->start();
    signals_.async_wait([this](const boost::system::error_code& error, int) {
      if (!error) io_.stop();
    });
    lifetime_.expires_after(std::chrono::milliseconds(static_cast<int64_t>(options.lifetime_s * 1000)));
    lifetime_.async_wait([this](const boost::system::error_code& error) {
      if (!error) io_.stop();
    });
    expire_later();
    on_ready(server_->port());
    io_.run();
    pool_.join();
    server_->close();
    return {};
  }

 private:
  void take(std::shared_ptr<api::HttpExchange> exchange) {
    if (num_requests_ >= kMaxRequests) {
      return respond(*exchange, make_error(ErrorKind::kResourceExhausted, "{} requests are running", num_requests_));
    }
    ++num_requests_;
    asio::post(pool_, [this, body = std::move(exchange->request().body), exchange]() mutable {
      const nlohmann::json request = nlohmann::json::parse(body, nullptr, /*allow_exceptions=*/false);
      Result<nlohmann::json> answer = responder_.answer(request);
      asio::post(io_, [this, exchange = std::move(exchange), answer = std::move(answer)] {
        --num_requests_;
        respond(*exchange, answer);
      });
    });
  }

  // Faults of the operation are answers too; the other side shows them.
  static void respond(api::HttpExchange& exchange, const Result<nlohmann::json>& answer) {
    const nlohmann::json body =
        answer.ok() ? nlohmann::json{{"answer", *answer}} : nlohmann::json{{"fault", answer.error().message}};
    api::HttpResponse response;
    response.body = body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    exchange.respond(std::move(response));
  }

  void expire_later() {
    expiry_.expires_after(kExpiryCheck);
    expiry_.async_wait([this](const boost::system::error_code& error) {
      if (error) return;
      asio::post(pool_, [this] { responder_.expire(); });
      expire_later();
    });
  }

  Responder responder_;
  asio::io_context io_{1};
  asio::signal_set signals_{io_, SIGINT, SIGTERM};
  asio::steady_timer lifetime_{io_};
  asio::steady_timer expiry_{io_};
  std::unique_ptr<api::HttpServer> server_;
  int64_t num_requests_ = 0;
  asio::thread_pool pool_{kThreads};  // first to go: its work posts to io_
};

}  // namespace

Status run_agent(const AgentOptions& options, ProcessExaminer examine,
                 const std::function<void(int64_t port)>& on_ready) {
  return Agent(std::move(examine)).run(options, on_ready);
}

}  // namespace tandem::check
