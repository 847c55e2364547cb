#include "src/check/responder.h"

#include <chrono>

#include "src/base/version.h"
#include "src/group/node.h"

namespace tandem::check {
namespace {

constexpr int64_t kMostConnectMs = 10'000;

int64_t unix_time_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

Error too_many(const char* what, int64_t count, int64_t limit) {
  return make_error(ErrorKind::kTooLarge, "{} {} are more than {}", count, what, limit);
}

Result<std::vector<HostPort>> read_places(const nlohmann::json& request) {
  std::vector<HostPort> places = request.at("places").get<std::vector<HostPort>>();
  if (std::ssize(places) > kMaxPorts) return too_many("ports", std::ssize(places), kMaxPorts);
  for (const HostPort& place : places) {
    if (place.port < 0 || place.port > 65535) {
      return invalid_argument("port", "port {} is not in 0 … 65535", place.port);
    }
  }
  return places;
}

Result<std::string> read_token(const nlohmann::json& request) {
  std::string token = request.at("session").get<std::string>();
  if (token.empty() || token.size() > kMaxTokenBytes) {
    return invalid_argument("session", "a session's name has 1 … {} bytes", kMaxTokenBytes);
  }
  return token;
}

Result<nlohmann::json> connect(const nlohmann::json& request) {
  TANDEM_ASSIGN(const std::vector<HostPort> places, read_places(request));
  TANDEM_ASSIGN(const std::string token, read_token(request));
  const int64_t timeout_ms = std::clamp<int64_t>(request.at("timeout_ms").get<int64_t>(), 1, kMostConnectMs);
  return nlohmann::json{{"outcomes", connect_all(places, token, std::chrono::milliseconds(timeout_ms))}};
}

Result<nlohmann::json> measure(const nlohmann::json& request) {
  TANDEM_ASSIGN(const TransportReading reading,
                measure_transport(request.at("own_host").get<std::string>(), request.at("host").get<std::string>(),
                                  request.at("port").get<int64_t>()));
  return nlohmann::json(reading);
}

}  // namespace

Responder::Responder(ProcessExaminer examine) : examine_(std::move(examine)) {}
Responder::~Responder() = default;

Result<nlohmann::json> Responder::answer(const nlohmann::json& request) {
  try {
    return dispatch(request);
  } catch (const nlohmann::json::exception& fault) {
    return invalid_argument("", "not a request of a check: {}", fault.what());
  }
}

Result<nlohmann::json> Responder::dispatch(const nlohmann::json& request) {
  const std::string op = request.at("op").get<std::string>();
  if (op == "hello") return hello();
  if (op == "facts") return facts(request);
  if (op == "connect") return connect(request);
  if (op == "measure") return measure(request);
  if (op != "listen" && op != "echo" && op != "end") return invalid_argument("op", "unknown operation '{}'", op);
  TANDEM_ASSIGN(const std::string token, read_token(request));
  const std::lock_guard<std::mutex> lock(mutex_);
  TANDEM_TRY(enter_session(token));
  if (op == "listen") return listen(request);
  if (op == "echo") return echo(request);
  listeners_.clear();
  echoes_.clear();
  session_.clear();
  return nlohmann::json::object();
}

nlohmann::json Responder::hello() const {
  return {{"protocol", kProtocol}, {"version", kVersion}, {"node", group::this_node()}, {"time_us", unix_time_us()}};
}

Result<nlohmann::json> Responder::facts(const nlohmann::json& request) const {
  const nlohmann::json& processes = request.at("processes");
  if (std::ssize(processes) > kMaxProcesses) return too_many("processes", std::ssize(processes), kMaxProcesses);
  nlohmann::json list = nlohmann::json::array();
  for (const nlohmann::json& process : processes) {
    list.push_back(
        examine_(process.at("arguments").get<std::vector<std::string>>(), process.at("num_ranks").get<int64_t>()));
  }
  return nlohmann::json{{"host", read_host_facts()}, {"processes", std::move(list)}};
}

Result<nlohmann::json> Responder::listen(const nlohmann::json& request) {
  TANDEM_ASSIGN(const std::vector<HostPort> places, read_places(request));
  // One host that the file calls by two names gets two of them.
  if (listeners_.size() >= kMaxEchoes) return too_many("sets of ports", std::ssize(listeners_) + 1, kMaxEchoes);
  listeners_.push_back(std::make_unique<Listeners>(places, session_));
  return nlohmann::json{{"outcomes", listeners_.back()->outcomes()}};
}

Result<nlohmann::json> Responder::echo(const nlohmann::json& request) {
  listeners_.clear();  // the messenger takes the very port
  if (echoes_.size() >= kMaxEchoes) return too_many("transports", std::ssize(echoes_) + 1, kMaxEchoes);
  TANDEM_ASSIGN(std::unique_ptr<TransportEcho> echo,
                TransportEcho::start(request.at("host").get<std::string>(), request.at("port").get<int64_t>()));
  echoes_.push_back(std::move(echo));
  return nlohmann::json{{"port", echoes_.back()->port()}};
}

Status Responder::enter_session(const std::string& id) {
  const int64_t now_us = clock_.now_us();
  const bool is_other = !session_.empty() && session_ != id;
  if (is_other && now_us - last_request_us_ < kSessionIdleUs) {
    return make_error(ErrorKind::kResourceExhausted, "another check is running here; try again in {} s",
                      kSessionIdleUs / 1'000'000);
  }
  if (is_other) {
    listeners_.clear();
    echoes_.clear();
  }
  session_ = id;
  last_request_us_ = now_us;
  return {};
}

void Responder::expire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (session_.empty() || clock_.now_us() - last_request_us_ < kSessionIdleUs) return;
  listeners_.clear();
  echoes_.clear();
  session_.clear();
}

}  // namespace tandem::check
