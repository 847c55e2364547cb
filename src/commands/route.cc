// tandem route: the OpenAI front end with remote workers behind it.
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "src/api/frontend.h"
#include "src/api/served_text.h"
#include "src/base/clock.h"
#include "src/base/log.h"
#include "src/base/metrics.h"
#include "src/base/version.h"
#include "src/commands/client_common.h"
#include "src/commands/commands.h"
#include "src/commands/server_common.h"
#include "src/commands/shutdown.h"
#include "src/router/admin.h"
#include "src/router/repeating_worker.h"
#include "src/router/routed_worker.h"

namespace tandem::commands {
namespace {

namespace asio = boost::asio;

constexpr std::chrono::milliseconds kTextRetry{250};    // between two rounds of asking workers for the tokenizer

int64_t microseconds(const Options& options, const char* name) {
  return static_cast<int64_t>(options.number(name) * 1e6);
}

router::PolicyKind policy_for(const Options& options, const char* name) {
  const std::string& own = options.text(name);
  return router::parse_policy(own == "policy" ? options.text("policy") : own).value();  // the table knows the choices
}

router::RouterOptions router_options(const Options& options) {
  router::RouterOptions out;
  out.prefill_urls = options.list("prefill");
  out.named_prefill_urls = options.list("allowed-prefillers");
  out.decode_urls = options.list("decode");
  router::CoreOptions& core = out.core;
  core.registry.prefill_policy = policy_for(options, "prefill-policy");
  core.registry.decode_policy = policy_for(options, "decode-policy");
  core.registry.breaker.failures_to_open = static_cast<int>(options.integer("cb-failure-threshold"));
  core.registry.breaker.open_us = microseconds(options, "cb-timeout-s");
  core.registry.seed = std::random_device{}();
  core.pull = options.text("transfer-mode") == "pull";
  core.repeats.retries = static_cast<int>(options.integer("max-retries"));
  core.repeats.migrations = static_cast<int>(options.integer("migration-limit"));
  core.retry_share = options.number("retry-budget");
  core.enforce_disagg = options.flag("enforce-disagg");
  core.local_prompt_tokens = options.integer("local-prompt-tokens");
  core.max_requests = options.integer("max-concurrent-requests");
  core.queue_size = options.integer("queue-size");
  core.queue_timeout_us = microseconds(options, "queue-timeout-s");
  core.rescue_us = microseconds(options, "rescue-timeout-s");
  core.request_timeout_us = microseconds(options, "request-timeout-s");
  core.unresponsive_us = microseconds(options, "unresponsive-timeout-s");
  out.probe_interval =
      std::chrono::milliseconds(static_cast<int64_t>(options.number("health-check-interval-s") * 1000));
  out.worker_api_key = options.text("worker-api-key");
  return out;
}

// The model's limits from a directory's config.json; workers may be started with smaller ones and then say so.
Result<api::ServedTextSource> load_text_source(const std::string& directory) {
  api::ServedTextSource source;
  TANDEM_ASSIGN(source.bundle, text::TextBundle::load(directory));
  const nlohmann::json config = nlohmann::json::parse(source.bundle.config_json, nullptr, /*allow_exceptions=*/false);
  for (auto [key, target] : {std::pair("max_position_embeddings", &source.facts.max_model_len),
                             std::pair("vocab_size", &source.facts.vocab_size)}) {
    if (!config.is_object() || !config.contains(key) || !config[key].is_number_integer()) {
      return make_error(ErrorKind::kDataLoss, "{}/config.json: '{}' is missing or not an integer", directory, key);
    }
    *target = config[key].get<int64_t>();
  }
  source.facts.names = {default_model_name(directory)};
  source.facts.root = directory;
  return source;
}

Result<api::ServedTextSource> fetch_text_source(const std::string& worker, const std::string& api_key) {
  TANDEM_ASSIGN(const api::HttpUrl url, api::parse_http_url(worker));
  TANDEM_ASSIGN(const std::string body, get_text(url, "/tandem/v1/text_bundle", api_key));
  return api::parse_served_text(body);
}

// Gets tokenizer and chat template from the first worker that is up, and compiles them, on a thread of its own: a large
// vocabulary takes seconds.
class TextLoader {
 public:
  // `opened` is called on this thread with the text, once, unless stopped before.
  TextLoader(const Options& options, std::function<void(Result<api::ServedText>)> opened)
      : options_(options), opened_(std::move(opened)), thread_([this] { run(); }) {}

  ~TextLoader() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

 private:
  void run() {
    if (const std::string& directory = options_.text("model"); !directory.empty()) {
      return finish(load_text_source(directory));
    }
    std::vector<std::string> workers = options_.list("decode");
    workers.insert(workers.end(), options_.list("prefill").begin(), options_.list("prefill").end());
    while (true) {
      for (const std::string& worker : workers) {
        Result<api::ServedTextSource> source = fetch_text_source(worker, options_.text("worker-api-key"));
        if (source.ok()) {
          log_info("route", "tokenizer and chat template from {}", worker);
          return finish(std::move(source));
        }
        // A worker that loads is expected at start; anything else is worth a line.
        const bool is_loading = source.error().kind == ErrorKind::kUnavailable;
        if (!is_loading) log_warning("route", "{}: {}", worker, source.error().message);
        if (is_stopping(std::chrono::milliseconds(0))) return;
      }
      if (is_stopping(kTextRetry)) return;
    }
  }

  bool is_stopping(std::chrono::milliseconds wait) {
    std::unique_lock<std::mutex> lock(mutex_);
    return wake_.wait_for(lock, wait, [this] { return stopping_; });
  }

  void finish(Result<api::ServedTextSource> source) {
    if (!source.ok()) return opened_(source.error());
    if (!options_.list("served-model-name").empty()) source->facts.names = options_.list("served-model-name");
    opened_(api::make_served_text(std::move(source->facts), std::move(source->bundle)));
  }

  const Options& options_;
  std::function<void(Result<api::ServedText>)> opened_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
  std::thread thread_;
};

api::FrontendOptions make_front(const Options& options, const router::RoutedWorker& router,
                                const std::shared_ptr<bool>& has_text) {
  const std::vector<std::string>& names = options.list("served-model-name");
  api::FrontendOptions out = frontend_options(options, names.empty() ? "" : names.front());
  out.policy.accepts_kv_transfer = out.policy.accepts_resumed = false;  // fields of the inside
  out.max_concurrent_requests = options.integer("max-concurrent-requests") + options.integer("queue-size");
  out.check_prefiller = [&router](const std::string& host_port) { return router.check_prefiller(host_port); };
  out.health = [&router, has_text]() -> api::Health {
    if (!*has_text) return {false, "loading", std::nullopt};
    if (!router.is_ready()) return {false, "no worker", std::nullopt};
    return {true, "ok", std::nullopt};
  };
  return out;
}

}  // namespace

int run_route(const Options& options) {
  start_log(options);
  log_info("route", "tandem {} {}", kVersion, options.changed_json());
  // A request that runs has a client and up to two workers, one that waits only a client.
  const int64_t max_running = options.integer("max-concurrent-requests");
  const int64_t max_waiting = options.integer("queue-size");
  raise_descriptors("route", 3 * max_running + max_waiting,
                    fmt::format("{} requests (--max-concurrent-requests) and {} that wait (--queue-size)", max_running,
                                max_waiting));
  asio::io_context io(1);
  Registry metrics;
  const SteadyClock clock;
  Result<std::unique_ptr<api::OtlpExporter>> exporter = open_exporter(options, "tandem-route", io, metrics);
  if (!exporter.ok()) return fail_with(exporter.error());
  router::RouterOptions routing = router_options(options);
  routing.spans = exporter->get();
  Result<std::unique_ptr<router::RoutedWorker>> router = router::RoutedWorker::create(io, std::move(routing), metrics);
  if (!router.ok()) return fail_with(router.error());

  std::unique_ptr<router::RepeatingWorker> repeating;
  if (const int64_t copies = options.integer("repeat-d-times"); copies > 0) {
    log_warning("route", "benchmark mode: each request is sent {} times more (--repeat-d-times), not for users", copies);
    repeating = std::make_unique<router::RepeatingWorker>(io, **router, copies, metrics);
  }

  const auto has_text = std::make_shared<bool>(false);
  api::FrontendOptions front = make_front(options, **router, has_text);
  front.spans = exporter->get();
  api::Frontend frontend(io, std::move(front), clock, metrics);
  Result<std::unique_ptr<api::HttpServer>> server = api::HttpServer::listen(
      io, options.text("host"), static_cast<uint16_t>(options.integer("port")), frontend.http_options());
  if (!server.ok()) return fail_with(server.error());
  frontend.add_routes(**server);
  if (const std::string& key = options.text("admin-api-key"); !key.empty()) {
    router::add_admin_routes(**server, **router, key);
  }
  (*server)->start();
  log_info("route", "listening on http://{}:{}, {} prefill and {} decode worker(s), policy {}", options.text("host"),
           (*server)->port(), options.list("prefill").size(), options.list("decode").size(), options.text("policy"));

  int exit_code = 0;
  {
    TextLoader loader(options, [&](Result<api::ServedText> text) {
      asio::post(io, [&, loaded = std::make_shared<Result<api::ServedText>>(std::move(text))] {
        if (!loaded->ok()) {
          exit_code = fail_with(loaded->error());
          return io.stop();
        }
        log_info("route", "serving {}", fmt::join((*loaded)->model.names, ", "));
        frontend.open(std::move(*loaded).value(), repeating ? static_cast<engine::Worker&>(*repeating) : **router);
        *has_text = true;
      });
    });
    const Shutdown shutdown(
        io, "route", options.number("shutdown-timeout"), drain_frontend([&] { return *has_text ? &frontend : nullptr; }),
        [&] {
          if (!*has_text) std::_Exit(0);  // the loader's thread cannot be interrupted, and nothing else is under way
          io.stop();
        });
    io.run();
  }
  frontend.close(make_error(ErrorKind::kUnavailable, "the router is stopping"));
  return exit_code;
}

}  // namespace tandem::commands
