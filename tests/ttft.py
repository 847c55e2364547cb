#!/usr/bin/env python3
"""Time to the first token through prefill and decode workers, beside one process: the same prompts, by turns, unloaded.

    .venv/bin/python tests/ttft.py [--tokens 2000] [--rounds 15] [--threads 1]

Prints the medians, their ratio, and what the split's stages took by the workers' own metrics.
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "e2e"))
from conftest import Launcher  # noqa: E402


def first_token_ms(url, prompt):
    host = url.removeprefix("http://")
    body = {"model": "demo", "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection(host, timeout=60)
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
            took = (time.perf_counter() - begin) * 1000
            break
    response.read()
    connection.close()
    return took


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    launcher = Launcher(Path(tempfile.mkdtemp()))
    try:
        threads = ("--threads", options.threads)
        alone = launcher.serve(*threads)
        workers = launcher.worker("kv_producer", *threads), launcher.worker("kv_consumer", *threads)
        router = launcher.route([workers[0]], [workers[1]], "--enforce-disagg")
        generator = random.Random(1)
        taken = {"alone": [], "split": []}
        for round_number in range(options.rounds + 2):
            turn = (("alone", alone), ("split", router))
            for name, server in turn if round_number % 2 else reversed(turn):
                prompt = [generator.randrange(300, 4000) for _ in range(options.tokens)]
                took = first_token_ms(server.url, prompt)
                if round_number >= 2:  # the first ones grow buffers and connections
                    taken[name].append(took)
        ratios = [split / alone_ for split, alone_ in zip(taken["split"], taken["alone"])]
        medians = {name: statistics.median(values) for name, values in taken.items()}
        print(f"{options.tokens} tokens, {options.threads} thread(s), {options.rounds} rounds: one process "
              f"{medians['alone']:.1f} ms, split {medians['split']:.1f} ms; median of the rounds' ratios "
              f"{statistics.median(ratios):.3f}, of medians {medians['split'] / medians['alone']:.3f}")
    finally:
        launcher.stop()


if __name__ == "__main__":
    main()
