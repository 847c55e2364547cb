// What the subcommands that talk to a server have in common.
#pragma once

#include <string>

#include "src/api/http_types.h"
#include "src/base/result.h"

namespace tandem::commands {

// Prints one line to stderr; returns the exit code of a fault.
int fail_with(const Error& error);

// GET of a JSON document from a server, with a key if not empty. Any status but 2xx is an error.
Result<std::string> get_text(const api::HttpUrl& url, const std::string& target, const std::string& api_key);

// `name` itself unless it is "auto": then the first model that the server lists.
Result<std::string> resolve_model_name(const api::HttpUrl& url, const std::string& api_key, const std::string& name);

}  // namespace tandem::commands
