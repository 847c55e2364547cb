#include "src/commands/client_common.h"

#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "src/api/api_error.h"
#include "src/api/http_client.h"

namespace tandem::commands {
namespace {

constexpr std::chrono::milliseconds kConnectTimeout{3'000};
constexpr std::chrono::milliseconds kAnswerTimeout{30'000};

}  // namespace

int fail_with(const Error& error) {
  std::fprintf(stderr, "%s\n", error.message.c_str());
  return 1;
}

Result<std::string> get_text(const api::HttpUrl& url, const std::string& target, const std::string& api_key) {
  api::ClientRequest request;
  request.target = target;
  request.connect_timeout = kConnectTimeout;
  request.idle_timeout = kAnswerTimeout;
  if (!api_key.empty()) request.headers.emplace_back("Authorization", "Bearer " + api_key);
  TANDEM_ASSIGN(api::ClientResponse response, api::fetch(url, std::move(request)));
  if (response.is_success()) return std::move(response.body);
  Error error = api::error_from_response(response.status, response.body);
  error.message = fmt::format("{}{}: {}", url.origin(), target, error.message);
  return error;
}

Result<std::string> resolve_model_name(const api::HttpUrl& url, const std::string& api_key, const std::string& name) {
  if (name != "auto") return name;
  TANDEM_ASSIGN(const std::string body, get_text(url, "/v1/models", api_key));
  const nlohmann::json list = nlohmann::json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (list.is_object() && list.contains("data") && list["data"].is_array() && !list["data"].empty()) {
    const nlohmann::json& first = list["data"].front();
    if (first.is_object() && first.contains("id") && first["id"].is_string()) return first["id"].get<std::string>();
  }
  return make_error(ErrorKind::kDataLoss, "{} lists no model at /v1/models; give --model", url.origin());
}

}  // namespace tandem::commands
