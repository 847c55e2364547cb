#include <gtest/gtest.h>
#include <unistd.h>

#include <boost/asio/steady_timer.hpp>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "src/api/http_server.h"
#include "src/api/test_support.h"
#include "src/bench/load_generator.h"

namespace tandem::bench {
namespace {

using std::chrono::milliseconds;

DatasetOptions dataset(int64_t count) {
  return {.num_prompts = count, .input_len = 20, .output_len = 5, .vocab_size = 100, .seed = 7};
}

TEST(Dataset, RandomPromptsAreReproducibleAndInRange) {
  DatasetOptions options = dataset(50);
  options.range_ratio = 0.5;
  options.prefix_len = 4;
  const std::vector<PromptRequest> prompts = make_random_prompts(options);
  std::set<int64_t> lengths;
  for (const PromptRequest& request : prompts) {
    const auto& ids = std::get<std::vector<TokenId>>(request.prompt);
    EXPECT_EQ(std::ssize(ids), request.input_len);
    EXPECT_GE(request.input_len, 14);
    EXPECT_LE(request.input_len, 34);
    EXPECT_TRUE(std::all_of(ids.begin(), ids.end(), [](TokenId id) { return id >= 0 && id < 100; }));
    const auto& first = std::get<std::vector<TokenId>>(prompts[0].prompt);
    EXPECT_TRUE(std::equal(ids.begin(), ids.begin() + 4, first.begin()));
    lengths.insert(request.input_len);
  }
  EXPECT_GT(lengths.size(), 5u);
  EXPECT_EQ(make_random_prompts(options)[49].prompt, prompts[49].prompt);
  options.seed = 8;
  EXPECT_NE(make_random_prompts(options)[49].prompt, prompts[49].prompt);
}

TEST(Dataset, TextPromptsHaveTheirWords) {
  for (const PromptRequest& request : make_text_prompts(dataset(5))) {
    const std::string& text = std::get<std::string>(request.prompt);
    EXPECT_EQ(std::count(text.begin(), text.end(), ' '), 19);
    EXPECT_EQ(request.max_tokens, 5);
  }
}

TEST(Dataset, CustomFileIsCheckedLineByLine) {
  const std::string path = fmt::format("{}/prompts-{}.jsonl", testing::TempDir(), getpid());
  std::ofstream(path) << "{\"prompt\":\"one two\",\"output_len\":9}\n\n{\"prompt\":[1,2,3]}\n";
  const Result<std::vector<PromptRequest>> prompts = load_custom_prompts(path, dataset(3));
  ASSERT_TRUE(prompts.ok()) << prompts.error().message;
  EXPECT_EQ(prompts->at(0).max_tokens, 9);
  EXPECT_EQ(prompts->at(1).input_len, 3);
  EXPECT_EQ(prompts->at(2).prompt, prompts->at(0).prompt);
  std::ofstream(path) << "{\"prompt\":\"a\"}\n{\"prompt\":5}\n";
  EXPECT_EQ(load_custom_prompts(path, dataset(3)).error().message,
            path + ":2: 'prompt' must be a text or a list of token ids");
  EXPECT_FALSE(load_custom_prompts("/nonexistent", dataset(3)).ok());
}

TEST(Arrivals, ArePoissonOrAllAtOnce) {
  EXPECT_EQ(make_arrivals(3, std::numeric_limits<double>::infinity(), 1), (std::vector<double>{0, 0, 0}));
  const std::vector<double> arrivals = make_arrivals(4000, 50, 1);
  EXPECT_EQ(arrivals[0], 0);
  EXPECT_TRUE(std::is_sorted(arrivals.begin(), arrivals.end()));
  EXPECT_NEAR(arrivals.back(), 80, 8);  // 4,000 gaps of 20 ms; six standard deviations
}

TEST(Report, PercentilesInterpolateAsNumpyDoes) {
  // numpy.percentile([1, 2, 3, 4, 10], [50, 90, 99]), mean and std.
  const Distribution values = describe_values({10, 1, 3, 2, 4}, {50, 90, 99});
  EXPECT_DOUBLE_EQ(values.mean, 4);
  EXPECT_DOUBLE_EQ(values.median, 3);
  EXPECT_NEAR(values.std, 3.1622776601683795, 1e-12);
  EXPECT_NEAR(values.percentiles.at(90), 7.6, 1e-12);
  EXPECT_NEAR(values.percentiles.at(99), 9.76, 1e-12);
  EXPECT_EQ(describe_values({}, {99}).percentiles.at(99), 0);
}

TEST(Report, CountsWhatHappened) {
  RequestRecord good{.success = true,
                     .error = "",
                     .input_len = 10,
                     .output_len = 3,
                     .start = 0.5,
                     .ttft = 0.15,
                     .latency = 0.5,
                     .itls = {0.2, 0.2}};
  RequestRecord other = good;
  other.start = 0.9;
  RequestRecord bad{
      .success = false, .error = "status 503: no", .input_len = 10, .start = 1.1, .latency = 0.1, .itls = {}};
  const ReportOptions options = parse_report_options("ttft,tpot,itl,e2el", "50,99").value();
  const Report report = make_report({good, other, bad}, 2.0, options);
  EXPECT_EQ(report.completed, 2);
  EXPECT_EQ(report.failed, 1);
  EXPECT_EQ(report.total_input_tokens, 20);
  EXPECT_EQ(report.total_output_tokens, 6);
  EXPECT_DOUBLE_EQ(report.request_throughput, 1);
  EXPECT_DOUBLE_EQ(report.output_throughput, 3);
  EXPECT_DOUBLE_EQ(report.total_token_throughput, 13);
  EXPECT_EQ(report.max_concurrent_requests, 2);
  EXPECT_DOUBLE_EQ(report.max_output_tokens_per_s, 4);  // 0.65, 0.85 | 1.05, 1.05, 1.25, 1.45
  EXPECT_NEAR(report.latencies_ms.at("tpot").mean, 175, 1e-9);
  EXPECT_NEAR(report.latencies_ms.at("e2el").median, 500, 1e-9);
  EXPECT_EQ(report.errors.at("status 503: no"), 1);
  const nlohmann::json json =
      nlohmann::json::parse(report_as_json(report, {good, other, bad}, {{"label", "\"x\""}}, true));
  for (const char* key : {"label", "duration", "completed", "total_input_tokens", "request_throughput",
                          "output_throughput", "total_token_throughput", "mean_ttft_ms", "median_tpot_ms", "std_itl_ms",
                          "p99_e2el_ms", "p50_ttft_ms", "itls", "errors"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_EQ(json["output_lens"], nlohmann::json({3, 3, 0}));
  EXPECT_NE(report_as_text(report, options).find("status 503"), std::string::npos);
}

TEST(Report, RefusesUnknownMetricsAndPercentiles) {
  EXPECT_FALSE(parse_report_options("ttft,speed", "50").ok());
  EXPECT_FALSE(parse_report_options("ttft", "50,x").ok());
  EXPECT_FALSE(parse_report_options("ttft", "101").ok());
}

// A server that streams a token every few milliseconds and fails every fifth request.
class LoadTest : public testing::Test {
 protected:
  LoadTest() {
    loop.run([this] {
      server = api::HttpServer::listen(loop.io, "127.0.0.1", 0, {}).value();
      for (const char* path : {"/v1/completions", "/v1/chat/completions"}) {
        server->add_route(
            {"POST", path, false, [this](std::shared_ptr<api::HttpExchange> exchange) { answer(exchange); }});
      }
      server->start();
    });
    options.url = api::parse_http_url(fmt::format("http://127.0.0.1:{}", server->port())).value();
    options.model = "m";
    options.request_rate = std::numeric_limits<double>::infinity();
  }
  ~LoadTest() override {
    loop.run([this] { server.reset(); });
    loop.stop();
  }

  void answer(std::shared_ptr<api::HttpExchange> exchange) {
    bodies.push_back(nlohmann::json::parse(exchange->request().body));
    const bool chat = bodies.back().contains("messages");
    if (++count % 5 == 0) return exchange->respond(api::error_response(make_error(ErrorKind::kUnavailable, "full")));
    most_open = std::max(most_open, ++open);
    exchange->start_stream({200, {}, "text/event-stream", ""});
    if (chat) exchange->write("data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n");
    send(exchange, chat, bodies.back()["max_tokens"].get<int>());
  }

  void send(std::shared_ptr<api::HttpExchange> exchange, bool chat, int left) {
    const auto timer = std::make_shared<boost::asio::steady_timer>(loop.io, milliseconds(5));
    timer->async_wait([this, exchange, chat, left, timer](const boost::system::error_code&) {
      nlohmann::json choice = {{"finish_reason", left == 1 ? nlohmann::json("length") : nlohmann::json()}};
      chat ? choice["delta"]["content"] = "x" : choice["text"] = "x";
      exchange->write("data: " + nlohmann::json{{"choices", {choice}}}.dump() + "\n\n");
      if (left > 1) return send(exchange, chat, left - 1);
      exchange->write(
          "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":20,\"completion_tokens\":5}}\n\ndata: [DONE]\n\n");
      exchange->finish();
      --open;
    });
  }

  api::LoopThread loop;
  std::unique_ptr<api::HttpServer> server;
  LoadOptions options{};
  std::vector<nlohmann::json> bodies;
  int count = 0, open = 0, most_open = 0;
};

TEST_F(LoadTest, MeasuresEveryRequestAndCountsFailures) {
  options.ignore_eos = true;
  int64_t last_progress = 0;
  options.on_progress = [&](int64_t ended, int64_t) { last_progress = ended; };
  const LoadResult result = run_load(make_random_prompts(dataset(20)), options);
  const Report report =
      make_report(result.records, result.duration, parse_report_options("ttft,tpot,itl,e2el", "99").value());
  EXPECT_EQ(report.completed, 16);
  EXPECT_EQ(report.failed, 4);
  EXPECT_EQ(report.errors.begin()->first, "status 503: full");
  EXPECT_EQ(report.total_output_tokens, 16 * 5);
  EXPECT_EQ(report.total_input_tokens, 16 * 20);
  EXPECT_EQ(last_progress, 20);
  for (const RequestRecord& record : result.records) {
    if (!record.success) continue;
    EXPECT_EQ(record.itls.size(), 4u);
    EXPECT_GE(record.ttft, 0.005);
    EXPECT_GE(record.latency, 0.025);
  }
  const nlohmann::json body = loop.run([this] { return bodies.at(0); });
  EXPECT_TRUE(body["prompt"].is_array());
  EXPECT_EQ(body["ignore_eos"], true);
}

TEST_F(LoadTest, BoundsConcurrencyAndKeepsToTheRate) {
  options.max_concurrency = 3;
  run_load(make_random_prompts(dataset(12)), options);
  EXPECT_LE(loop.run([this] { return most_open; }), 3);
  options.max_concurrency = 0;
  options.request_rate = 100;
  options.chat = true;
  const LoadResult result = run_load(make_text_prompts(dataset(12)), options);
  const std::vector<double> arrivals = make_arrivals(12, 100, options.seed);
  for (size_t i = 0; i < arrivals.size(); ++i) {
    EXPECT_GE(result.records[i].start, arrivals[i]);
    EXPECT_LE(result.records[i].start, arrivals[i] + 0.2);
  }
  EXPECT_EQ(loop.run([this] { return bodies.back()["messages"][0]["role"]; }), "user");
  EXPECT_EQ(make_report(result.records, 1, parse_report_options("itl", "99").value()).completed, 10);
}

TEST_F(LoadTest, AnUnreachableServerIsAFailureOfEachRequest) {
  options.url = api::parse_http_url("http://127.0.0.1:1").value();
  const LoadResult result = run_load(make_random_prompts(dataset(3)), options);
  for (const RequestRecord& record : result.records) EXPECT_FALSE(record.success);
  EXPECT_NE(result.records[0].error.find("127.0.0.1:1"), std::string::npos);
}

}  // namespace
}  // namespace tandem::bench
