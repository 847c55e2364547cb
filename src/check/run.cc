#include "src/check/run.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>

#include "src/base/version.h"
#include "src/check/judge.h"
#include "src/check/peer.h"
#include "src/check/targets.h"
#include "src/comm/address.h"

namespace tandem::check {
namespace {

using std::chrono::milliseconds;

constexpr int kClockReadings = 8;               // the one with the shortest round trip counts
constexpr milliseconds kFactsTime{30'000};      // hashing the program and a model of hundreds of files
constexpr milliseconds kOperationTime{15'000};  // any other request

int64_t unix_time_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// A host and what is known about it so far. Each phase fills it in by a thread of its own.
struct Host {
  Host(Target t, Peer p) : target(std::move(t)), peer(std::move(p)) {}
  Target target;
  Peer peer;
  bool answers = false;
  std::vector<Finding> findings;  // of the running phase
  std::optional<HostFacts> facts;
  std::vector<ProcessFacts> processes;
  std::vector<ListenOutcome> ports;                // of target.endpoints
  std::vector<std::pair<size_t, size_t>> reached;  // host and endpoint, from here
  Endpoint echo;                                   // what transports are measured against; port 0: none
};

class Check {
 public:
  Check(const cluster::ClusterPlan& plan, const RunOptions& options) : options_(options), responder_(options.examine) {
    for (Target& target : list_targets(plan, [this](const std::string& host) { return is_here(host); })) {
      Responder* own = target.is_here ? &responder_ : nullptr;
      Peer peer(target.host, options.agent_port, own);
      hosts_.emplace_back(std::move(target), std::move(peer));
    }
  }

  std::vector<Finding> run() {
    std::vector<Target> targets;
    for (const Host& host : hosts_) targets.push_back(host.target);
    add(judge_addresses(targets));
    on_all([this](Host& host) { contact(host); });
    on_all([this](Host& host) { ask_facts(host); });
    judge_facts();
    on_all([this](Host& host) { listen(host); });
    on_all([this](Host& host) { connect(host); });
    add(judge_names(resolutions_));
    on_all([this](Host& host) { start_echo(host); });
    measure_transports();
    on_all([this](Host& host) {
      if (host.answers) static_cast<void>(host.peer.ask(request("end"), kOperationTime));
    });
    return std::move(findings_);
  }

 private:
  bool is_here(const std::string& host) const {
    if (is_loopback(host)) return true;
    const Result<std::string> address = resolve_host(host, milliseconds(options_.timeout_ms));
    return address.ok() && comm::find_device(*comm::parse_address(*address, 1)).ok();
  }

  void add(std::vector<Finding> findings) {
    for (Finding& finding : findings) findings_.push_back(std::move(finding));
  }

  template <typename Step>
  void on_all(const Step& step) {
    std::vector<std::thread> threads;
    for (Host& host : hosts_) threads.emplace_back([&step, &host] { step(host); });
    for (std::thread& thread : threads) thread.join();
    for (Host& host : hosts_) add(std::exchange(host.findings, {}));
  }

  nlohmann::json request(const char* op) const { return {{"op", op}, {"session", session_}}; }

  void report_fault(Host& host, const char* what, const Error& error) const {
    host.findings.push_back(
        {State::kError, Category::kHosts, host.target.host, what, error.message, "an answer",
         fmt::format("start the agent there again: {}", agent_command(host.target.host, options_.agent_port))});
    host.answers = false;
  }

  // Whether there is an agent, and how its clock goes.
  void contact(Host& host) {
    if (host.peer.is_here()) {
      host.answers = true;
      host.findings.push_back({State::kOk, Category::kHosts, host.target.host, "agent", "this host", "", ""});
      return;
    }
    const std::string& name = host.target.host;
    const milliseconds limit(options_.timeout_ms);
    const ConnectOutcome outcome = connect_all({{name, options_.agent_port}}, "", limit).front();
    if (outcome.reach == Reach::kUnknownName) {
      host.findings.push_back({State::kError, Category::kNames, name, "address", outcome.text, "",
                               "correct `host` in the cluster file, or make the name known in the DNS or /etc/hosts"});
      return;
    }
    if (outcome.reach != Reach::kReached) {
      const Error why = make_error(ErrorKind::kUnavailable, "{}:{} {}", outcome.address, options_.agent_port,
                                   outcome.reach == Reach::kTimedOut  ? "timed out"
                                   : outcome.reach == Reach::kRefused ? "refused"
                                                                      : outcome.text);
      host.findings.push_back(judge_missing_agent(name, options_.agent_port, why, outcome.reach == Reach::kRefused));
      try_unattended(host);
      return;
    }
    std::optional<ClockReading> best;
    for (int i = 0; i < kClockReadings; ++i) {
      const int64_t start_us = unix_time_us();
      const Result<nlohmann::json> hello = host.peer.ask(request("hello"), limit);
      const int64_t end_us = unix_time_us();
      if (!hello.ok()) return report_fault(host, "agent", hello.error());
      if (!check_hello(host, *hello)) return;
      const ClockReading reading{hello->value("time_us", int64_t{0}) - (start_us + end_us) / 2,
                                 (end_us - start_us) / 2};
      if (!best || reading.uncertainty_us < best->uncertainty_us) best = reading;
    }
    host.answers = true;
    host.findings.push_back({State::kOk, Category::kHosts, name, "agent", "answers", "", ""});
    host.findings.push_back(judge_clock(name, *best));
  }

  bool check_hello(Host& host, const nlohmann::json& hello) const {
    const bool is_sound = hello.is_object() && hello.contains("protocol") && hello["protocol"] == kProtocol &&
                          hello.contains("time_us") && hello["time_us"].is_number_integer();
    if (is_sound) return true;
    const std::string version =
        hello.is_object() && hello.contains("version") ? hello["version"].dump() : std::string("unknown");
    host.findings.push_back({State::kError, Category::kProgram, host.target.host, "agent", "tandem " + version,
                             fmt::format("tandem {}", kVersion),
                             "install the same tandem there and start its agent again"});
    return false;
  }

  // Without an agent packets can at least be sent there from here.
  void try_unattended(Host& host) const {
    std::vector<HostPort> places;
    std::vector<const Endpoint*> tried;
    for (const Endpoint& endpoint : host.target.endpoints) {
      if (endpoint.port == 0) continue;
      places.push_back({endpoint.host, endpoint.port});
      tried.push_back(&endpoint);
    }
    const std::vector<ConnectOutcome> outcomes = connect_all(places, "", milliseconds(options_.timeout_ms));
    for (size_t i = 0; i < outcomes.size(); ++i) {
      host.findings.push_back(judge_reach_unattended("here", *tried[i], outcomes[i]));
    }
  }

  void ask_facts(Host& host) const {
    if (!host.answers) return;
    nlohmann::json asked = request("facts");
    asked["processes"] = nlohmann::json::array();
    for (const cluster::ProcessSpec& process : host.target.processes) {
      asked["processes"].push_back({{"arguments", process.arguments}, {"num_ranks", process.num_ranks}});
    }
    const Result<nlohmann::json> answer = host.peer.ask(asked, kFactsTime);
    if (!answer.ok()) return report_fault(host, "facts", answer.error());
    Result<HostFacts> facts = from_peer<HostFacts>(answer->value("host", nlohmann::json()), "facts");
    if (!facts.ok()) return report_fault(host, "facts", facts.error());
    Result<std::vector<ProcessFacts>> processes =
        from_peer<std::vector<ProcessFacts>>(answer->value("processes", nlohmann::json()), "facts");
    if (!processes.ok()) return report_fault(host, "facts", processes.error());
    if (processes->size() != host.target.processes.size()) {
      return report_fault(host, "facts",
                          make_error(ErrorKind::kDataLoss, "{} processes instead of {}", processes->size(),
                                     host.target.processes.size()));
    }
    host.facts = std::move(facts).value();
    host.processes = std::move(processes).value();
    for (size_t i = 0; i < host.processes.size(); ++i) {
      if (!host.processes[i].fault.empty()) host.processes[i].fault += fmt::format(" (in {})", host.facts->folder);
    }
  }

  void judge_facts() {
    std::vector<std::pair<std::string, HostFacts>> programs;
    std::vector<ExaminedProcess> processes;
    for (const Host& host : hosts_) {
      if (!host.facts) continue;
      programs.emplace_back(host.target.host, *host.facts);
      add(judge_host(host.target, *host.facts, host.processes));
      for (size_t i = 0; i < host.processes.size(); ++i) {
        const cluster::ProcessSpec& process = host.target.processes[i];
        processes.push_back({process.name, process.role, host.target.host, host.processes[i]});
      }
    }
    add(judge_programs(programs));
    add(judge_models(processes));
  }

  template <typename Outcome>
  Result<std::vector<Outcome>> ask_places(const Host& host, nlohmann::json asked,
                                          const std::vector<HostPort>& places) const {
    asked["places"] = places;
    TANDEM_ASSIGN(const nlohmann::json answer, host.peer.ask(asked, kOperationTime));
    TANDEM_ASSIGN(std::vector<Outcome> outcomes,
                  from_peer<std::vector<Outcome>>(answer.value("outcomes", nlohmann::json()),
                                                  asked["op"].get_ref<const std::string&>().c_str()));
    if (outcomes.size() == places.size()) return outcomes;
    return make_error(ErrorKind::kDataLoss, "{} answers for {} ports", outcomes.size(), places.size());
  }

  void listen(Host& host) {
    if (!host.answers) return;
    std::vector<HostPort> places;
    for (const Endpoint& endpoint : host.target.endpoints) places.push_back({endpoint.host, endpoint.port});
    Result<std::vector<ListenOutcome>> outcomes = ask_places<ListenOutcome>(host, request("listen"), places);
    if (!outcomes.ok()) return report_fault(host, "ports", outcomes.error());
    host.ports = std::move(outcomes).value();
    for (size_t i = 0; i < host.ports.size(); ++i) {
      host.findings.push_back(judge_port(host.target.endpoints[i], host.ports[i]));
    }
  }

  // Every port that is held open on another host, from this one.
  void connect(Host& from) {
    if (!from.answers) return;
    std::vector<HostPort> places;
    std::vector<std::pair<size_t, size_t>> which;
    for (size_t h = 0; h < hosts_.size(); ++h) {
      const Host& to = hosts_[h];
      if (&to == &from) continue;
      for (size_t i = 0; i < to.ports.size(); ++i) {
        const Endpoint& endpoint = to.target.endpoints[i];
        if (is_loopback(endpoint.host) || to.ports[i].state != PortState::kFree) continue;
        places.push_back({endpoint.host, to.ports[i].port});
        which.emplace_back(h, i);
      }
    }
    nlohmann::json asked = request("connect");
    asked["timeout_ms"] = options_.timeout_ms;
    const Result<std::vector<ConnectOutcome>> outcomes = ask_places<ConnectOutcome>(from, asked, places);
    if (!outcomes.ok()) return report_fault(from, "connections", outcomes.error());
    for (size_t i = 0; i < places.size(); ++i) {
      const auto [h, e] = which[i];
      const Endpoint& endpoint = hosts_[h].target.endpoints[e];
      const ConnectOutcome& outcome = (*outcomes)[i];
      from.findings.push_back(judge_reach(from.target.host, endpoint, outcome));
      if (outcome.reach == Reach::kReached) from.reached.push_back(which[i]);
      note_address(endpoint.host, from.target.host, outcome.address);
      note_address(endpoint.host, hosts_[h].target.host, hosts_[h].ports[e].address);
    }
  }

  void note_address(const std::string& name, const std::string& host, const std::string& address) {
    if (address.empty() || address == name) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    resolutions_[name][host] = address;
  }

  // At the first KV port, or any port of a host that hands no KV over but has ranks that exchange rows.
  void start_echo(Host& host) const {
    if (!host.answers) return;
    for (size_t i = 0; i < host.ports.size(); ++i) {
      const Endpoint& endpoint = host.target.endpoints[i];
      const bool is_better = host.echo.host.empty() || (endpoint.is_kv && !host.echo.is_kv);
      if (host.ports[i].state == PortState::kFree && (endpoint.is_kv || endpoint.port == 0) && is_better) {
        host.echo = endpoint;
      }
    }
    if (host.echo.host.empty()) return;
    nlohmann::json asked = request("echo");
    asked["host"] = host.echo.host;
    asked["port"] = host.echo.port;
    const Result<nlohmann::json> answer = host.peer.ask(asked, kOperationTime);
    const Result<int64_t> port = answer.ok() ? from_peer<int64_t>(answer->value("port", nlohmann::json()), "port")
                                             : Result<int64_t>(answer.error());
    if (port.ok()) {
      host.echo.port = *port;
      return;
    }
    host.echo.host.clear();
    host.findings.push_back({State::kError, Category::kTransport, host.target.host, "KV transport",
                             port.error().message, "", "UCX cannot start on this address: correct `host`"});
  }

  // One pair after the other, or they would share the network.
  void measure_transports() {
    const int64_t num_hosts = std::ssize(hosts_);
    const bool all = num_hosts * (num_hosts - 1) <= kMaxMeasuredPairs;
    for (size_t a = 0; a < hosts_.size(); ++a) {
      for (size_t b = 0; b < hosts_.size(); ++b) {
        const bool is_next = b == (a + 1) % hosts_.size();
        if (a != b ? all || is_next : count_kv(hosts_[a].target) > 1) measure_transport_of(hosts_[a], b);
      }
    }
  }

  static int64_t count_kv(const Target& target) {
    return std::count_if(target.endpoints.begin(), target.endpoints.end(), [](const Endpoint& e) { return e.is_kv; });
  }

  // Where a connection to the port failed before, that is the finding.
  void measure_transport_of(Host& from, size_t to_index) {
    const Host& to = hosts_[to_index];
    if (!from.answers || !to.answers || from.echo.host.empty() || to.echo.host.empty()) return;
    const bool is_itself = &from == &to;
    if (!is_itself && (is_loopback(to.echo.host) || is_loopback(from.echo.host))) return;
    const auto leads_to_echo = [&](const std::pair<size_t, size_t>& place) {
      const Endpoint& endpoint = to.target.endpoints[place.second];
      return place.first == to_index && endpoint.host == to.echo.host && endpoint.is_kv == to.echo.is_kv &&
             (endpoint.port == 0 || endpoint.port == to.echo.port);
    };
    if (!is_itself && std::none_of(from.reached.begin(), from.reached.end(), leads_to_echo)) return;
    nlohmann::json asked = request("measure");
    asked["own_host"] = from.echo.host;
    asked["host"] = to.echo.host;
    asked["port"] = to.echo.port;
    const Result<nlohmann::json> answer = from.peer.ask(asked, kOperationTime);
    const Result<TransportReading> reading =
        answer.ok() ? from_peer<TransportReading>(*answer, "reading") : Result<TransportReading>(answer.error());
    Endpoint shown = to.echo;
    shown.host = to.target.host;
    findings_.push_back(judge_transport(from.target.host, shown, reading));
  }

  const RunOptions& options_;
  const std::string session_ = random_hex(16);
  Responder responder_;
  std::deque<Host> hosts_;
  std::mutex mutex_;  // of resolutions_
  Resolutions resolutions_;
  std::vector<Finding> findings_;
};

}  // namespace

std::vector<Finding> run_check(const cluster::ClusterPlan& plan, const RunOptions& options) {
  return Check(plan, options).run();
}

}  // namespace tandem::check
