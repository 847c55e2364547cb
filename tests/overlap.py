#!/usr/bin/env python3
"""What --enable-dbo changes between two nodes, here two network namespaces joined by a veth pair or by a line with a delay:
two groups of a rank on each, one of them with it, do the same work by turns. Needs root.

    .venv/bin/python tests/overlap.py [--delay-ms 0] [--rows 32] [--prompt 0] [--steps 100] [--turns 5]

Without --prompt all rows of a step are generated (DecodeBenchConnector), --rows of each rank; with --prompt N prompts of N
tokens are computed in chunks of --rows. Shown are the steps with all rows, as the ranks' engines timed them (GET /steps).
"""

import argparse
import ctypes
import json
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "e2e"))
sys.path.insert(0, str(Path(__file__).parent))
from conftest import TANDEM, http_json, wait_until  # noqa: E402
from steps import read_steps, write_model  # noqa: E402

NAMES, DEVICES, ADDRESSES = ("tandem-o1", "tandem-o2"), ("tandem-v1", "tandem-v2"), ("10.83.0.1", "10.83.0.2")
CLONE_NEWNET = 0x40000000


class Rank:
    def __init__(self, node, port, log, model, *options):
        self.url = f"http://{ADDRESSES[node]}:{port}"
        self.log = open(log, "w")
        command = ["ip", "netns", "exec", NAMES[node], TANDEM, "serve", model, "--served-model-name", "demo", "--host",
                   ADDRESSES[node], "--port", port, "--data-parallel-size", 2, "--data-parallel-rank", node,
                   "--enable-expert-parallel", "--data-parallel-address", ADDRESSES[0], "--threads", 1, *options]
        self.popen = subprocess.Popen([str(word) for word in command], stdout=self.log, stderr=self.log)

    def is_ready(self):
        return http_json(self.url + "/health", timeout=2)[0] == 200

    def stop(self):
        self.popen.terminate()
        self.popen.wait()


def connect_nodes(delay_ms):
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "netns", "add", name], check=True)
    line = None
    if delay_ms > 0:
        line = subprocess.Popen([sys.executable, Path(__file__).parent / "e2e" / "delayed_link.py", NAMES[0], DEVICES[0],
                                 NAMES[1], DEVICES[1], str(delay_ms)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        line.stdout.readline()
    else:
        subprocess.run(["ip", "link", "add", DEVICES[0], "netns", NAMES[0], "type", "veth", "peer", "name", DEVICES[1],
                        "netns", NAMES[1]], check=True)
    for name, address, device in zip(NAMES, ADDRESSES, DEVICES):
        for words in (["addr", "add", f"{address}/24", "dev", device], ["link", "set", device, "up"],
                      ["link", "set", "lo", "up"]):
            subprocess.run(["ip", "-n", name, *words], check=True)
    with open(f"/var/run/netns/{NAMES[0]}") as target:  # this process asks from the first node
        assert ctypes.CDLL(None).setns(target.fileno(), CLONE_NEWNET) == 0
    return line


def start_group(folder, number, model, options, *extra):
    shared = ["--load-format", "dummy", "--max-num-seqs", max(8, options.rows), "--max-num-batched-tokens",
              max(64, options.rows), "--max-model-len", 4096, "--num-gpu-blocks-override", 258 * max(8, options.rows) // 4,
              "--data-parallel-rpc-port", 17000 + number, "--no-enable-prefix-caching", "--all2all-backend", options.backend,
              *extra]
    if options.prompt == 0:
        shared += ["--kv-transfer-config", '{"kv_connector":"DecodeBenchConnector","kv_role":"kv_both"}']
    ranks = [Rank(node, 17100 + 10 * number + node, folder / f"{number}-{node}.log", model, *shared) for node in (0, 1)]
    wait_until(lambda: all(rank.is_ready() for rank in ranks), 120, "the group stands")
    return ranks


def work(ranks, options, seed):
    selector = selectors.DefaultSelector()
    requests = options.rows if options.prompt == 0 else max(1, options.steps * options.rows // options.prompt)
    length, tokens = (64, options.steps) if options.prompt == 0 else (options.prompt, 1)
    for number in range(2 * requests):
        host, port = ranks[number % 2].url.removeprefix("http://").split(":")
        body = json.dumps({"model": "demo", "prompt": [(seed * 31 + number * 97 + i * 13) % 2000 for i in range(length)],
                           "max_tokens": tokens, "temperature": 0, "ignore_eos": True}).encode()
        connection = socket.create_connection((host, int(port)))
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                           b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        selector.register(connection, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            if not key.fileobj.recv(1 << 16):
                selector.unregister(key.fileobj)
                key.fileobj.close()


def take_turn(ranks, options, seed):
    last = max((step["round"] for step in read_steps(ranks[0])), default=0)
    work(ranks, options, seed)
    full = [{step["round"]: step for step in read_steps(rank) if step["round"] > last and step["rows"] == options.rows}
            for rank in ranks]
    return [full[0][number]["total_us"] / 1000 for number in full[0].keys() & full[1].keys()]


def main():
    parser = argparse.ArgumentParser()
    for name, default in {"rows": 32, "prompt": 0, "steps": 100, "turns": 5, "layers": 4, "hidden": 1024, "width": 512,
                          "experts": 64}.items():
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--delay-ms", type=float, default=0)
    parser.add_argument("--backend", default="low_latency")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    model = write_model(folder / "model", options)
    line, ranks = connect_nodes(options.delay_ms), []
    try:
        groups = {"whole steps": start_group(folder, 0, model, options)}
        ranks += groups["whole steps"]
        groups["two parts"] = start_group(folder, 1, model, options, "--enable-dbo", "--dbo-decode-token-threshold", 2,
                                          "--dbo-prefill-token-threshold", 2)
        ranks += groups["two parts"]
        medians = {name: [] for name in groups}
        for turn in range(options.turns + 1):
            for name, group in groups.items():
                times = take_turn(group, options, turn)
                if turn > 0:  # the first one grows buffers
                    medians[name].append(statistics.median(times))
        ratios = [two / whole for whole, two in zip(*medians.values())]
        print(f"{options.backend}, {options.rows} rows of a rank, {options.prompt or 'no'} prompt tokens, delay "
              f"{options.delay_ms} ms: " + ", ".join(f"{name} {statistics.median(times):.2f} ms" for name, times in
                                                     medians.items()) +
              f"; medians of the {options.turns} turns' ratios {statistics.median(ratios):.3f} "
              f"({min(ratios):.3f} … {max(ratios):.3f})")
    finally:
        for rank in ranks:
            rank.stop()
        if line is not None:
            line.stdin.close()
            line.wait()
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


if __name__ == "__main__":
    main()
