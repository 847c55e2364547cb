// What `tandem serve` and `tandem route` have in common.
#pragma once

#include <string>

#include "src/api/frontend.h"
#include "src/base/options.h"

namespace tandem::commands {

// Level and process name of the log, from --log-level and --log-name.
void start_log(const Options& options);

// The last part of a model's path.
std::string default_model_name(const std::string& path);

// Keys, time-out and version; policy and health are the caller's.
api::FrontendOptions frontend_options(const Options& options, const std::string& model_name);

}  // namespace tandem::commands
