#include "src/commands/server_common.h"

#include <filesystem>

#include "src/base/descriptor_limit.h"
#include "src/base/log.h"
#include "src/base/version.h"

namespace tandem::commands {

void start_log(const Options& options) {
  const std::string& level = options.text("log-level");
  init_log(level == "debug"     ? LogLevel::kDebug
           : level == "warning" ? LogLevel::kWarning
           : level == "error"   ? LogLevel::kError
                                : LogLevel::kInfo,
           options.text("log-name"));
}

void raise_descriptors(const char* log_tag, int64_t needed, const std::string& reason) {
  // Listeners, event queues, files of the model, transfers with other workers, clients of /metrics.
  constexpr int64_t kOtherDescriptors = 256;
  const int64_t limit = raise_descriptor_limit();
  const std::string shortage = describe_descriptor_shortage(limit, needed + kOtherDescriptors, reason);
  if (!shortage.empty()) log_warning(log_tag, "{}", shortage);
}

std::string default_model_name(const std::string& path) {
  std::filesystem::path folder = std::filesystem::path(path).lexically_normal();
  if (folder.filename().empty()) folder = folder.parent_path();
  if (folder.filename() == "config.json") folder = folder.parent_path();
  const std::string name = folder.filename().string();
  return name.empty() || name == "." ? "model" : name;
}

api::FrontendOptions frontend_options(const Options& options, const std::string& model_name) {
  api::FrontendOptions front;
  front.model_name = model_name;
  front.api_keys = options.list("api-key");
  front.request_timeout_s = options.number("request-timeout-s");
  front.version = kVersion;
  return front;
}

Result<std::unique_ptr<api::OtlpExporter>> open_exporter(const Options& options, const std::string& service_name,
                                                         boost::asio::io_context& io, Registry& metrics) {
  const std::string& endpoint = options.text("otlp-endpoint");
  if (endpoint.empty()) return std::unique_ptr<api::OtlpExporter>();
  const std::string& name = options.text("log-name");
  return api::OtlpExporter::create(io, endpoint, name.empty() ? service_name : name, metrics);
}

}  // namespace tandem::commands
