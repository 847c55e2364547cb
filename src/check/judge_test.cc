#include "src/check/judge.h"

#include <gtest/gtest.h>

namespace tandem::check {
namespace {

HostFacts good_host() {
  HostFacts facts;
  facts.version = "1";
  facts.program_sha256 = "abcdef0123456789";
  facts.locked_memory_bytes = int64_t{8} << 20;
  facts.shm_free_bytes = int64_t{1} << 30;
  facts.transparent_huge_pages = "madvise";
  facts.processors = 8;
  facts.available_bytes = int64_t{4} << 30;
  facts.available_by = "MemAvailable";
  return facts;
}

Target host_with_two_workers() {
  Target target;
  target.host = "h";
  for (const char* role : {"prefill", "decode", "router"}) {
    cluster::ProcessSpec process;
    process.name = process.role = role;
    target.processes.push_back(process);
  }
  return target;
}

std::vector<ProcessFacts> needs(int64_t threads, int64_t bytes) {
  ProcessFacts one;
  one.threads = threads;
  one.memory_bytes = bytes;
  return {one, one, {}};
}

std::vector<Finding> deviations(std::vector<Finding> findings) {
  std::erase_if(findings, [](const Finding& finding) { return finding.state == State::kOk; });
  return findings;
}

TEST(JudgeHost, AGoodHostHasNoDeviation) {
  const std::vector<Finding> findings = judge_host(host_with_two_workers(), good_host(), needs(4, int64_t{1} << 30));
  EXPECT_TRUE(deviations(findings).empty());
  EXPECT_EQ(findings.size(), 7U);
}

TEST(JudgeHost, TooManyThreadsAreAWarning) {
  EXPECT_EQ(deviations(judge_host(host_with_two_workers(), good_host(), needs(8, 0))),
            (std::vector<Finding>{
                {State::kWarn, Category::kProcessors, "h", "compute threads", "16 threads on 8 processors", "8.0",
                 "give each of the 2 ranks here at most 4 threads (option threads), or more processors"}}));
  HostFacts limited = good_host();
  limited.quota = 2.5;
  EXPECT_EQ(
      deviations(judge_host(host_with_two_workers(), limited, needs(2, 0))),
      (std::vector<Finding>{{State::kWarn, Category::kProcessors, "h", "compute threads",
                             "4 threads on 8 processors, of which the control group gives the time of 2.5", "2.5",
                             "give each of the 2 ranks here at most 1 threads (option threads), or more processors"}}));
  limited.quota = 1.5;
  EXPECT_EQ(deviations(judge_host(host_with_two_workers(), limited, needs(1, 0))).at(0).remedy,
            "2 ranks here compute by turns: have fewer, or more processors");
}

TEST(JudgeHost, TheSumOfTheProcessesMustFit) {
  EXPECT_EQ(
      deviations(judge_host(host_with_two_workers(), good_host(), needs(1, int64_t{3} << 30))),
      (std::vector<Finding>{
          {State::kError, Category::kMemory, "h", "memory", "6144 MiB needed", "4096 MiB available (MemAvailable)",
           "lower kv-cache-memory-bytes, use a quantization of fewer bits, or move a worker to another host"}}));
}

TEST(JudgeHost, LimitsHaveRemedies) {
  HostFacts facts = good_host();
  facts.rdma_ports = {{"mlx5_0/1", "4: ACTIVE"}};
  facts.shm_free_bytes = int64_t{16} << 20;
  facts.memfd_fault = "Function not implemented";
  facts.transparent_huge_pages = "never";
  EXPECT_EQ(
      deviations(judge_host(host_with_two_workers(), facts, needs(1, 0))),
      (std::vector<Finding>{
          {State::kWarn, Category::kLimits, "h", "locked memory", "8 MiB", "unlimited beside RDMA devices",
           "ulimit -l unlimited, LimitMEMLOCK=infinity in the unit, or --ulimit memlock=-1 of the container"},
          {State::kWarn, Category::kLimits, "h", "/dev/shm", "16 MiB free", "64 MiB",
           "remove what lies there, or enlarge it (mount -o remount,size=1G /dev/shm; --shm-size of the container)"},
          {State::kError, Category::kLimits, "h", "anonymous shared memory", "Function not implemented", "",
           "allow memfd_create: ranks of one host exchange through it"},
          {State::kWarn, Category::kLimits, "h", "huge pages", "transparent: never, reserved: 0", "madvise or always",
           "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: weights are asked for in huge pages"}}));
  facts = good_host();
  facts.locked_memory_bytes = -1;
  facts.rdma_ports = {{"mlx5_0/1", "4: ACTIVE"}};
  facts.shm_free_bytes = -1;
  EXPECT_EQ(deviations(judge_host(host_with_two_workers(), facts, needs(1, 0))),
            (std::vector<Finding>{{State::kError, Category::kLimits, "h", "/dev/shm", "missing or not writable",
                                   "64 MiB", "mount a tmpfs there: processes of one host pass KV through it"}}));
}

TEST(JudgeClock, UncertaintyIsNotHeldAgainstAHost) {
  EXPECT_EQ(judge_clock("h", {-150'000, 60'000}),
            (Finding{State::kOk, Category::kClocks, "h", "clock", "-150.0 ms ± 60.0 ms", "100 ms", ""}));
  EXPECT_EQ(judge_clock("h", {-150'000, 40'000}),
            (Finding{State::kWarn, Category::kClocks, "h", "clock", "-150.0 ms ± 40.0 ms", "100 ms",
                     "synchronise the clocks (chrony, ntpd); until then logs and traces of the hosts do not line up"}));
}

TEST(JudgePrograms, AnotherFileOfTheSameVersionIsAnError) {
  HostFacts other = good_host();
  other.program_sha256 = "ffffffffffffffff";
  EXPECT_TRUE(deviations(judge_programs({{"a", good_host()}, {"b", good_host()}})).empty());
  EXPECT_EQ(deviations(judge_programs({{"a", good_host()}, {"b", other}, {"c", good_host()}})),
            (std::vector<Finding>{{State::kError, Category::kProgram, "b", "tandem", "1 (ffffffffffff)",
                                   "1 (abcdef012345) as on a", "install the same tandem on a and b"}}));
}

ExaminedProcess make_worker(const std::string& name, const std::string& role) {
  ExaminedProcess process{name, role, "h-" + name, {}};
  process.facts.config_hash = "0123456789abcdef";
  process.facts.weights_hash = "w";
  process.facts.tokenizer_hash = "t";
  process.facts.kv_layout = "mla 5 layers";
  process.facts.instruction_set = "cpu-avx512";
  return process;
}

TEST(JudgeModels, EqualOnesAreGood) {
  ExaminedProcess router{"router", "router", "h", {}};
  EXPECT_TRUE(deviations(judge_models({make_worker("p", "prefill"), make_worker("d", "decode"), router})).empty());
}

TEST(JudgeModels, DifferencesNameBothSides) {
  ExaminedProcess other = make_worker("d", "decode");
  other.facts.config_hash = "ffff";
  other.facts.weights_hash = "";
  other.facts.instruction_set = "cpu-avx2";
  other.facts.kv_layout = "mla 6 layers";
  const std::string copy =
      "copy the same model folder to every host; KV and experts of different models do not fit together";
  EXPECT_EQ(deviations(judge_models({make_worker("p", "prefill"), other})),
            (std::vector<Finding>{
                {State::kError, Category::kModel, "d on h-d", "config.json", "ffff", "0123456789ab as p on h-p", copy},
                {State::kError, Category::kModel, "d on h-d", "weights", "none", "w as p on h-p", copy},
                {State::kWarn, Category::kModel, "d on h-d", "instruction set", "cpu-avx2", "cpu-avx512 as p on h-p",
                 "force one that all hosts have with the option cpu-isa, or answers may differ in their last bits; "
                 "ranks of one "
                 "group refuse to start"},
                {State::kError, Category::kModel, "d on h-d", "KV layout", "mla 6 layers", "mla 5 layers as p on h-p",
                 "give all workers the same block-size, kv-cache-dtype and dtype"}}));
}

TEST(JudgeModels, AFaultIsShownAsItIs) {
  ExaminedProcess broken{"d", "decode", "h", {}};
  broken.facts.fault = "model/config.json: no such file";
  EXPECT_EQ(deviations(judge_models({make_worker("p", "prefill"), broken})),
            (std::vector<Finding>{{State::kError, Category::kModel, "d on h", "options and model",
                                   "model/config.json: no such file", "",
                                   "as it says; `tandem serve` would end with the same"}}));
}

const Endpoint kKvPort{"h2", 14580, "d's kv_port", true};

TEST(JudgePort, EveryStateHasARemedy) {
  EXPECT_EQ(judge_port(kKvPort, {PortState::kFree, 14580, "10.0.0.2", ""}),
            (Finding{State::kOk, Category::kPorts, "h2", "d's kv_port 14580", "free", "free", ""}));
  EXPECT_EQ(judge_port(kKvPort, {PortState::kTaken, 0, "10.0.0.2", "Address already in use"}),
            (Finding{State::kError, Category::kPorts, "h2", "d's kv_port 14580", "taken", "free",
                     "stop its owner (on h2: ss -ltnp 'sport = :14580') or choose another port"}));
  EXPECT_EQ(judge_port(kKvPort, {PortState::kNotHere, 0, "10.0.0.9", "x"}),
            (Finding{State::kError, Category::kPorts, "h2", "d's kv_port 14580", "10.0.0.9 is no address of this host",
                     "free", "correct `host` in the cluster file, or the name's entry in the DNS or /etc/hosts"}));
  EXPECT_EQ(judge_port(kKvPort, {PortState::kUnknownName, 0, "", "host 'h2': unknown"}),
            (Finding{State::kError, Category::kNames, "h2", "d's kv_port 14580", "host 'h2': unknown", "free",
                     "make h2 known in the DNS or /etc/hosts of this host"}));
  EXPECT_EQ(judge_port(kKvPort, {PortState::kDenied, 0, "", "Permission denied"}).remedy,
            "choose a port of 1024 or more");
}

TEST(JudgeReach, TellsADropFromARejection) {
  const std::string allow = "allow TCP port 14580 from h1 in the firewall of h2 and those between";
  EXPECT_EQ(
      judge_reach("h1", kKvPort, {Reach::kReached, 1234, "10.0.0.2", ""}),
      (Finding{State::kOk, Category::kPorts, "h1 -> h2", "d's kv_port 14580", "reached in 1.2 ms", "reached", ""}));
  EXPECT_EQ(judge_reach("h1", kKvPort, {Reach::kTimedOut, 0, "10.0.0.2", ""}),
            (Finding{State::kError, Category::kPorts, "h1 -> h2", "d's kv_port 14580",
                     "timed out, though it is held open there", "reached", "a firewall drops it: " + allow}));
  EXPECT_EQ(judge_reach("h1", kKvPort, {Reach::kRefused, 0, "10.0.0.2", ""}),
            (Finding{State::kError, Category::kPorts, "h1 -> h2", "d's kv_port 14580",
                     "refused, though it is held open there", "reached", "a firewall rejects it: " + allow}));
  EXPECT_EQ(judge_reach("h1", kKvPort, {Reach::kUnreachable, 0, "10.0.0.2", "No route to host"}),
            (Finding{State::kError, Category::kPorts, "h1 -> h2", "d's kv_port 14580", "No route to host", "reached",
                     "nothing leads from h1 to 10.0.0.2: correct the routes and the outgoing firewall rules of h1"}));
  EXPECT_EQ(judge_reach("h1", kKvPort, {Reach::kOther, 0, "10.0.0.2", ""}).value,
            "another program answers at 10.0.0.2");
  EXPECT_EQ(judge_reach("h1", {"h2", 0, "a data port", false}, {Reach::kTimedOut, 0, "", ""}).remedy,
            "a firewall drops it: allow TCP ports of net.ipv4.ip_local_port_range from h1 in the firewall of h2 and "
            "those between");
}

TEST(JudgeReach, WithoutAnAgentARefusalOnlyMeansThatNothingListens) {
  EXPECT_EQ(judge_reach_unattended("here", kKvPort, {Reach::kRefused, 0, "10.0.0.2", ""}),
            (Finding{State::kWarn, Category::kPorts, "here -> h2", "d's kv_port 14580",
                     "refused: the host answers, nothing listens", "reached",
                     "start an agent there to have the port tried"}));
  EXPECT_EQ(judge_reach_unattended("here", kKvPort, {Reach::kTimedOut, 0, "10.0.0.2", ""}).state, State::kError);
  EXPECT_EQ(judge_reach_unattended("here", kKvPort, {Reach::kReached, 0, "10.0.0.2", ""}).value,
            "a program listens already");
}

TEST(JudgeNames, ANameThatLeadsToItselfIsAnError) {
  EXPECT_EQ(judge_names({{"h2", {{"h1", "10.0.0.2"}, {"h2", "10.0.0.2"}}}}),
            (std::vector<Finding>{{State::kOk, Category::kNames, "h2", "address", "10.0.0.2", "", ""}}));
  EXPECT_EQ(judge_names({{"h2", {{"h1", "10.0.0.2"}, {"h2", "127.0.1.1"}}}}),
            (std::vector<Finding>{{State::kError, Category::kNames, "h2", "address", "10.0.0.2 on h1, 127.0.1.1 on h2",
                                   "an address that the other hosts reach",
                                   "take h2 off the loopback lines of /etc/hosts"}}));
  EXPECT_EQ(judge_names({{"h2", {{"h1", "10.0.0.2"}, {"h3", "10.1.0.2"}}}}).front().state, State::kWarn);
}

TEST(JudgeTransport, ASlowOneIsAWarningAndNoneAnError) {
  EXPECT_EQ(judge_transport("h1", kKvPort, TransportReading{"tcp/eth0", 100, 50'000'000, 50'000}),
            (Finding{State::kOk, Category::kTransport, "h1 -> h2", "KV transport",
                     "tcp/eth0: 100.0 µs, 1.00 GB/s (50 MB)", "2000 µs, 0.11 GB/s", ""}));
  EXPECT_EQ(judge_transport("h1", kKvPort, TransportReading{"tcp/eth0", 100, 5'000'000, 50'000}).state, State::kWarn);
  EXPECT_EQ(judge_transport("h1", kKvPort, TransportReading{"tcp/eth0", 2001, 50'000'000, 50'000}).state, State::kWarn);
  const Finding none = judge_transport("h1", kKvPort, make_error(ErrorKind::kUnavailable, "no answer within 4 s"));
  EXPECT_EQ(none.state, State::kError);
  EXPECT_EQ(none.value, "no answer within 4 s");
}

TEST(JudgeMissingAgent, SaysHowToStartOne) {
  const Error refused = make_error(ErrorKind::kUnavailable, "10.0.0.2:14500 refused");
  EXPECT_EQ(
      judge_missing_agent("h2", 14500, refused, true),
      (Finding{State::kError, Category::kHosts, "h2", "agent", "no agent on h2: 10.0.0.2:14500 refused", "an answer",
               "start one there, in the folder where tandem will run: tandem check-agent --host h2; only this side was "
               "examined"}));
  EXPECT_EQ(
      judge_missing_agent("h2", 14501, refused, false).remedy,
      "correct `host` in the cluster file if h2 is wrong, allow TCP port 14501 to it if a firewall drops it; else "
      "start one "
      "there, in the folder where tandem will run: tandem check-agent --host h2 --agent-port 14501; only this side was "
      "examined");
}

}  // namespace
}  // namespace tandem::check
