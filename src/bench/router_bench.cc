#include "src/bench/router_bench.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "src/api/http_client.h"
#include "src/bench/mock_fleet.h"
#include "src/bench/pinned_process.h"
#include "src/bench/report.h"
#include "src/bench/stream_load.h"
#include "src/cluster/process.h"
#include "src/router/completion_wire.h"
#include "src/text/tokenizer.h"

namespace tandem::bench {
namespace {

constexpr size_t kNumPrompts = 64;
constexpr size_t kNumAnswers = 61;  // no divisor in common with kNumPrompts
constexpr int kNumRounds = 4;       // of direct and routed load by turns, so that a change of the machine hits both
constexpr double kWarmupSeconds = 2;
constexpr double kSlopeWarmupShare = 0.2;  // of the time that memory is watched: allocators fill their caches first
constexpr std::chrono::seconds kStartTime{60};
constexpr std::chrono::milliseconds kStartCheck{50};
constexpr int64_t kMaxOpenConnections = 512;
constexpr const char* kModelName = "bench";

std::string as_post(const std::string& body) {
  return fmt::format(
      "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {}"
      "\r\n\r\n{}",
      body.size(), body);
}

// Tokens that are a space and a word of small letters: in JSON and joined they look as they are.
std::vector<TokenId> find_word_tokens(const text::Tokenizer& tokenizer) {
  std::vector<TokenId> words;
  for (TokenId id = 0; id < tokenizer.vocab_size(); ++id) {
    const std::string_view bytes = tokenizer.token_bytes(id);
    const bool is_word = bytes.size() > 2 && bytes[0] == ' ' &&
                         bytes.find_first_not_of("abcdefghijklmnopqrstuvwxyz", 1) == std::string_view::npos;
    if (is_word && !tokenizer.is_special(id)) words.push_back(id);
  }
  return words;
}

struct Traffic {
  std::vector<std::vector<TokenId>> answers;
  std::vector<StreamRequest> routed;
  std::vector<StreamRequest> direct;
  double prompt_tokens = 0;  // mean
};

Result<Traffic> make_traffic(const RouterBenchOptions& options) {
  TANDEM_ASSIGN(const text::TextBundle bundle, text::TextBundle::load(options.model));
  TANDEM_ASSIGN(const text::Tokenizer tokenizer, text::Tokenizer::create(bundle));
  const std::vector<TokenId> words = find_word_tokens(tokenizer);
  if (words.empty()) return make_error(ErrorKind::kUnsupported, "{}: its tokenizer has no plain words", options.model);
  std::mt19937_64 random(options.seed);
  const auto draw = [&](int64_t count) {
    std::vector<TokenId> ids;
    for (int64_t i = 0; i < count; ++i) ids.push_back(words[random() % words.size()]);
    return ids;
  };
  const auto text_of = [&](const std::vector<TokenId>& ids) {
    std::string text;
    for (const TokenId id : ids) text += tokenizer.token_bytes(id);
    return text;
  };

  Traffic traffic;
  for (size_t i = 0; i < kNumAnswers; ++i) traffic.answers.push_back(draw(options.output_len));
  for (size_t i = 0; i < kNumPrompts; ++i) {
    const std::string prompt = text_of(draw(options.input_len));
    engine::TokenRequest request;
    TANDEM_ASSIGN(request.prompt, tokenizer.encode(prompt, /*add_special_tokens=*/true));
    request.sampling.max_tokens = options.output_len;
    request.sampling.temperature = 0;
    const std::string direct_body = router::decode_body(request, "");
    const std::vector<TokenId>& answer = traffic.answers[static_cast<size_t>(answer_of_body(direct_body, kNumAnswers))];
    const nlohmann::json body = {{"model", kModelName},
                                 {"prompt", prompt},
                                 {"max_tokens", options.output_len},
                                 {"temperature", 0},
                                 {"stream", true}};
    traffic.routed.push_back({as_post(body.dump()), text_of(answer)});
    StreamRequest& direct = traffic.direct.emplace_back(StreamRequest{as_post(direct_body), ""});
    for (const TokenId id : answer) direct.expected += std::to_string(id);
    traffic.prompt_tokens += static_cast<double>(request.prompt.size()) / kNumPrompts;
  }
  return traffic;
}

Result<uint16_t> find_free_port() {
  boost::asio::io_context io;
  boost::asio::ip::tcp::acceptor probe(io);
  boost::system::error_code ec;
  probe.open(boost::asio::ip::tcp::v4(), ec);
  if (!ec) probe.bind({boost::asio::ip::address_v4::loopback(), 0}, ec);
  if (ec) return make_error(ErrorKind::kUnavailable, "no port is free on loopback: {}", ec.message());
  return probe.local_endpoint(ec).port();
}

class RouterBench {
 public:
  explicit RouterBench(const RouterBenchOptions& options) : options_(options) {}

  Result<RouterBenchResult> run() {
    TANDEM_TRY(start());
    TANDEM_TRY(measure(routed(0), kWarmupSeconds, nullptr));
    TANDEM_TRY(measure_peak());
    TANDEM_TRY(measure_latency());
    if (options_.slope_seconds > 0) TANDEM_TRY(watch_memory());
    return result_;
  }

 private:
  Status start() {
    const std::vector<int> cpus = usable_cpus();
    if (cpus.size() < 2) {
      return make_error(ErrorKind::kUnsupported, "this process may use one core, but the router needs one by itself");
    }
    result_.router_cpu = cpus.back();
    result_.load_cpu = cpus.front();
    TANDEM_ASSIGN(traffic_, make_traffic(options_));
    result_.prompt_tokens = traffic_.prompt_tokens;
    const auto gap = std::chrono::microseconds(static_cast<int64_t>(options_.token_gap_ms * 1e3));
    TANDEM_ASSIGN(fleet_, MockFleet::listen(io_, {.num_prefill = options_.pairs ? options_.num_workers : 0,
                                                  .num_decode = options_.num_workers,
                                                  .answers = traffic_.answers,
                                                  .token_gap = gap}));
    TANDEM_ASSIGN(port_, find_free_port());
    TANDEM_ASSIGN(PinnedProcess router,
                  PinnedProcess::start(options_.program, route_arguments(), options_.log_path, result_.router_cpu));
    router_.emplace(std::move(router));
    pin_this_thread(result_.load_cpu);
    return wait_until_ready();
  }

  std::vector<std::string> route_arguments() const {
    std::vector<std::string> arguments = {"route",    "--model", options_.model,        "--served-model-name",
                                          kModelName, "--port",  std::to_string(port_), "--log-level",
                                          "warning"};
    const auto add = [&arguments](const char* option, const std::vector<uint16_t>& ports) {
      if (!ports.empty()) arguments.emplace_back(option);
      for (const uint16_t port : ports) arguments.push_back(fmt::format("http://127.0.0.1:{}", port));
    };
    add("--prefill", fleet_->prefill_ports());
    add("--decode", fleet_->decode_ports());
    return arguments;
  }

  Status wait_until_ready() {
    const api::HttpUrl url = api::parse_http_url(fmt::format("http://127.0.0.1:{}", port_)).value();
    const auto until = std::chrono::steady_clock::now() + kStartTime;
    while (router_->is_running() && std::chrono::steady_clock::now() < until) {
      api::ClientRequest request;
      request.target = "/health";
      const Result<api::ClientResponse> response = api::fetch(url, std::move(request));
      if (response.ok() && response->is_success()) return {};
      io_.restart();
      io_.run_for(kStartCheck);  // the mocks answer the router's probes
    }
    return make_error(ErrorKind::kUnavailable, "the router did not become ready:\n{}",
                      cluster::tail_of_file(options_.log_path, 20));
  }

  StreamLoadOptions routed(double rate) const {
    StreamLoadOptions load;
    load.port = port_;
    load.rate = rate;
    load.connections = rate > 0 ? kMaxOpenConnections : options_.concurrency;
    load.seed = options_.seed;
    return load;
  }

  Status measure(StreamLoadOptions load, double seconds, StreamLoadResult* out) {
    load.seconds = seconds;
    const bool is_direct = load.port != port_;
    StreamLoadResult result = run_stream_load(io_, is_direct ? traffic_.direct : traffic_.routed, load);
    if (result.failed > 0 || result.completed == 0) {
      return make_error(ErrorKind::kInternal, "{} of {} answers were wrong or missing: {}\n{}", result.failed,
                        result.failed + result.completed, result.first_fault,
                        cluster::tail_of_file(options_.log_path, 20));
    }
    if (out != nullptr) *out = std::move(result);
    return {};
  }

  Status measure_peak() {
    const double cpu_before = router_->cpu_seconds();
    StreamLoadResult load;
    TANDEM_TRY(measure(routed(0), options_.seconds, &load));
    const double cpu = router_->cpu_seconds() - cpu_before;
    const double completed = static_cast<double>(load.completed);
    result_.requests_per_s = completed / load.seconds;
    result_.router_busy = cpu / load.seconds;
    result_.cpu_us_per_request = cpu / completed * 1e6;
    result_.requests_per_core_s = completed / cpu;
    return {};
  }

  Status measure_latency() {
    std::vector<double> direct_first, direct_whole, routed_first, routed_whole;
    const auto add = [](const std::vector<double>& from, std::vector<double>& to) {
      to.insert(to.end(), from.begin(), from.end());
    };
    double cpu = 0;
    for (int round = 0; round < kNumRounds; ++round) {
      StreamLoadOptions load = routed(options_.rate);
      load.seed = options_.seed + static_cast<uint64_t>(round);  // the same arrivals for both
      StreamLoadResult result;
      const double cpu_before = router_->cpu_seconds();
      TANDEM_TRY(measure(load, options_.seconds / kNumRounds, &result));
      cpu += router_->cpu_seconds() - cpu_before;
      add(result.first_token_s, routed_first);
      add(result.whole_s, routed_whole);
      load.port = fleet_->decode_ports().front();
      load.key = "\"token_ids\":[";
      load.close = ']';
      TANDEM_TRY(measure(load, options_.seconds / kNumRounds, &result));
      add(result.first_token_s, direct_first);
      add(result.whole_s, direct_whole);
    }
    const auto summarize = [](const std::vector<double>& seconds) {
      const Distribution values = describe_values(seconds, {50, 99});
      return LatencyPair{values.percentiles.at(50) * 1e3, values.percentiles.at(99) * 1e3};
    };
    result_.rate = options_.rate;
    result_.cpu_us_per_request_at_rate = cpu / static_cast<double>(routed_whole.size()) * 1e6;
    result_.direct_first_token = summarize(direct_first);
    result_.direct_whole = summarize(direct_whole);
    result_.routed_first_token = summarize(routed_first);
    result_.routed_whole = summarize(routed_whole);
    return {};
  }

  Status watch_memory() {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<double> times, sizes;
    // A closed loop: more requests, and never more of them at once, so that what grows is not the number of connections.
    StreamLoadOptions load = routed(0);
    load.on_second = [&] {
      const double at = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      if (at < options_.slope_seconds * kSlopeWarmupShare) return;
      times.push_back(at);
      sizes.push_back(static_cast<double>(router_->resident_bytes()));
    };
    StreamLoadResult result;
    TANDEM_TRY(measure(load, options_.slope_seconds, &result));
    if (times.size() < 2) return {};
    result_.slope_seconds = times.back() - times.front();
    result_.slope_bytes_per_s = slope_of(times, sizes);
    result_.slope_bytes_per_request =
        result_.slope_bytes_per_s * result.seconds / static_cast<double>(result.completed);
    result_.resident_first_bytes = static_cast<int64_t>(sizes.front());
    result_.resident_last_bytes = static_cast<int64_t>(sizes.back());
    return {};
  }

  const RouterBenchOptions& options_;
  RouterBenchResult result_;
  Traffic traffic_;
  boost::asio::io_context io_{1};
  std::unique_ptr<MockFleet> fleet_;
  uint16_t port_ = 0;
  std::optional<PinnedProcess> router_;
};

}  // namespace

Result<RouterBenchResult> run_router_bench(const RouterBenchOptions& options) { return RouterBench(options).run(); }

std::string router_report_as_text(const RouterBenchOptions& options, const RouterBenchResult& r) {
  const double tokens = static_cast<double>(options.output_len);
  std::string out = fmt::format(
      "router on core {}, mocks and load on core {}; {} of {} {}; prompts of {:.0f} tokens, answers of {}{}\n",
      r.router_cpu, r.load_cpu, options.num_workers, options.pairs ? "pairs" : "decode workers",
      options.pairs ? "(prefill and decode, push)" : "(no prefill)", r.prompt_tokens, options.output_len,
      options.token_gap_ms > 0 ? fmt::format(", {} ms between tokens", options.token_gap_ms) : ", at once");
  out += fmt::format(
      "closed loop, {} connections: {:.0f} requests/s, {:.0f} tokens/s; the router's core is {:.0f} % busy\n"
      "  router: {:.1f} us of processor time a request, {:.2f} us a token; {:.0f} requests/s for a core of its own\n",
      options.concurrency, r.requests_per_s, r.requests_per_s * tokens, 100 * r.router_busy, r.cpu_us_per_request,
      r.cpu_us_per_request / tokens, r.requests_per_core_s);
  const auto line = [&out](const char* what, const LatencyPair& direct, const LatencyPair& routed) {
    out +=
        fmt::format("  {:<12} direct {:.3f} and {:.3f} ms, routed {:.3f} and {:.3f} ms, added {:.3f} and {:.3f} ms\n",
                    what, direct.p50_ms, direct.p99_ms, routed.p50_ms, routed.p99_ms, routed.p50_ms - direct.p50_ms,
                    routed.p99_ms - direct.p99_ms);
  };
  out += fmt::format("Poisson load, {:.0f} requests/s ({:.1f} us a request), p50 and p99:\n", r.rate,
                     r.cpu_us_per_request_at_rate);
  line("first token", r.direct_first_token, r.routed_first_token);
  line("whole answer", r.direct_whole, r.routed_whole);
  if (r.slope_seconds > 0) {
    out += fmt::format(
        "memory over {:.0f} s: {:.1f} to {:.1f} MiB resident, slope {:+.1f} KiB/s, {:+.2f} bytes a request\n",
        r.slope_seconds, static_cast<double>(r.resident_first_bytes) / (1 << 20),
        static_cast<double>(r.resident_last_bytes) / (1 << 20), r.slope_bytes_per_s / 1024, r.slope_bytes_per_request);
  }
  return out;
}

std::string router_report_as_json(const RouterBenchOptions& options, const RouterBenchResult& r) {
  const auto pair = [](const LatencyPair& p) { return nlohmann::json{{"p50_ms", p.p50_ms}, {"p99_ms", p.p99_ms}}; };
  nlohmann::json json{{"pairs", options.pairs},
                      {"output_len", options.output_len},
                      {"token_gap_ms", options.token_gap_ms},
                      {"requests_per_second", r.requests_per_s},
                      {"router_busy", r.router_busy},
                      {"router_cpu_us_per_request", r.cpu_us_per_request},
                      {"requests_per_router_core_second", r.requests_per_core_s},
                      {"request_rate", r.rate},
                      {"router_cpu_us_per_request_at_rate", r.cpu_us_per_request_at_rate},
                      {"direct_first_token", pair(r.direct_first_token)},
                      {"routed_first_token", pair(r.routed_first_token)},
                      {"direct_whole", pair(r.direct_whole)},
                      {"routed_whole", pair(r.routed_whole)}};
  if (r.slope_seconds > 0) {
    json.update({{"slope_seconds", r.slope_seconds},
                 {"slope_bytes_per_second", r.slope_bytes_per_s},
                 {"slope_bytes_per_request", r.slope_bytes_per_request},
                 {"resident_first_bytes", r.resident_first_bytes},
                 {"resident_last_bytes", r.resident_last_bytes}});
  }
  return json.dump(2);
}

}  // namespace tandem::bench
