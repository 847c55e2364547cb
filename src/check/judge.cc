#include "src/check/judge.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "src/check/agent.h"

namespace tandem::check {
namespace {

double milliseconds_of(int64_t us) { return static_cast<double>(us) / 1000; }

std::string arrow(const std::string& from, const std::string& to) { return fmt::format("{} -> {}", from, to); }

std::string port_text(const Endpoint& endpoint) {
  return endpoint.port == 0 ? endpoint.use : fmt::format("{} {}", endpoint.use, endpoint.port);
}

// The firewall's rule for it: a data port may be any.
std::string allow_text(const std::string& from, const Endpoint& to) {
  const std::string port = to.port == 0 ? "ports of net.ipv4.ip_local_port_range" : fmt::format("port {}", to.port);
  return fmt::format("allow TCP {} from {} in the firewall of {} and those between", port, from, to.host);
}

}  // namespace

Finding judge_clock(const std::string& host, const ClockReading& reading) {
  Finding finding{State::kOk,
                  Category::kClocks,
                  host,
                  "clock",
                  fmt::format("{:+.1f} ms ± {:.1f} ms", milliseconds_of(reading.offset_us),
                              milliseconds_of(reading.uncertainty_us)),
                  fmt::format("{:.0f} ms", milliseconds_of(kMostClockOffsetUs)),
                  ""};
  const int64_t offset_us = reading.offset_us < 0 ? -reading.offset_us : reading.offset_us;
  if (offset_us - reading.uncertainty_us > kMostClockOffsetUs) {
    finding.state = State::kWarn;
    finding.remedy = "synchronise the clocks (chrony, ntpd); until then logs and traces of the hosts do not line up";
  }
  return finding;
}

std::vector<Finding> judge_programs(const std::vector<std::pair<std::string, HostFacts>>& hosts) {
  std::vector<Finding> findings;
  if (hosts.empty()) return findings;
  const auto& [first_name, first] = hosts.front();
  const auto text = [](const HostFacts& facts) {
    return fmt::format("{} ({})", facts.version, facts.program_sha256.substr(0, 12));
  };
  for (const auto& [name, facts] : hosts) {
    Finding finding{State::kOk, Category::kProgram, name, "tandem", text(facts), "", ""};
    if (facts.version != first.version || facts.program_sha256 != first.program_sha256) {
      finding.state = State::kError;
      finding.limit = fmt::format("{} as on {}", text(first), first_name);
      finding.remedy = fmt::format("install the same tandem on {} and {}", first_name, name);
    }
    findings.push_back(std::move(finding));
  }
  return findings;
}

namespace {

// One property that all must share with the first that has it.
void judge_same(const std::vector<ExaminedProcess>& processes, const char* what, std::string ProcessFacts::*property,
                bool is_hash, State state, const std::string& remedy, std::vector<Finding>& findings) {
  const ExaminedProcess* first = nullptr;
  for (const ExaminedProcess& process : processes) {
    const std::string& value = process.facts.*property;
    if (value.empty() && first == nullptr) continue;
    if (first == nullptr) first = &process;
    const std::string& expected = first->facts.*property;
    const auto text = [&](const std::string& t) { return t.empty() ? "none" : is_hash ? t.substr(0, 12) : t; };
    Finding finding{
        State::kOk, Category::kModel, fmt::format("{} on {}", process.name, process.host), what, text(value), "", ""};
    if (value != expected) {
      finding.state = state;
      finding.limit = fmt::format("{} as {} on {}", text(expected), first->name, first->host);
      finding.remedy = remedy;
    }
    findings.push_back(std::move(finding));
  }
}

}  // namespace

std::vector<Finding> judge_models(const std::vector<ExaminedProcess>& processes) {
  std::vector<Finding> findings;
  std::vector<ExaminedProcess> sound;
  std::vector<ExaminedProcess> starting;
  std::vector<ExaminedProcess> transferring;
  for (const ExaminedProcess& process : processes) {
    if (process.role == "router") continue;
    if (!process.facts.fault.empty()) {
      findings.push_back({State::kError, Category::kModel, fmt::format("{} on {}", process.name, process.host),
                          "options and model", process.facts.fault, "",
                          "as it says; `tandem serve` would end with the same"});
    }
    if (process.facts.config_hash.empty()) continue;
    sound.push_back(process);
    if (!process.facts.fault.empty()) continue;
    starting.push_back(process);
    if (process.role != "both") transferring.push_back(process);
  }
  const std::string copy =
      "copy the same model folder to every host; KV and experts of different models do not fit together";
  judge_same(sound, "config.json", &ProcessFacts::config_hash, true, State::kError, copy, findings);
  judge_same(sound, "weights", &ProcessFacts::weights_hash, true, State::kError, copy, findings);
  judge_same(sound, "tokenizer.json", &ProcessFacts::tokenizer_hash, true, State::kError, copy, findings);
  judge_same(
      starting, "instruction set", &ProcessFacts::instruction_set, false, State::kWarn,
      "force one that all hosts have with the option cpu-isa, or answers may differ in their last bits; ranks of one "
      "group refuse to start",
      findings);
  judge_same(transferring, "KV layout", &ProcessFacts::kv_layout, false, State::kError,
             "give all workers the same block-size, kv-cache-dtype and dtype", findings);
  return findings;
}

Finding judge_port(const Endpoint& endpoint, const ListenOutcome& outcome) {
  Finding finding{State::kOk, Category::kPorts, endpoint.host, port_text(endpoint), "free", "free", ""};
  if (outcome.state == PortState::kFree) return finding;
  finding.state = State::kError;
  finding.value = outcome.text;
  switch (outcome.state) {
    case PortState::kTaken:
      finding.value = "taken";
      finding.remedy = fmt::format("stop its owner (on {}: ss -ltnp 'sport = :{}') or choose another port",
                                   endpoint.host, endpoint.port);
      break;
    case PortState::kNotHere:
      finding.value = fmt::format("{} is no address of this host", outcome.address);
      finding.remedy = "correct `host` in the cluster file, or the name's entry in the DNS or /etc/hosts";
      break;
    case PortState::kDenied:
      finding.remedy = "choose a port of 1024 or more";
      break;
    case PortState::kUnknownName:
      finding.category = Category::kNames;
      finding.remedy = fmt::format("make {} known in the DNS or /etc/hosts of this host", endpoint.host);
      break;
    case PortState::kFree:
    case PortState::kFailed:
      finding.remedy = "the value says what the system refuses";
      break;
  }
  return finding;
}

Finding judge_reach(const std::string& from, const Endpoint& to, const ConnectOutcome& outcome) {
  Finding finding{State::kError, Category::kPorts, arrow(from, to.host), port_text(to), outcome.text, "reached", ""};
  switch (outcome.reach) {
    case Reach::kReached:
      finding.state = State::kOk;
      finding.value = fmt::format("reached in {:.1f} ms", milliseconds_of(outcome.time_us));
      break;
    case Reach::kOther:
      finding.value = fmt::format("another program answers at {}", outcome.address);
      finding.remedy =
          fmt::format("{} leads elsewhere from {}: correct the address, or the redirection on the way", to.host, from);
      break;
    case Reach::kRefused:
      finding.value = "refused, though it is held open there";
      finding.remedy = fmt::format("a firewall rejects it: {}", allow_text(from, to));
      break;
    case Reach::kTimedOut:
      finding.value = "timed out, though it is held open there";
      finding.remedy = fmt::format("a firewall drops it: {}", allow_text(from, to));
      break;
    case Reach::kUnreachable:
      finding.remedy =
          fmt::format("nothing leads from {} to {}: correct the routes and the outgoing firewall rules of {}", from,
                      outcome.address, from);
      break;
    case Reach::kUnknownName:
      finding.category = Category::kNames;
      finding.remedy = fmt::format("make {} known in the DNS or /etc/hosts of {}", to.host, from);
      break;
  }
  return finding;
}

Finding judge_reach_unattended(const std::string& from, const Endpoint& to, const ConnectOutcome& outcome) {
  Finding finding = judge_reach(from, to, outcome);
  if (outcome.reach == Reach::kRefused) {
    finding.state = State::kWarn;
    finding.value = "refused: the host answers, nothing listens";
    finding.remedy = "start an agent there to have the port tried";
  } else if (outcome.reach == Reach::kReached || outcome.reach == Reach::kOther) {
    finding.state = State::kWarn;
    finding.value = "a program listens already";
    finding.remedy = "if it is not this cluster's, stop it or choose another port";
  } else if (outcome.reach == Reach::kTimedOut) {
    finding.value = "timed out";
    finding.remedy = fmt::format("correct the address, or {}", allow_text(from, to));
  }
  return finding;
}

std::vector<Finding> judge_names(const Resolutions& addresses) {
  std::vector<Finding> findings;
  for (const auto& [name, by_host] : addresses) {
    std::set<std::string> different;
    bool loops = false;
    std::string value;
    for (const auto& [host, address] : by_host) {
      different.insert(address);
      loops = loops || (is_loopback(address) && !is_loopback(name));
      value += fmt::format("{}{} on {}", value.empty() ? "" : ", ", address, host);
    }
    Finding finding{State::kOk, Category::kNames, name, "address", value, "", ""};
    if (different.size() == 1 && !loops) finding.value = *different.begin();
    if (loops) {
      finding.state = State::kError;
      finding.limit = "an address that the other hosts reach";
      finding.remedy = fmt::format("take {} off the loopback lines of /etc/hosts", name);
    } else if (different.size() > 1) {
      finding.state = State::kWarn;
      finding.limit = "the same everywhere";
      finding.remedy =
          "if these are not networks of one host, correct the DNS or /etc/hosts; an address instead of the name avoids "
          "it";
    }
    findings.push_back(std::move(finding));
  }
  return findings;
}

Finding judge_transport(const std::string& from, const Endpoint& to, const Result<TransportReading>& reading) {
  const bool is_itself = from == to.host;
  Finding finding{
      State::kError, Category::kTransport, is_itself ? from : arrow(from, to.host), "KV transport", "", "", ""};
  if (!reading.ok()) {
    finding.value = reading.error().message;
    finding.limit = "an answer";
    finding.remedy = fmt::format(
        "besides {}, UCX takes ports of its own: allow TCP in net.ipv4.ip_local_port_range between the hosts; without "
        "network devices in common, correct the addresses",
        port_text(to));
    return finding;
  }
  finding.state = State::kOk;
  finding.value = fmt::format("{}: {:.1f} µs, {:.2f} GB/s ({:.0f} MB)", reading->transport, reading->round_trip_us,
                              reading->bytes_per_s() / 1e9, static_cast<double>(reading->bytes) / 1e6);
  finding.limit = fmt::format("{:.0f} µs, {:.2f} GB/s", kMostRoundTripUs, kLeastBytesPerS / 1e9);
  if (reading->round_trip_us > kMostRoundTripUs || reading->bytes_per_s() < kLeastBytesPerS) {
    finding.state = State::kWarn;
    finding.remedy =
        "the KV of long prompts will wait for this: use a faster network, or have the hosts idle during the check";
  }
  return finding;
}

std::string agent_command(const std::string& host, int64_t agent_port) {
  return fmt::format("tandem check-agent --host {}{}", host,
                     agent_port == kDefaultAgentPort ? "" : fmt::format(" --agent-port {}", agent_port));
}

Finding judge_missing_agent(const std::string& host, int64_t agent_port, const Error& why, bool is_refused) {
  Finding finding{State::kError, Category::kHosts, host, "agent", "", "an answer", ""};
  finding.value = fmt::format("no agent on {}: {}", host, why.message);
  finding.remedy = fmt::format("start one there, in the folder where tandem will run: {}; only this side was examined",
                               agent_command(host, agent_port));
  if (!is_refused) {
    finding.remedy = fmt::format(
        "correct `host` in the cluster file if {} is wrong, allow TCP port {} to it if a firewall drops "
        "it; else {}",
        host, agent_port, finding.remedy);
  }
  return finding;
}

}  // namespace tandem::check
