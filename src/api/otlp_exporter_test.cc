#include "src/api/otlp_exporter.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "src/api/http_server.h"
#include "src/api/test_support.h"

namespace tandem::api {
namespace {

Span make_span(const std::string& name) {
  Span span;
  span.name = name;
  span.context = *parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
  span.start_us = 1'700'000'000'000'001;
  span.end_us = 1'700'000'000'000'003;
  span.attributes = {{"tokens", int64_t{7}}, {"seconds", 0.5}, {"model", std::string("demo")}};
  return span;
}

TEST(OtlpBody, IsTheJsonOfTheProtocol) {
  Span span = make_span("decode");
  span.is_client = true;
  span.parent = {1, 2, 3, 4, 5, 6, 7, 8};
  span.error = "it broke";
  const nlohmann::json body = nlohmann::json::parse(otlp_body({span}, "tandem-test"));
  const nlohmann::json& resource = body["resourceSpans"][0];
  EXPECT_EQ(resource["resource"]["attributes"][0]["value"]["stringValue"], "tandem-test");
  const nlohmann::json expected = nlohmann::json::parse(R"({
    "traceId":"0af7651916cd43dd8448eb211c80319c","spanId":"b7ad6b7169203331","parentSpanId":"0102030405060708",
    "name":"decode","kind":3,
    "startTimeUnixNano":"1700000000000001000","endTimeUnixNano":"1700000000000003000",
    "attributes":[{"key":"tokens","value":{"intValue":"7"}},{"key":"seconds","value":{"doubleValue":0.5}},
                  {"key":"model","value":{"stringValue":"demo"}}],
    "status":{"code":2,"message":"it broke"}})");
  EXPECT_EQ(resource["scopeSpans"][0]["spans"][0], expected);
}

TEST(OtlpExporter, SendsBatchesAndCountsWhatIsLost) {
  LoopThread loop;
  Registry metrics;
  std::vector<std::string> bodies;
  int status = 200;
  std::unique_ptr<HttpServer> server;
  std::unique_ptr<OtlpExporter> exporter;
  loop.run([&] {
    server = HttpServer::listen(loop.io, "127.0.0.1", 0, {}).value();
    server->add_route({"POST", "/prefix/v1/traces", false, [&](std::shared_ptr<HttpExchange> exchange) {
                         bodies.push_back(exchange->request().body);
                         exchange->respond({status, {}, "application/json", "{}"});
                       }});
    server->start();
    exporter = OtlpExporter::create(loop.io, "http://127.0.0.1:" + std::to_string(server->port()) + "/prefix/",
                                    "tandem-test", metrics)
                   .value();
  });
  for (int i = 0; i < 3; ++i) exporter->add(make_span("a"));
  EXPECT_TRUE(
      eventually([&] { return loop.run([&] { return bodies.size() == 1; }); }, std::chrono::milliseconds(5'000)));
  EXPECT_NE(metrics.expose().find("tandem:otlp_spans_dropped_total 0"), std::string::npos);
  loop.run([&] { status = 503; });
  exporter->add(make_span("b"));
  EXPECT_TRUE(
      eventually([&] { return metrics.expose().find("tandem:otlp_spans_dropped_total 1") != std::string::npos; },
                 std::chrono::milliseconds(5'000)));
  EXPECT_NE(metrics.expose().find("tandem:otlp_spans_sent_total 3"), std::string::npos);
  loop.run([&] { exporter.reset(); });
  loop.stop();
}

TEST(OtlpExporter, RefusesWhatIsNoUrl) {
  boost::asio::io_context io;
  Registry metrics;
  EXPECT_FALSE(OtlpExporter::create(io, "collector:4318 ", "tandem-test", metrics).ok());
}

}  // namespace
}  // namespace tandem::api
