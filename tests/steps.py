#!/usr/bin/env python3
"""How even the steps of a rank group are while experts move: a steady decode load on two groups by turns, one of them with
EPLB, and the steps as the ranks' own engines timed them (GET /steps).

    .venv/bin/python tests/steps.py [--ranks 4] [--streams 4] [--steps 700] [--turns 3] [--worst 5]
    .venv/bin/python tests/steps.py --ranks 8 --against-ranks 2 --streams 16: two groups of unlike size with the same load

Prompts cost nothing here (DecodeBenchConnector), so every step generates one token of every stream. A step lasts from its
planning until its tokens are handed out, with all waits for other ranks. What is shown is of all ranks' steps together.
"""

import argparse
import json
import os
import selectors
import socket
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "e2e"))
from conftest import Launcher, free_port, http_json, wait_all_ready  # noqa: E402

control_groups = []
SETTLE = 20  # first and last steps of a turn that are left out


def write_model(folder, options):
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": options.hidden,
        "num_hidden_layers": options.layers, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "intermediate_size": options.hidden, "moe_intermediate_size": options.width, "num_experts": options.experts,
        "num_experts_per_tok": options.top_k, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 8192, "vocab_size": 2048,
        "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": 2046, "eos_token_id": 2047}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start_group(launcher, model, options, eplb, count, streams):
    port = free_port(count)
    coordinator = free_port()
    shared = ["--load-format", "dummy", "--threads", 1, "--max-num-seqs", streams, "--max-num-batched-tokens",
              max(64, streams), "--max-model-len", 4096, "--num-gpu-blocks-override",
              streams * 258, "--kv-transfer-config", '{"kv_connector":"DecodeBenchConnector","kv_role":"kv_both"}',
              "--moe-routing-simulation", f"zipf:{options.zipf}", "--data-parallel-size", count,
              "--enable-expert-parallel", "--data-parallel-rpc-port", coordinator]
    if eplb:
        shared += ["--enable-eplb", "--eplb-config", json.dumps({
            "window_size": options.interval, "step_interval": options.interval, "policy": options.policy,
            "num_redundant_experts": options.redundant, "log_balancedness": True})]
    ranks = [launcher.serve(*shared, "--data-parallel-rank", rank, model=model, port=port + rank, wait=False)
             for rank in range(count)]
    wait_all_ready(ranks, 120)
    for number, rank in enumerate(ranks):
        if options.cores:
            limit_cores(f"tandem-{os.getpid()}-{count}{'-eplb' if eplb else ''}-{number}", rank.popen.pid, options.cores)
    return ranks


def limit_cores(name, pid, cores):
    """By a control group, of version 1 or 2, that ends with the machine's next start at the latest."""
    is_v1 = os.path.isdir("/sys/fs/cgroup/cpu")
    group = Path("/sys/fs/cgroup/cpu" if is_v1 else "/sys/fs/cgroup") / name
    group.mkdir()
    period_us = 5_000  # short beside a step
    if is_v1:
        (group / "cpu.cfs_period_us").write_text(str(period_us))
        (group / "cpu.cfs_quota_us").write_text(str(int(cores * period_us)))
    else:
        (group / "cpu.max").write_text(f"{int(cores * period_us)} {period_us}")
    (group / "cgroup.procs").write_text(str(pid))
    control_groups.append(group)


def generate(ranks, streams, tokens, seed):
    """Streams answers from every rank at once; what comes is not looked at, so that it costs little."""
    selector = selectors.DefaultSelector()
    for number in range(len(ranks) * streams):
        host, port = ranks[number % len(ranks)].url.removeprefix("http://").split(":")
        body = json.dumps({"model": "demo", "prompt": [(seed * 31 + number * 97 + i * 13) % 2000 for i in range(64)],
                           "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}).encode()
        connection = socket.create_connection((host, int(port)))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                           b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, b"")
    tails = []
    while selector.get_map():
        for key, _ in selector.select():
            piece = key.fileobj.recv(1 << 16)
            if piece:
                selector.modify(key.fileobj, selectors.EVENT_READ, (key.data + piece)[-64:])
                continue
            tails.append(key.data)
            selector.unregister(key.fileobj)
            key.fileobj.close()
    assert all(b"[DONE]" in tail for tail in tails), tails


def read_steps(rank):
    status, answer = http_json(rank.url + "/steps")
    assert status == 200, answer
    return [dict(zip(answer["columns"], step)) for step in answer["steps"]]


def take_turn(ranks, options, streams, seed):
    """The rounds of one turn, each a list of the ranks' steps."""
    last = max((step["round"] for step in read_steps(ranks[0])), default=0)
    generate(ranks, streams, options.steps + 2 * SETTLE, seed)
    by_round = {}
    for number, rank in enumerate(ranks):
        for step in read_steps(rank):
            if step["round"] > last:
                by_round.setdefault(step["round"], []).append({**step, "rank": number})
    rounds = [by_round[number] for number in sorted(by_round)]
    # All streams are in every step: none begins or ends.
    steady = [steps for steps in rounds
              if len(steps) == len(ranks) and all(step["rows"] == streams for step in steps)]
    if len(steady) <= 2 * SETTLE:
        sys.exit(f"{len(steady)} of {len(rounds)} rounds had all {streams} streams of each rank: with so many "
                 f"streams, which take time to begin, --steps {options.steps} is too few")
    return steady[SETTLE:-SETTLE]


def moves(steps):
    return any(step["ride_bytes"] > 0 for step in steps)


def show(name, rounds, worst):
    times = sorted(step["total_us"] / 1000 for steps in rounds for step in steps)
    if not times:
        print(f"{name:>24}: no steps")
        return
    median = statistics.median(times)
    at = lambda share: times[min(len(times) - 1, int(share * len(times)))]  # noqa: E731
    slow = sum(any(step["total_us"] / 1000 > 2 * median for step in steps) for steps in rounds)
    print(f"{name:>24}: {len(rounds):5} steps, median {median:6.2f} ms, p90 {at(0.9):6.2f}, p99 {at(0.99):6.2f}, "
          f"p99.9 {at(0.999):6.2f}, max {times[-1]:6.2f} = {times[-1] / median:.2f} x median; {slow} above 2 x")
    for steps in sorted(rounds, key=lambda steps: -max(step["total_us"] for step in steps))[:worst]:
        print(f"    round {steps[0]['round']}: " + "; ".join(
            f"{step['total_us'] / 1000:.1f} (wait {step['wait_us'] / 1000:.1f}, ride {step['ride_us'] / 1000:.1f} for "
            f"{step['ride_bytes'] >> 10} KiB, compute {step['compute_us'] / 1000:.1f})" for step in steps))


def main():
    parser = argparse.ArgumentParser()
    for name, default in {"ranks": 4, "streams": 4, "steps": 700, "turns": 3, "worst": 5, "interval": 200, "layers": 4,
                          "redundant": 8, "hidden": 1024, "width": 512, "experts": 64, "top-k": 8}.items():
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--cores", type=float, help="hold each rank to this share of a core, as if it had a machine of its own")
    parser.add_argument("--against-ranks", type=int, help="no EPLB, but a group of so many ranks with as many streams in all")
    parser.add_argument("--policy", default="default")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--logs", default=None)
    options = parser.parse_args()
    folder = Path(options.logs or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    launcher = Launcher(folder)
    try:
        model = write_model(folder / "model", options)
        sizes = [options.ranks, options.against_ranks or options.ranks]
        streams = [options.streams * options.ranks // size for size in sizes]
        names = [f"{size} ranks" for size in sizes] if options.against_ranks else ["with EPLB", "without"]
        groups = {name: start_group(launcher, model, options, name == "with EPLB", size, of_rank)
                  for name, size, of_rank in zip(names, sizes, streams)}
        rounds = {name: [] for name in groups}
        rates = {name: [] for name in groups}
        for turn in range(options.turns):
            for (name, ranks), of_rank in zip(groups.items(), streams):
                found = take_turn(ranks, options, of_rank, turn)
                rounds[name] += found
                mean_s = statistics.mean(step["total_us"] for steps in found for step in steps) / 1e6
                rates[name].append(len(ranks) * of_rank / mean_s)
        for name in names:
            show(name, rounds[name], options.worst)
        for name, of_turns in rates.items():
            print(f"{name}: tokens/s turn by turn: " + ", ".join(f"{rate:.0f}" for rate in of_turns))
        print(f"{' / '.join(names)}, turn by turn: " + ", ".join(
            f"{one / other:.2f}" for one, other in zip(*rates.values())))
        if options.against_ranks:
            return
        show("with EPLB, moving", [steps for steps in rounds["with EPLB"] if moves(steps)], options.worst)
        show("with EPLB, not moving", [steps for steps in rounds["with EPLB"] if not moves(steps)], options.worst)
        balance = groups["with EPLB"][0].metric("tandem:eplb_balancedness", placement="measured", layers="overall")
        print(f"balancedness of the last window: {balance:.2f}")
        moved = sum(rank.metric("tandem:eplb_moved_experts_total") for rank in groups["with EPLB"])
        print(f"experts moved: {moved:.0f}, rebalances: "
              f"{groups['with EPLB'][0].metric('tandem:eplb_rebalances_total'):.0f}")
    finally:
        launcher.stop()
        for group in control_groups:
            group.rmdir()


if __name__ == "__main__":
    main()
