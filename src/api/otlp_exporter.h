// Sends spans to an OpenTelemetry collector: OTLP over HTTP in JSON, in batches, without ever holding up a request.
// What the collector does not take, or the queue cannot hold, is dropped and counted.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "src/base/metrics.h"
#include "src/base/result.h"
#include "src/base/trace.h"

namespace boost::asio {
class io_context;
}

namespace tandem::api {

// The body of a request to /v1/traces (opentelemetry-proto, JSON mapping).
std::string otlp_body(const std::vector<Span>& spans, const std::string& service_name);

class OtlpExporter final : public SpanSink {
 public:
  static constexpr size_t kMaxQueued = 4096;

  // `endpoint` is the collector's URL; /v1/traces is added unless the path ends in it. Everything but add() happens on
  // the thread of `io`, which must outlive this, as must `metrics`.
  static Result<std::unique_ptr<OtlpExporter>> create(boost::asio::io_context& io, const std::string& endpoint,
                                                      std::string service_name, Registry& metrics);
  ~OtlpExporter() override;

  void add(Span span) override;

 private:
  struct Impl;
  explicit OtlpExporter(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<Impl> impl_;
};

}  // namespace tandem::api
