// The rows of the table. One row is one option; a row may serve several subcommands when it means the same in all.
#include <limits>

#include "src/base/options.h"

namespace tandem {
namespace {

constexpr uint32_t kServe = static_cast<uint32_t>(Subcommand::kServe);
constexpr uint32_t kRoute = static_cast<uint32_t>(Subcommand::kRoute);
constexpr uint32_t kUp = static_cast<uint32_t>(Subcommand::kUp);
constexpr uint32_t kChat = static_cast<uint32_t>(Subcommand::kChat);
constexpr uint32_t kBench = static_cast<uint32_t>(Subcommand::kBenchServe);
constexpr uint32_t kBenchKernels = static_cast<uint32_t>(Subcommand::kBenchKernels);
constexpr uint32_t kThroughput = static_cast<uint32_t>(Subcommand::kBenchThroughput);
constexpr uint32_t kBenchRouter = static_cast<uint32_t>(Subcommand::kBenchRouter);
constexpr uint32_t kBenchA2a = static_cast<uint32_t>(Subcommand::kBenchA2a);
constexpr uint32_t kBenchKv = static_cast<uint32_t>(Subcommand::kBenchKv);
constexpr uint32_t kLatency = static_cast<uint32_t>(Subcommand::kBenchLatency);
// All that run an engine in this process.
constexpr uint32_t kEngine = kServe | kThroughput | kLatency;
constexpr uint32_t kQuantize = static_cast<uint32_t>(Subcommand::kQuantize);
constexpr uint32_t kSim = static_cast<uint32_t>(Subcommand::kSim);
constexpr uint32_t kEplb = static_cast<uint32_t>(Subcommand::kEplb);
constexpr uint32_t kCheck = static_cast<uint32_t>(Subcommand::kCheck);
constexpr uint32_t kCheckAgent = static_cast<uint32_t>(Subcommand::kCheckAgent);
constexpr uint32_t kOptions = static_cast<uint32_t>(Subcommand::kOptions);

constexpr double kMaxInt = 9007199254740992.0;  // 2^53: exact as a double, beyond every limit we know
constexpr double kInfinity = std::numeric_limits<double>::infinity();

constexpr SubcommandInfo kSubcommands[] = {
    {Subcommand::kServe, "serve", "Serve a model over the OpenAI API, alone or as a prefill or decode worker."},
    {Subcommand::kRoute, "route", "Serve the OpenAI API in front of prefill and decode workers."},
    {Subcommand::kUp, "up", "Start the workers and the router of a cluster file on this host and keep them running."},
    {Subcommand::kCheck, "check", "Examine the hosts of a cluster file: addresses, ports, clocks, transport, limits, program and model."},
    {Subcommand::kCheckAgent, "check-agent", "Answer `tandem check` on a host of the cluster, for a limited time."},
    {Subcommand::kChat, "chat", "Talk to a server, line by line."},
    {Subcommand::kBenchServe, "bench serve", "Measure a server: latencies and throughput under a chosen load."},
    {Subcommand::kBenchThroughput, "bench throughput", "Measure the engine without HTTP: many requests at once."},
    {Subcommand::kBenchLatency, "bench latency", "Measure the engine without HTTP: one batch at a time."},
    {Subcommand::kBenchRouter, "bench router", "Measure the router by itself, on one core, between instant mock workers and a load."},
    {Subcommand::kBenchA2a, "bench a2a", "Measure dispatch and combine of the experts' rows beside a plain copy of the same bytes."},
    {Subcommand::kBenchKv, "bench kv", "Measure the transfer of KV blocks between two processes of this machine, beside memcpy and sockets."},
    {Subcommand::kBenchKernels, "bench kernels", "Measure every kernel beside this machine's limits."},
    {Subcommand::kQuantize, "quantize", "Write a copy of a model with weights of 4 or 8 bits."},
    {Subcommand::kEplb, "eplb", "Compute which rank shall hold which expert, from recorded loads."},
    {Subcommand::kSim, "sim", "Run clusters with faults under a virtual clock and check that nothing is corrupted or lost."},
    {Subcommand::kOptions, "options", "Print the reference of every option."},
};

using enum OptionType;

// One option reads best as one block of text.
// clang-format off
constexpr OptionSpec kTable[] = {
    // serve: what runs
    {.name = "model", .commands = kEngine | kQuantize, .group = "Model", .type = kText, .default_text = "",
     .help = "Directory with config.json, safetensors and tokenizer files.", .positional = true},
    {.name = "served-model-name", .commands = kServe | kRoute, .group = "Model", .type = kList, .default_text = "",
     .help = "Names that requests may give as `model`; the first is shown. Default: the model's directory name."},
    {.name = "dtype", .commands = kEngine, .group = "Model", .type = kChoice, .default_text = "auto",
     .help = "Type of weights and, unless --kv-cache-dtype says otherwise, KV cache; auto is bfloat16. Sums are "
             "float32 in both.",
     .choices = "auto|bfloat16|float32"},
    {.name = "quantization", .commands = kEngine, .group = "Model", .type = kChoice, .default_text = "auto",
     .help = "Format of the linear layers: auto keeps the checkpoint's, the next four quantise at load, the others say "
             "what the checkpoint must be.",
     .choices = "auto|wint8|wint4|w8a8|w4a8|fp8|awq|gptq|compressed-tensors|ascend"},
    {.name = "quantization-group-size", .commands = kEngine | kQuantize, .group = "Model", .type = kInteger,
     .default_text = "0",
     .help = "Columns per scale of wint4 and w4a8; a multiple of 32, 0 for their own (wint4: the whole row, w4a8: 128), -1 for the whole row.",
     .min = -1, .max = 1024},
    {.name = "lm-head-quantization", .commands = kEngine | kQuantize, .group = "Model", .type = kChoice,
     .default_text = "auto",
     .help = "Format of the output head: auto is int8 where --quantization quantises at load (at 4 bits, too: the head "
             "decides between neighbouring tokens), else the checkpoint's; int4 has groups of 128 columns or, "
             "beside wint4 and w4a8, of --quantization-group-size.",
     .choices = "auto|int8|int4"},
    {.name = "load-format", .commands = kEngine, .group = "Model", .type = kChoice, .default_text = "auto",
     .help = "dummy makes deterministic random weights from config.json alone.", .choices = "auto|safetensors|dummy"},
    {.name = "seed", .commands = kEngine, .group = "Model", .type = kInteger, .default_text = "0",
     .help = "Seed of the weights of --load-format dummy and of --moe-routing-simulation.", .min = 0, .max = kMaxInt},
    {.name = "max-model-len", .commands = kEngine, .group = "Model", .type = kBytes, .default_text = "0",
     .help = "Longest prompt plus answer in tokens; 0 takes it from config.json.", .min = 0, .max = 16777216},

    // serve: the scheduler
    // On a CPU one step of 2,048 prompt tokens takes a second or more, and every answer in flight waits for it;
    // 512 keeps the gap between tokens short and the matrices still tall enough to use the machine.
    {.name = "max-num-batched-tokens", .commands = kEngine, .group = "Scheduler", .type = kInteger,
     .default_text = "512", .help = "Most tokens computed in one step; longer prompts are cut into chunks.", .min = 1,
     .max = 1048576},
    {.name = "max-num-seqs", .commands = kEngine, .group = "Scheduler", .type = kInteger, .default_text = "64",
     .help = "Most requests computed in one step.", .min = 1, .max = 65536},
    {.name = "max-step-ms", .commands = kEngine, .group = "Scheduler", .type = kNumber, .default_text = "250",
     .help = "While answers are being generated, a step takes as many prompt tokens as fit into this time; 0 is no limit.",
     .min = 0, .max = 3600000},
    {.name = "max-num-waiting", .commands = kServe, .group = "Scheduler", .type = kInteger, .default_text = "2048",
     .help = "Most requests waiting for their first step; further ones are answered with status 429.", .min = 0,
     .max = 1048576},

    // serve: the KV cache
    {.name = "block-size", .commands = kEngine, .group = "KV cache", .type = kInteger, .default_text = "16",
     .help = "Tokens per KV block.", .min = 1, .max = 256},
    {.name = "kv-cache-dtype", .commands = kEngine, .group = "KV cache", .type = kChoice, .default_text = "auto",
     .help = "Type of cached keys and values. fp8 (also fp8_e4m3) takes half of their memory (MLA: 0.6 of it), with a scale for every token and "
             "head; auto is that of --dtype.",
     .choices = "auto|bfloat16|fp8|fp8_e4m3"},
    {.name = "kv-cache-memory-bytes", .commands = kEngine, .group = "KV cache", .type = kBytes, .default_text = "0",
     .help = "Memory for KV blocks, for example 512M or 4G; 0 is 1G, more if one request of --max-model-len needs it, less "
             "if it does not fit, or all that --gpu-memory-utilization leaves if that is given.", .min = 0, .max = kMaxInt},
    {.name = "gpu-memory-utilization", .commands = kEngine, .group = "KV cache", .type = kNumber, .default_text = "0.9",
     .help = "Most of the memory available at start (on a CPU: of the machine or the control group) to use for weights, "
             "workspace and KV cache; a model that needs more is refused.", .min = 0.01, .max = 1},
    {.name = "num-gpu-blocks-override", .commands = kEngine, .group = "KV cache", .type = kInteger,
     .default_text = "0", .help = "Number of KV blocks instead of a memory size; 0 computes it.", .min = 0,
     .max = 2147483647},
    {.name = "enable-prefix-caching", .commands = kEngine, .group = "KV cache", .type = kFlag, .default_text = "true",
     .help = "Keep the blocks of finished requests and use them for prompts that begin alike."},

    // serve: experts
    {.name = "record-expert-load", .commands = kServe | kThroughput, .group = "Experts", .type = kText,
     .default_text = "",
     .help = "File for the tokens of each expert and layer, which `tandem eplb` reads; emptied first. Also turns on "
             "/expert_load and the expert metrics."},
    {.name = "record-expert-load-interval-s", .commands = kServe | kThroughput, .group = "Experts", .type = kNumber,
     .default_text = "10", .help = "Seconds between two lines of --record-expert-load.", .min = 0.01, .max = 86400},
    {.name = "moe-routing-simulation", .commands = kEngine, .group = "Experts", .type = kText, .default_text = "",
     .help = "For benchmarks: uniform_random, balanced or zipf:ALPHA replaces the routers' choices; answers become "
             "nonsense."},

    // serve: ranks
    {.name = "data-parallel-size", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "1",
     .help = "Ranks that answer requests, each with its own attention and KV cache; more than one needs "
             "--enable-expert-parallel.", .min = 1, .max = 1024},
    {.name = "data-parallel-size-local", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "0",
     .help = "Ranks that this command starts; 0 is all of them.", .min = 0, .max = 1024},
    {.name = "data-parallel-start-rank", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "0",
     .help = "The first rank that this command starts.", .min = 0, .max = 1023},
    {.name = "data-parallel-address", .commands = kServe, .group = "Ranks", .type = kText, .default_text = "127.0.0.1",
     .help = "Address of the node where the ranks meet, which is the one that starts rank 0; the same on every node."},
    {.name = "data-parallel-rpc-port", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "0",
     .help = "Port there; 0 is any free one if all ranks are started by one command, else 29550.", .min = 0, .max = 65535},
    {.name = "data-parallel-rank", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "-1",
     .help = "Be this one rank, with an endpoint of its own, for a load balancer of yours; -1 starts ranks behind one "
             "endpoint.", .min = -1, .max = 1023},
    {.name = "data-parallel-external-lb", .commands = kServe, .group = "Ranks", .type = kFlag, .default_text = "false",
     .help = "Every rank has an endpoint of its own: said by --data-parallel-rank already."},
    {.name = "data-parallel-hybrid-lb", .commands = kServe, .group = "Ranks", .type = kFlag, .default_text = "false",
     .help = "The endpoint of this node spreads requests over the ranks of this node only."},
    {.name = "data-parallel-coordinator", .commands = kServe, .group = "Ranks", .type = kChoice, .default_text = "auto",
     .help = "Who brings the ranks together: auto is rank 0's process with --data-parallel-rank, else the command that "
             "starts rank 0; elsewhere is for ranks that were started by one.", .choices = "auto|elsewhere"},
    {.name = "tensor-parallel-size", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "1",
     .help = "Processes that share the attention and the dense layers of each data rank; the experts are then spread over "
             "all ranks.", .min = 1, .max = 1024},
    {.name = "tensor-parallel-rank", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "0",
     .help = "Be this one of the ranks that share; 0 starts the others itself.", .min = 0, .max = 1023},
    {.name = "tensor-parallel-kv-memory", .commands = kServe, .group = "Ranks", .type = kText, .default_text = "",
     .help = "Keep the KV in memory of tensor rank 0, PROCESS:DESCRIPTOR there; it says so to the ranks that it starts."},
    {.name = "api-server-count", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "1",
     .help = "Front ends that share the endpoint of a node with several ranks, each a thread with a router of its own; 0 is 1. "
             "One is enough until text and sockets take a core (`tandem bench router`). Elsewhere there is one, which the log "
             "says.", .min = 0, .max = 64},
    {.name = "headless", .commands = kServe, .group = "Ranks", .type = kFlag, .default_text = "false",
     .help = "Only start ranks of this node; the endpoint is another node's."},
    {.name = "enable-expert-parallel", .commands = kServe, .group = "Ranks", .type = kFlag, .default_text = "false",
     .help = "Spread the routed experts over all ranks, which then compute every step together."},
    {.name = "all2all-backend", .commands = kServe, .group = "Ranks", .type = kChoice,
     .default_text = "allgather_reducescatter",
     .help = "How rows travel to their experts: docs/expert-parallel.md says which wins where. The last four are vLLM's "
             "names for high_throughput and low_latency.",
     .choices = "allgather_reducescatter|high_throughput|low_latency|naive|deepep_high_throughput|deepep_low_latency|"
                "pplx|flashinfer_all2allv"},
    {.name = "enable-eplb", .commands = kServe, .group = "Ranks", .type = kFlag, .default_text = "false",
     .help = "Move experts between ranks while they work, so that all ranks have about as much to do."},
    {.name = "eplb-config", .commands = kServe, .group = "Ranks", .type = kObject, .default_text = "",
     .help = "JSON: window_size and step_interval in steps, num_redundant_experts over all ranks, log_balancedness, "
             "use_async, policy (default, swift, flash); also as --eplb-config.policy swift."},
    {.name = "enable-dbo", .commands = kServe, .group = "Ranks", .type = kFlag, .default_text = "false",
     .help = "Dual batch overlap: a step in two parts, one computing while the other's tokens travel, if all ranks have the "
             "rows for it. docs/expert-parallel.md says where that pays."},
    {.name = "dbo-decode-token-threshold", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "32",
     .help = "--enable-dbo: rows of a rank, all generated, from which on it wants two parts.", .min = 2, .max = 1 << 24},
    {.name = "dbo-prefill-token-threshold", .commands = kServe, .group = "Ranks", .type = kInteger, .default_text = "512",
     .help = "--enable-dbo: the same for steps with rows of prompts.", .min = 2, .max = 1 << 24},
    {.name = "dispatch-format", .commands = kServe, .group = "Ranks", .type = kChoice, .default_text = "exact",
     .help = "How rows travel to their experts: exact as the experts take them anyway, so that answers are those of one "
             "rank; the others round them first, int8 and fp8 with one scale for each row.",
     .choices = "exact|bf16|int8|fp8"},
    {.name = "rank-timeout", .commands = kServe, .group = "Ranks", .type = kNumber, .default_text = "10",
     .help = "Seconds without a sign of life after which a rank is given up; the others then wait for it to come back.",
     .min = 0.1, .max = 3600},

    // serve: prefill/decode
    {.name = "kv-transfer-config", .commands = kServe, .group = "Prefill/decode", .type = kObject, .default_text = "",
     .help = "JSON: kv_connector (UcxConnector; DecodeBenchConnector makes the KV of prompts up, to measure decode alone), "
             "kv_role (kv_producer, kv_consumer, kv_both), kv_ip, kv_port, engine_id, kv_buffer_device, kv_parallel_size, "
             "kv_connector_extra_config."},
    {.name = "kv-transport", .commands = kServe, .group = "Prefill/decode", .type = kChoice, .default_text = "auto",
     .help = "How KV travels to another worker: auto is shared memory within a host and several TCP streams between hosts; "
             "shm refuses peers on other hosts, tcp is TCP also within a host, ucx and ucx_tcp go through UCX. Both workers "
             "of a pair must choose one of the first three, or one of the last two.", .choices = "auto|shm|tcp|ucx|ucx_tcp"},
    {.name = "kv-checksum", .commands = kServe | kBenchKv, .group = "Prefill/decode", .type = kChoice, .default_text = "auto",
     .help = "Whether the KV that this worker sends carries checksums of its own: auto is where it leaves the memory of this "
             "host.", .choices = "auto|on|off"},
    {.name = "first-token-from", .commands = kServe, .group = "Prefill/decode", .type = kChoice, .default_text = "prefill",
     .help = "Who computes the first token of an answer whose prompt came from a prefill worker by push: prefill sends it "
             "with the blocks, or decode computes the prompt's last token again. Set it on decode workers; the token is the "
             "same.", .choices = "prefill|decode"},

    // serve: the device
    {.name = "device", .commands = kEngine, .group = "Device", .type = kChoice, .default_text = "auto",
     .help = "cpu is the vectorised backend, ref the plain C++ one; auto takes the best this machine has.",
     .choices = "auto|cpu|ref"},
    {.name = "cpu-isa", .commands = kEngine, .group = "Device", .type = kChoice, .default_text = "auto",
     .help = "Instruction set of the cpu backend; one that the machine lacks is refused.",
     .choices = "auto|avx2|avx512|avx512-vnni|avx512-bf16"},
    {.name = "threads", .commands = kEngine | kBenchKernels | kQuantize, .group = "Device", .type = kInteger,
     .default_text = "0",
     .help = "Compute threads; 0 is one per core that affinity and control group leave to this process.", .min = 0, .max = 256},
    {.name = "nice", .commands = kServe, .group = "Device", .type = kInteger, .default_text = "0",
     .help = "Niceness of this process: one that is higher than another's leaves more of the cores they share to the other, "
             "as a prefill worker should to a decode worker beside it.", .min = 0, .max = 19},

    // route
    {.name = "prefill", .commands = kRoute, .group = "Workers", .type = kList, .default_text = "",
     .help = "URLs of prefill workers; without any, decode workers compute their prompts themselves. '#3' behind a URL is "
             "its weight."},
    {.name = "decode", .commands = kRoute, .group = "Workers", .type = kList, .default_text = "",
     .help = "URLs of decode workers, for example http://127.0.0.1:8200."},
    {.name = "policy", .commands = kRoute, .group = "Workers", .type = kChoice, .default_text = "least_load",
     .help = "How a worker is chosen: in turn; by the fewest tokens in flight; the less loaded of two drawn at random; by the "
             "fewest tokens in flight with what the prefix cache saves counted; in turn by weight; by X-Session-Id.",
     .choices = "round_robin|least_load|power_of_two|prefix_aware|weighted_round_robin|session"},
    {.name = "prefill-policy", .commands = kRoute, .group = "Workers", .type = kChoice, .default_text = "policy",
     .help = "The policy for prefill workers, if it is another one than --policy.",
     .choices = "policy|round_robin|least_load|power_of_two|prefix_aware|weighted_round_robin|session"},
    {.name = "decode-policy", .commands = kRoute, .group = "Workers", .type = kChoice, .default_text = "policy",
     .help = "The policy for decode workers, if it is another one than --policy.",
     .choices = "policy|round_robin|least_load|power_of_two|prefix_aware|weighted_round_robin|session"},
    {.name = "transfer-mode", .commands = kRoute, .group = "Workers", .type = kChoice, .default_text = "push",
     .help = "push: decode reserves, prefill sends; pull: prefill first, decode fetches (for workers that are not Tandem).",
     .choices = "push|pull"},
    {.name = "worker-api-key", .commands = kRoute, .group = "Workers", .type = kText, .default_text = "",
     .help = "Key that the router presents to its workers.", .secret = true},
    {.name = "health-check-interval-s", .commands = kRoute, .group = "Workers", .type = kNumber, .default_text = "1",
     .help = "Seconds between two probes of a worker's /health.", .min = 0.05, .max = 3600},
    {.name = "max-retries", .commands = kRoute, .group = "Workers", .type = kInteger, .default_text = "2",
     .help = "Further attempts on other workers while no token has been sent.", .min = 0, .max = 10},
    {.name = "migration-limit", .commands = kRoute, .group = "Workers", .type = kInteger, .default_text = "3",
     .help = "How often an answer may go on at another decode worker when its own fails in the middle of the stream.",
     .min = 0, .max = 10},
    {.name = "retry-budget", .commands = kRoute, .group = "Workers", .type = kNumber, .default_text = "0.2",
     .help = "Share of the requests that may be repeated or moved; 100 more at once.", .min = 0, .max = 10},
    {.name = "rescue-timeout-s", .commands = kRoute, .group = "Workers", .type = kNumber, .default_text = "10",
     .help = "Seconds that requests wait for a worker to come back when the last one has gone.", .min = 0, .max = 3600},
    {.name = "unresponsive-timeout-s", .commands = kRoute, .group = "Workers", .type = kNumber, .default_text = "10",
     .help = "Seconds without an answer to a probe after which a worker's requests are given up or moved.", .min = 0.1,
     .max = 3600},
    {.name = "cb-failure-threshold", .commands = kRoute, .group = "Workers", .type = kInteger, .default_text = "5",
     .help = "Failed requests in a row after which a worker is left out while there are others.", .min = 1,
     .max = 1000000},
    {.name = "cb-timeout-s", .commands = kRoute, .group = "Workers", .type = kNumber, .default_text = "10",
     .help = "Seconds until a worker that was left out is tried again.", .min = 0.01, .max = 3600},
    {.name = "allowed-prefillers", .commands = kRoute, .group = "Workers", .type = kList, .default_text = "",
     .help = "URLs of prefill workers that take only requests whose header x-prefiller-host-port names them. Those of "
             "--prefill may be named too, and nobody else."},
    {.name = "repeat-d-times", .commands = kRoute, .group = "Workers", .type = kInteger, .default_text = "0",
     .help = "Benchmark of decode: after its first token each request is sent this many times more, whose answers are "
             "compared with its own and go nowhere; tandem:router_copies_total counts them.", .min = 0, .max = 4096},
    {.name = "enforce-disagg", .commands = kRoute, .group = "Workers", .type = kFlag, .default_text = "false",
     .help = "Never let a decode worker compute a prompt while there are prefill workers. Otherwise it does so for answers of "
             "one token, for several choices of one prompt, and while no prefill worker is there; "
             "tandem:router_local_prompts_total counts them."},
    {.name = "local-prompt-tokens", .commands = kRoute, .group = "Workers", .type = kInteger, .default_text = "0",
     .help = "Prompts with at most this many tokens that no decode worker has in its prefix cache are computed there.",
     .min = 0, .max = kMaxInt},
    {.name = "max-concurrent-requests", .commands = kRoute, .group = "Workers", .type = kInteger,
     .default_text = "4096", .help = "Requests at workers; further ones wait in the queue.", .min = 1, .max = 1048576},
    {.name = "queue-size", .commands = kRoute, .group = "Workers", .type = kInteger, .default_text = "1024",
     .help = "Requests that wait for a place at workers; further ones are answered with status 429.", .min = 0,
     .max = 1048576},
    {.name = "queue-timeout-s", .commands = kRoute, .group = "Workers", .type = kNumber, .default_text = "60",
     .help = "Seconds that a request may wait for a place at workers, then it is answered with status 503.", .min = 0.01,
     .max = 86400},
    {.name = "admin-api-key", .commands = kRoute, .group = "Workers", .type = kText, .default_text = "",
     .help = "Key for GET, POST and DELETE of /workers, which list, add and remove workers; without it there are no such "
             "routes.", .secret = true},
    {.name = "model", .commands = kRoute, .group = "Model", .type = kText, .default_text = "",
     .help = "Directory with config.json and tokenizer files; without it they are fetched from a worker."},

    // serve and route: the server
    {.name = "host", .commands = kServe | kRoute | kCheckAgent, .group = "Server", .type = kText, .default_text = "127.0.0.1",
     .help = "Address to listen on."},
    {.name = "port", .commands = kServe | kRoute, .group = "Server", .type = kInteger, .default_text = "8000",
     .help = "TCP port to listen on; 0 is any free one, which the log names.", .min = 0, .max = 65535},
    {.name = "api-key", .commands = kServe | kRoute, .group = "Server", .type = kList, .default_text = "",
     .help = "Keys of which a request to /v1 must present one; without any, no key is asked for.", .secret = true},
    {.name = "request-timeout-s", .commands = kServe | kRoute, .group = "Server", .type = kNumber,
     .default_text = "600", .help = "Deadline of a request from its arrival to its last token, in seconds.",
     .min = 0.001, .max = 86400},
    {.name = "shutdown-timeout", .commands = kServe | kRoute | kUp, .group = "Server", .type = kNumber,
     .default_text = "2",
     .help = "After SIGTERM or SIGINT running requests may go on for this long, in seconds, while new ones get 503; a second "
             "signal ends them at once.",
     .min = 0, .max = 86400},
    {.name = "otlp-endpoint", .commands = kServe | kRoute, .group = "Server", .type = kText, .default_text = "",
     .help = "URL of an OpenTelemetry collector (OTLP over HTTP, JSON), for example http://127.0.0.1:4318: spans of each "
             "request, its legs and its stages are sent there."},
    {.name = "log-level", .commands = kServe | kRoute | kUp | kQuantize, .group = "Server", .type = kChoice,
     .default_text = "info", .help = "Least level of the lines that are logged.", .choices = "debug|info|warning|error"},
    {.name = "log-name", .commands = kServe | kRoute | kQuantize, .group = "Server", .type = kText, .default_text = "",
     .help = "Name of this process, put on every log line."},

    // up
    {.name = "cluster", .commands = kUp | kCheck, .group = "Cluster", .type = kText, .default_text = "",
     .help = "Cluster file (YAML), for example examples/local-1p1d.yaml.", .positional = true},
    {.name = "run-dir", .commands = kUp, .group = "Cluster", .type = kText, .default_text = "run",
     .help = "Directory for the logs of the processes."},
    {.name = "dry-run", .commands = kUp, .group = "Cluster", .type = kFlag, .default_text = "false",
     .help = "Print the ports and command lines and start nothing."},

    // check
    {.name = "agent-port", .commands = kCheck | kCheckAgent, .group = "Agent", .type = kInteger, .default_text = "14500",
     .help = "Port of `tandem check-agent`, on every host.", .min = 1, .max = 65535},
    {.name = "lifetime-s", .commands = kCheckAgent, .group = "Agent", .type = kNumber, .default_text = "600",
     .help = "Seconds after which the agent ends.", .min = 1, .max = 86400},
    {.name = "timeout-s", .commands = kCheck, .group = "Check", .type = kNumber, .default_text = "2",
     .help = "Seconds to wait for a connection and for an agent's first answer; what takes longer counts as cut off.",
     .min = 0.1, .max = 10},
    {.name = "verbose", .commands = kCheck, .group = "Check", .type = kFlag, .default_text = "false",
     .help = "List what is good, too."},
    {.name = "json", .commands = kCheck, .group = "Check", .type = kFlag, .default_text = "false",
     .help = "Print every finding as JSON."},

    // chat
    {.name = "url", .commands = kChat, .group = "Server", .type = kText, .default_text = "",
     .help = "Address of the server, for example http://127.0.0.1:8000.", .positional = true},
    {.name = "system", .commands = kChat, .group = "Chat", .type = kText, .default_text = "",
     .help = "Text of the system message."},
    {.name = "max-tokens", .commands = kChat, .group = "Chat", .type = kInteger, .default_text = "0",
     .help = "Most tokens of one answer; 0 leaves it to the server.", .min = 0, .max = 16777216},
    {.name = "temperature", .commands = kChat, .group = "Chat", .type = kNumber, .default_text = "",
     .help = "Sampling temperature; not set leaves it to the server.", .min = 0, .max = 2},
    {.name = "stats", .commands = kChat, .group = "Chat", .type = kFlag, .default_text = "false",
     .help = "Print time to first token and tokens per second after each answer."},

    // bench serve
    {.name = "base-url", .commands = kBench, .group = "Server", .type = kText, .default_text = "http://127.0.0.1:8000",
     .help = "Address of the server."},
    {.name = "endpoint", .commands = kBench, .group = "Server", .type = kChoice, .default_text = "completions",
     .help = "Which API to measure.", .choices = "completions|chat|/v1/completions|/v1/chat/completions"},
    {.name = "model", .commands = kChat | kBench, .group = "Server", .type = kText, .default_text = "auto",
     .help = "Model name of the requests; auto asks the server."},
    {.name = "api-key", .commands = kChat | kBench, .group = "Server", .type = kText, .default_text = "",
     .help = "Key to present to the server.", .secret = true},
    {.name = "request-timeout-s", .commands = kChat | kBench, .group = "Server", .type = kNumber,
     .default_text = "600", .help = "A request that takes longer is a failure.", .min = 0.001, .max = 86400},
    {.name = "dataset-name", .commands = kBench, .group = "Load", .type = kChoice, .default_text = "random",
     .help = "random: token ids; text: English sentences; custom: JSON lines with `prompt` and optionally `output_len`.",
     .choices = "random|text|custom"},
    {.name = "dataset-path", .commands = kBench, .group = "Load", .type = kText, .default_text = "",
     .help = "File of the custom data set."},
    {.name = "num-prompts", .commands = kBench, .group = "Load", .type = kInteger, .default_text = "100",
     .help = "Number of requests.", .min = 1, .max = 10000000},
    {.name = "random-input-len", .commands = kBench, .group = "Load", .type = kInteger, .default_text = "128",
     .help = "Tokens of a random prompt; words of a text prompt.", .min = 1, .max = 16777216},
    {.name = "random-output-len", .commands = kBench, .group = "Load", .type = kInteger, .default_text = "64",
     .help = "Value of max_tokens.", .min = 1, .max = 16777216},
    {.name = "random-range-ratio", .commands = kBench, .group = "Load", .type = kNumber, .default_text = "0",
     .help = "Both lengths vary evenly within (1 - ratio) and (1 + ratio) times their value.", .min = 0, .max = 0.999},
    {.name = "random-prefix-len", .commands = kBench, .group = "Load", .type = kInteger, .default_text = "0",
     .help = "Tokens (words) in front of each prompt that are the same in all.", .min = 0, .max = 16777216},
    {.name = "vocab-size", .commands = kBench, .group = "Load", .type = kInteger, .default_text = "0",
     .help = "Random token ids are below it; 0 asks the server.", .min = 0, .max = 2147483647},
    {.name = "request-rate", .commands = kBench, .group = "Load", .type = kNumber, .default_text = "inf",
     .help = "Requests per second as a Poisson process; inf sends all at once.", .min = 0.001, .max = kInfinity},
    {.name = "max-concurrency", .commands = kBench, .group = "Load", .type = kInteger, .default_text = "0",
     .help = "Most requests in flight; 0 is no bound but the number of prompts.", .min = 0, .max = 16384},
    {.name = "num-warmups", .commands = kBench, .group = "Load", .type = kInteger, .default_text = "0",
     .help = "Requests sent before the measurement and not counted.", .min = 0, .max = 10000},
    {.name = "seed", .commands = kChat | kBench, .group = "Load", .type = kInteger, .default_text = "0",
     .help = "Seed of prompts and arrival times (bench) or of sampling (chat, if given).", .min = 0, .max = kMaxInt},
    {.name = "temperature", .commands = kBench, .group = "Load", .type = kNumber, .default_text = "0",
     .help = "Sampling temperature.", .min = 0, .max = 2},
    {.name = "ignore-eos", .commands = kBench, .group = "Load", .type = kFlag, .default_text = "false",
     .help = "Ask for answers of full length."},
    {.name = "percentile-metrics", .commands = kBench, .group = "Result", .type = kText,
     .default_text = "ttft,tpot,itl,e2el", .help = "Latencies to report, of ttft, tpot, itl, e2el."},
    {.name = "metric-percentiles", .commands = kBench, .group = "Result", .type = kText, .default_text = "50,90,99",
     .help = "Percentiles to report."},
    {.name = "save-result", .commands = kBench, .group = "Result", .type = kFlag, .default_text = "false",
     .help = "Write the result as JSON."},
    {.name = "save-detailed", .commands = kBench, .group = "Result", .type = kFlag, .default_text = "false",
     .help = "Also write every request's lengths, times and error."},
    {.name = "result-dir", .commands = kBench, .group = "Result", .type = kText, .default_text = ".",
     .help = "Directory of the result file."},
    {.name = "result-filename", .commands = kBench, .group = "Result", .type = kText, .default_text = "",
     .help = "Name of the result file; by default made from rate, concurrency, model and time."},
    {.name = "label", .commands = kBench, .group = "Result", .type = kText, .default_text = "",
     .help = "Free text put into the result."},

    // bench throughput, bench latency
    {.name = "input-len", .commands = kThroughput, .group = "Load", .type = kInteger, .default_text = "128",
     .help = "Tokens of a prompt, drawn at random.", .min = 1, .max = 16777216},
    {.name = "input-len", .commands = kLatency, .group = "Load", .type = kInteger, .default_text = "32",
     .help = "Tokens of a prompt, drawn at random.", .min = 1, .max = 16777216},
    {.name = "output-len", .commands = kThroughput, .group = "Load", .type = kInteger, .default_text = "64",
     .help = "Tokens of an answer.", .min = 1, .max = 16777216},
    {.name = "output-len", .commands = kLatency, .group = "Load", .type = kInteger, .default_text = "128",
     .help = "Tokens of an answer.", .min = 1, .max = 16777216},
    {.name = "num-prompts", .commands = kThroughput, .group = "Load", .type = kInteger, .default_text = "100",
     .help = "Number of requests, all submitted at the start.", .min = 1, .max = 1048576},
    {.name = "batch-size", .commands = kLatency, .group = "Load", .type = kInteger, .default_text = "8",
     .help = "Requests of a batch.", .min = 1, .max = 65536},
    {.name = "num-iters-warmup", .commands = kLatency, .group = "Load", .type = kInteger, .default_text = "1",
     .help = "Batches before the measurement.", .min = 0, .max = 10000},
    {.name = "num-iters", .commands = kLatency, .group = "Load", .type = kInteger, .default_text = "5",
     .help = "Batches measured.", .min = 1, .max = 10000},
    {.name = "output-json", .commands = kThroughput | kLatency | kBenchRouter | kBenchKv, .group = "Result", .type = kText,
     .default_text = "", .help = "File for the result as JSON; of engines under vLLM's names."},

    // bench router
    {.name = "model", .commands = kBenchRouter, .group = "Router", .type = kText, .default_text = "",
     .help = "Directory with config.json and the tokenizer that the router uses.", .positional = true},
    {.name = "pairs", .commands = kBenchRouter, .group = "Router", .type = kFlag, .default_text = "false",
     .help = "Prefill and decode workers (push) instead of decode workers alone."},
    {.name = "num-workers", .commands = kBenchRouter, .group = "Router", .type = kInteger, .default_text = "2",
     .help = "Mock workers of each role.", .min = 1, .max = 256},
    {.name = "input-len", .commands = kBenchRouter, .group = "Load", .type = kInteger, .default_text = "32",
     .help = "Words of a prompt.", .min = 1, .max = 1048576},
    {.name = "output-len", .commands = kBenchRouter, .group = "Load", .type = kInteger, .default_text = "16",
     .help = "Tokens of an answer.", .min = 1, .max = 65536},
    {.name = "token-gap-ms", .commands = kBenchRouter, .group = "Load", .type = kNumber, .default_text = "0",
     .help = "Time between two tokens of a mock; with 0 it sends whole answers.", .min = 0, .max = 1000},
    {.name = "duration-s", .commands = kBenchRouter, .group = "Load", .type = kNumber, .default_text = "10",
     .help = "Seconds of the closed loop, of the routed and of the direct Poisson load.", .min = 0.1, .max = 3600},
    {.name = "max-concurrency", .commands = kBenchRouter, .group = "Load", .type = kInteger, .default_text = "64",
     .help = "Connections of the closed loop.", .min = 1, .max = 4096},
    {.name = "request-rate", .commands = kBenchRouter, .group = "Load", .type = kNumber, .default_text = "2500",
     .help = "Requests per second of the Poisson load.", .min = 1, .max = 1000000},
    {.name = "memory-s", .commands = kBenchRouter, .group = "Load", .type = kNumber, .default_text = "0",
     .help = "Seconds of further closed-loop load during which the router's memory is watched.", .min = 0, .max = 86400},
    {.name = "seed", .commands = kBenchRouter, .group = "Load", .type = kInteger, .default_text = "0",
     .help = "Seed of prompts and arrival times.", .min = 0, .max = kMaxInt},

    // bench a2a
    {.name = "all2all-backend", .commands = kBenchA2a, .group = "Lines", .type = kText, .default_text = "all",
     .help = "Way of the rows to their experts, as for serve; all measures each."},
    {.name = "over", .commands = kBenchA2a, .group = "Lines", .type = kText, .default_text = "shm",
     .help = "How ranks reach each other: shm (one host), tcp (several, here over loopback), or both with a comma."},
    {.name = "ranks", .commands = kBenchA2a, .group = "Lines", .type = kText, .default_text = "2,4",
     .help = "Numbers of ranks, each a process of this host, separated by commas."},
    {.name = "tokens", .commands = kBenchA2a, .group = "Lines", .type = kText, .default_text = "1,8,32,128,512",
     .help = "Numbers of rows that each rank brings to a step, separated by commas."},
    {.name = "hidden-size", .commands = kBenchA2a, .group = "Shape", .type = kInteger, .default_text = "2048",
     .help = "Columns of a row.", .min = 1, .max = 65536},
    {.name = "top-k", .commands = kBenchA2a, .group = "Shape", .type = kInteger, .default_text = "8",
     .help = "Experts of a row.", .min = 1, .max = 64},
    {.name = "num-experts", .commands = kBenchA2a, .group = "Shape", .type = kInteger, .default_text = "64",
     .help = "Experts of the layer.", .min = 1, .max = 4096},
    {.name = "dispatch-format", .commands = kBenchA2a, .group = "Shape", .type = kChoice, .default_text = "exact",
     .help = "How rows travel: exact is what products with bfloat16 weights take here.", .choices = "exact|bf16|int8|fp8"},
    {.name = "line-s", .commands = kBenchA2a, .group = "Lines", .type = kNumber, .default_text = "0.5",
     .help = "Seconds of each line.", .min = 0.01, .max = 60},
    {.name = "seed", .commands = kBenchA2a, .group = "Shape", .type = kInteger, .default_text = "0",
     .help = "Seed of the routing, which is uniform.", .min = 0, .max = kMaxInt},
    // bench kv
    {.name = "transports", .commands = kBenchKv, .group = "Lines", .type = kList,
     .default_text = "", .help = "What to measure, as of serve's --kv-transport. Default: shm tcp ucx ucx_tcp."},
    {.name = "block-bytes", .commands = kBenchKv, .group = "Lines", .type = kList,
     .default_text = "", .help = "Sizes of a block in one layer. Default: 4096 16384 65536 262144 1048576."},
    {.name = "num-rounds", .commands = kBenchKv, .group = "Lines", .type = kInteger, .default_text = "5",
     .help = "Rounds, of which the median is reported.", .min = 1, .max = 1000},

    // bench kernels
    {.name = "cpu-isa", .commands = kBenchKernels, .group = "Device", .type = kText, .default_text = "all",
     .help = "Instruction set to measure, as for serve; all measures each that this machine has."},
    {.name = "filter", .commands = kBenchKernels, .group = "Lines", .type = kText, .default_text = "",
     .help = "Measure only the lines whose name contains this text, for example \"linear\"."},
    // quantize
    {.name = "target", .commands = kQuantize, .group = "Model", .type = kText, .default_text = "",
     .help = "Directory to write; it appears when it is complete.", .positional = true},
    {.name = "quantization", .commands = kQuantize, .group = "Model", .type = kChoice, .default_text = "w8a8",
     .help = "Format of the linear layers.", .choices = "wint8|wint4|w8a8|w4a8"},
    {.name = "force", .commands = kQuantize, .group = "Model", .type = kFlag, .default_text = "false",
     .help = "Replace the directory, with everything in it, if it is a model's."},

    // eplb
    {.name = "load", .commands = kEplb, .group = "Load", .type = kText, .default_text = "",
     .help = "File of `tandem serve --record-expert-load`; required."},
    {.name = "phase", .commands = kEplb, .group = "Load", .type = kChoice, .default_text = "both",
     .help = "Which tokens count: a prefill worker computes prompts, a decode worker generated tokens.",
     .choices = "both|prompt|generated"},
    {.name = "ranks", .commands = kEplb, .group = "Group", .type = kInteger, .default_text = "",
     .help = "Ranks that share the experts; not set takes those of --current.", .min = 1, .max = 4096},
    {.name = "nodes", .commands = kEplb, .group = "Group", .type = kInteger, .default_text = "1",
     .help = "Hosts that the ranks are on.", .min = 1, .max = 4096},
    {.name = "groups", .commands = kEplb, .group = "Group", .type = kInteger, .default_text = "1",
     .help = "Groups of experts that the default policy keeps on one node, the model's n_group.", .min = 1, .max = 4096},
    {.name = "redundant", .commands = kEplb, .group = "Group", .type = kInteger, .default_text = "",
     .help = "Slots beyond one per expert, over all ranks; not set takes those of --eplb-config or --current.", .min = 0,
     .max = 16384},
    {.name = "policy", .commands = kEplb, .group = "Placement", .type = kChoice, .default_text = "default",
     .help = "default: DeepSeek's algorithm; swift: few moves; flash: few moves, for loads that vary.",
     .choices = "default|swift|flash"},
    {.name = "eplb-config", .commands = kEplb, .group = "Placement", .type = kObject, .default_text = "",
     .help = "JSON with policy, num_redundant_experts and window_size (last steps of the file that count), instead of the "
             "options; what else a server takes there is checked and has no effect here."},
    {.name = "current", .commands = kEplb, .group = "Placement", .type = kText, .default_text = "",
     .help = "File of the placement to start from; without it experts lie in order."},
    {.name = "model", .commands = kEplb, .group = "Placement", .type = kText, .default_text = "",
     .help = "Directory of the model, to tell how many bytes move."},
    {.name = "output", .commands = kEplb, .group = "Result", .type = kText, .default_text = "",
     .help = "File for the placement as JSON."},
    {.name = "time", .commands = kEplb, .group = "Result", .type = kFlag, .default_text = "false",
     .help = "Also print how long each policy takes, the best of five runs."},

    // sim
    {.name = "seed", .commands = kSim, .group = "Runs", .type = kInteger, .default_text = "1",
     .help = "Seed of the first schedule; the next ones have the numbers after it.", .min = 0, .max = kMaxInt},
    {.name = "runs", .commands = kSim, .group = "Runs", .type = kInteger, .default_text = "1000",
     .help = "Number of schedules.", .min = 1, .max = kMaxInt},
    {.name = "faults", .commands = kSim, .group = "Runs", .type = kText, .default_text = "all",
     .help = "all, none, or rates such as delay=0.3,kill=0.02: of a message (delay, duplicate, lose, drop, damage), of "
             "100 ms (kill, freeze, partition), of a request (cancel)."},
    {.name = "threads", .commands = kSim, .group = "Runs", .type = kInteger, .default_text = "0",
     .help = "Schedules at a time; 0 is one per core.", .min = 0, .max = 1024},
    {.name = "trace", .commands = kSim, .group = "Output", .type = kFlag, .default_text = "false",
     .help = "Print the whole trace: of the failing schedule, or of the only one."},

    // options
    {.name = "markdown", .commands = kOptions, .group = "Output", .type = kFlag, .default_text = "false",
     .help = "Print Markdown tables instead of plain text."},

    // all that serve or measure
    {.name = "config", .commands = kServe | kRoute | kBench, .group = "Configuration", .type = kText,
     .default_text = "", .help = "YAML file with the same option names; the command line wins over it."},
    {.name = "secret-config", .commands = kServe | kRoute, .group = "Configuration", .type = kText, .default_text = "",
     .help = "The same for what must not stand on a command line, which every user of a machine can read: keys. May be "
             "/dev/stdin."},
};
// clang-format on

}  // namespace

std::span<const SubcommandInfo> subcommand_table() { return kSubcommands; }
std::span<const OptionSpec> option_table() { return kTable; }

}  // namespace tandem
