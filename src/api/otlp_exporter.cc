#include "src/api/otlp_exporter.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <mutex>
#include <nlohmann/json.hpp>
#include <utility>

#include "src/api/http_client.h"
#include "src/base/log.h"
#include "src/base/version.h"

namespace tandem::api {
namespace {

namespace asio = boost::asio;
using nlohmann::json;

constexpr std::chrono::milliseconds kFlushInterval{1'000};
constexpr std::chrono::milliseconds kTimeout{5'000};
constexpr size_t kMaxBatch = 512;
constexpr std::string_view kPath = "/v1/traces";
// Of opentelemetry-proto: Span.SpanKind, Status.StatusCode.
constexpr int kKindInternal = 1, kKindServer = 2, kKindClient = 3, kStatusError = 2;

template <size_t N>
std::string hex(const std::array<uint8_t, N>& bytes) {
  std::string out;
  for (const uint8_t byte : bytes) out += fmt::format("{:02x}", byte);
  return out;
}

json value_of(const SpanValue& value) {
  if (const int64_t* number = std::get_if<int64_t>(&value)) return {{"intValue", std::to_string(*number)}};
  if (const double* number = std::get_if<double>(&value)) return {{"doubleValue", *number}};
  return {{"stringValue", std::get<std::string>(value)}};
}

json span_to_json(const Span& span) {
  json out = {{"traceId", hex(span.context.trace_id)},
              {"spanId", hex(span.context.span_id)},
              {"name", span.name},
              {"kind", span.is_server   ? kKindServer
                       : span.is_client ? kKindClient
                                        : kKindInternal},
              {"startTimeUnixNano", std::to_string(span.start_us * 1000)},
              {"endTimeUnixNano", std::to_string(span.end_us * 1000)}};
  if (span.parent != std::array<uint8_t, 8>{}) out["parentSpanId"] = hex(span.parent);
  for (const auto& [key, value] : span.attributes) {
    out["attributes"].push_back({{"key", key}, {"value", value_of(value)}});
  }
  if (!span.error.empty()) out["status"] = {{"code", kStatusError}, {"message", span.error}};
  return out;
}

}  // namespace

std::string otlp_body(const std::vector<Span>& spans, const std::string& service_name) {
  json list = json::array();
  for (const Span& span : spans) list.push_back(span_to_json(span));
  const json resource = {{"attributes", {{{"key", "service.name"}, {"value", {{"stringValue", service_name}}}}}}};
  const json scope = {{"scope", {{"name", "tandem"}, {"version", kVersion}}}, {"spans", std::move(list)}};
  const json body = {{"resourceSpans", {{{"resource", resource}, {"scopeSpans", {scope}}}}}};
  return body.dump(-1, ' ', false, json::error_handler_t::replace);
}

struct OtlpExporter::Impl : std::enable_shared_from_this<OtlpExporter::Impl> {
  Impl(asio::io_context& context, HttpUrl endpoint, std::string name, Registry& metrics)
      : io(context),
        client(context, {}),
        timer(context),
        url(std::move(endpoint)),
        service_name(std::move(name)),
        sent(metrics.counter("tandem:otlp_spans_sent_total", "Spans that the collector took.")),
        dropped(metrics.counter("tandem:otlp_spans_dropped_total",
                                "Spans that the collector did not take or the queue could not hold.")) {}

  void wait() {
    timer.expires_after(kFlushInterval);
    timer.async_wait([self = weak_from_this()](const boost::system::error_code& error) {
      const std::shared_ptr<Impl> impl = self.lock();
      if (!error && impl) impl->flush();
    });
  }

  void flush() {
    std::vector<Span> batch;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      const size_t count = std::min(queue.size(), kMaxBatch);
      const auto end = queue.begin() + static_cast<std::ptrdiff_t>(count);
      batch.assign(std::make_move_iterator(queue.begin()), std::make_move_iterator(end));
      queue.erase(queue.begin(), end);
    }
    if (batch.empty()) return wait();
    ClientRequest request = json_request("", otlp_body(batch, service_name));
    request.total_timeout = kTimeout;
    client.start(url, std::move(request), {.on_done = [this, count = batch.size()](Result<ClientResponse> response) {
                   const bool taken = response.ok() && response->is_success();
                   (taken ? sent : dropped).add(count);
                   if (taken == is_failing) tell(taken, response);
                   is_failing = !taken;
                   wait();
                 }});
  }

  // Once when it begins to fail and once when it is over.
  void tell(bool taken, const Result<ClientResponse>& response) const {
    if (taken) return log_info("otlp", "{} takes spans again", url.origin());
    log_warning("otlp", "spans are dropped: {}",
                response.ok() ? fmt::format("{} answers with status {}", url.origin(), response->status)
                              : response.error().message);
  }

  asio::io_context& io;
  HttpClient client;
  asio::steady_timer timer;
  const HttpUrl url;
  const std::string service_name;
  Counter& sent;
  Counter& dropped;
  bool is_failing = false;
  std::mutex mutex;
  std::vector<Span> queue;
};

Result<std::unique_ptr<OtlpExporter>> OtlpExporter::create(asio::io_context& io, const std::string& endpoint,
                                                           std::string service_name, Registry& metrics) {
  TANDEM_ASSIGN(HttpUrl url, parse_http_url(endpoint));
  if (!url.path.ends_with(kPath)) {
    while (url.path.ends_with('/')) url.path.pop_back();
    url.path += kPath;
  }
  std::unique_ptr<OtlpExporter> exporter(
      new OtlpExporter(std::make_shared<Impl>(io, std::move(url), std::move(service_name), metrics)));
  exporter->impl_->wait();
  return exporter;
}

OtlpExporter::~OtlpExporter() { impl_->timer.cancel(); }

void OtlpExporter::add(Span span) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  if (impl_->queue.size() >= kMaxQueued) return impl_->dropped.add();
  impl_->queue.push_back(std::move(span));
}

}  // namespace tandem::api
