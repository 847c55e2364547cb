#include "src/check/peer.h"

#include "src/api/http_client.h"
#include "src/check/agent.h"

namespace tandem::check {

Peer::Peer(std::string host, int64_t agent_port, Responder* own)
    : host_(std::move(host)), agent_port_(agent_port), own_(own) {}

Result<nlohmann::json> Peer::ask(const nlohmann::json& request, std::chrono::milliseconds limit) const {
  if (own_ != nullptr) return own_->answer(request);
  api::HttpUrl url;
  url.host = host_;
  url.port = static_cast<uint16_t>(agent_port_);
  api::ClientRequest post = api::json_request(kAgentPath, request.dump());
  post.connect_timeout = post.idle_timeout = post.total_timeout = limit;
  TANDEM_ASSIGN(const api::ClientResponse response, api::fetch(url, std::move(post)));
  const nlohmann::json body = nlohmann::json::parse(response.body, nullptr, /*allow_exceptions=*/false);
  if (!response.is_success() || !body.is_object() || !(body.contains("answer") || body.contains("fault"))) {
    return make_error(ErrorKind::kDataLoss, "{} is not an agent of a check (status {})", url.origin(), response.status);
  }
  if (body.contains("answer")) return body["answer"];
  return make_error(ErrorKind::kUnavailable, "{}", body["fault"].is_string() ? body["fault"].get<std::string>() : "?");
}

}  // namespace tandem::check
