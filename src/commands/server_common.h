// What `tandem serve` and `tandem route` have in common.
#pragma once

#include <memory>
#include <string>

#include "src/api/frontend.h"
#include "src/api/otlp_exporter.h"
#include "src/base/options.h"

namespace tandem::commands {

// Level and process name of the log, from --log-level and --log-name.
void start_log(const Options& options);

// Raises the limit of open files and sockets as far as it goes, and warns if less than `needed` come of it; `reason` is
// what needs them.
void raise_descriptors(const char* log_tag, int64_t needed, const std::string& reason);

// The last part of a model's path.
std::string default_model_name(const std::string& path);

// Keys, time-out and version; policy and health are the caller's.
api::FrontendOptions frontend_options(const Options& options, const std::string& model_name);

// Of --otlp-endpoint; null without it. The service is named by --log-name, or else by `service_name`.
Result<std::unique_ptr<api::OtlpExporter>> open_exporter(const Options& options, const std::string& service_name,
                                                         boost::asio::io_context& io, Registry& metrics);

}  // namespace tandem::commands
