#include "src/router/admin.h"

#include <charconv>
#include <nlohmann/json.hpp>

#include "src/api/api_error.h"
#include "src/api/api_keys.h"
#include "src/api/request_fields.h"
#include "src/api/strict_json.h"
#include "src/base/log.h"

namespace tandem::router {
namespace {

using api::HttpExchange;
using api::HttpResponse;
using nlohmann::json;
using ExchangePtr = std::shared_ptr<HttpExchange>;

constexpr std::string_view kPrefix = "/workers/";
constexpr size_t kMaxUrlBytes = 2048;

const char* state_name(Membership membership) {
  switch (membership) {
    case Membership::kServing:
      return "serving";
    case Membership::kDraining:
      return "draining";
    case Membership::kRemoved:
      return "removed";
  }
  return "?";
}

json describe(const RegisteredWorker& worker) {
  const Health health = worker.tracker.health();
  return {{"id", worker.id.value},
          {"url", worker.url},
          {"role", role_name(worker.role)},
          {"weight", worker.weight},
          {"only_named", worker.only_named},
          {"state", state_name(worker.membership)},
          {"health", health == Health::kUp     ? "up"
                     : health == Health::kDown ? "down"
                                               : "unknown"},
          {"breaker", worker.breaker.is_closed() ? "closed" : "open"},
          {"requests", worker.load->requests},
          {"tokens", worker.load->tokens}};
}

HttpResponse respond(int status, const json& body) { return {status, {}, "application/json", body.dump()}; }

Result<WorkerId> add(RoutedWorker& router, const std::string& body) {
  TANDEM_ASSIGN(const api::Json parsed, api::parse_strict_json(body, "the request body"));
  if (!parsed.is_object()) return invalid_argument("", "the request body must be an object with url and role");
  api::RequestFields fields(parsed);
  const std::string* url = fields.text("url", kMaxUrlBytes);
  const std::string* role = fields.text("role", kMaxUrlBytes);
  const int64_t weight = fields.integer("weight", 1, 1000).value_or(1);
  if (fields.failed()) return fields.error();
  if (url == nullptr) return invalid_argument("url", "'url' is missing, as in http://10.0.0.1:8200");
  if (role == nullptr || (*role != "prefill" && *role != "decode")) {
    return invalid_argument("role", "'role' must be prefill or decode");
  }
  return router.add_worker(*role == "prefill" ? Role::kPrefill : Role::kDecode, fmt::format("{}#{}", *url, weight));
}

Result<WorkerId> remove(RoutedWorker& router, std::string_view path) {
  const std::string_view text = path.substr(kPrefix.size());
  WorkerId id(-1);
  const std::from_chars_result parsed = std::from_chars(text.data(), text.data() + text.size(), id.value);
  if (parsed.ec != std::errc() || parsed.ptr != text.data() + text.size()) {
    return invalid_argument("id", "'{}' is not the id of a worker; GET /workers lists them", text.substr(0, 64));
  }
  TANDEM_TRY(router.remove_worker(id));
  return id;
}

}  // namespace

void add_admin_routes(api::HttpServer& server, RoutedWorker& router, const std::string& key) {
  const auto keys = std::make_shared<api::ApiKeys>(std::vector<std::string>{key});
  const auto add_route = [&](const char* method, const char* path, auto handler) {
    server.add_route({method, path, false, [keys, handler](ExchangePtr exchange) {
                        const Status allowed = keys->check(exchange->request());
                        exchange->respond(allowed.ok() ? handler(exchange->request())
                                                       : api::error_response(allowed.error()));
                      }});
  };
  const auto answer = [&router](int status, const Result<WorkerId>& id) {
    if (!id.ok()) return api::error_response(id.error());
    const RegisteredWorker& worker = router.workers().worker(*id);
    log_info("router", "{} worker {} is {} now", role_name(worker.role), worker.url, state_name(worker.membership));
    return respond(status, describe(worker));
  };
  add_route("GET", "/workers", [&router](const api::HttpRequest&) {
    json list = json::array();
    for (const RegisteredWorker& worker : router.workers().workers()) list.push_back(describe(worker));
    return respond(200, {{"workers", std::move(list)}});
  });
  add_route("POST", "/workers",
            [&router, answer](const api::HttpRequest& request) { return answer(201, add(router, request.body)); });
  add_route("DELETE", "/workers/*",
            [&router, answer](const api::HttpRequest& request) { return answer(202, remove(router, request.path)); });
}

}  // namespace tandem::router
