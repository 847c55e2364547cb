"""Recorded expert loads and the placements computed from them: real server, real file, real command."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import DEMO, TANDEM, http_json

LAYERS, EXPERTS, TOP_K = [1, 2, 3, 4], 16, 4


def complete(server, prompt, max_tokens=16):
    status, answer = http_json(server.url + "/v1/completions", {
        "model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "logprobs": 1, "return_token_ids": True})
    assert status == 200, answer
    choice = answer["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def prompts(count):
    return [[(37 * i + 11 * j) % 3000 + 300 for j in range(20 + 3 * i)] for i in range(count)]


def eplb(*arguments):
    done = subprocess.run([str(TANDEM), "eplb", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr.strip().splitlines()


def sum_counts(records, phase):
    return [[sum(record[phase][layer][expert] for record in records) for expert in range(EXPERTS)]
            for layer in range(len(LAYERS))]


@pytest.fixture(scope="module")
def recorded(launcher, tmp_path_factory):
    """(file, answers, what /expert_load said) of some requests."""
    path = tmp_path_factory.mktemp("load") / "load.jsonl"
    server = launcher.serve("--record-expert-load", path, "--record-expert-load-interval-s", 0.1,
                            "--no-enable-prefix-caching")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: complete(server, prompt), prompts(12)))
    status, shown = http_json(server.url + "/expert_load")
    assert status == 200
    assert server.metric("tandem:expert_load_tokens_total", phase="generated") == 12 * 15 * TOP_K * len(LAYERS)
    assert 0 < server.metric("tandem:expert_load_balance", phase="prompt", layers="worst") < 1
    server.stop()
    return path, answers, shown


def test_every_token_is_counted_once(recorded):
    path, _, shown = recorded
    header, *records = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {"format": "tandem-expert-load", "version": 1, "model": "demo", "layers": LAYERS,
                      "num_experts": EXPERTS, "experts_per_token": TOP_K}
    expected = {"prompt": sum(map(len, prompts(12))), "generated": 12 * 15}  # nobody computes the last token
    for phase, tokens in expected.items():
        counts = sum_counts(records, phase)
        assert [sum(layer) for layer in counts] == [tokens * TOP_K] * len(LAYERS)
        assert shown["window"][phase]["tokens"] == counts
    assert [record["time_s"] for record in records] == sorted(record["time_s"] for record in records)


def test_recording_changes_no_answer(launcher, recorded):
    server = launcher.serve()
    assert [complete(server, prompt) for prompt in prompts(12)] == recorded[1]
    status, answer = http_json(server.url + "/expert_load")
    assert status == 404 and "--record-expert-load" in answer["error"]["message"]


def overall(output):
    line = next(line for line in output.splitlines() if line.split()[:1] == ["overall"])
    return [float(value) for value in line.split()[1:]]


@pytest.mark.parametrize("policy", ["default", "swift", "flash"])
def test_placement_from_the_record(recorded, tmp_path, policy):
    out = tmp_path / "placement.json"
    arguments = ["--load", recorded[0], "--ranks", 4, "--redundant", 4, "--policy", policy, "--output", out]
    code, output, errors = eplb(*arguments, "--model", DEMO)
    assert code == 0, errors
    before, after = overall(output)
    assert before < 0.9 < after
    assert "96.0 KiB an expert" in output  # 3 x 256 x 64 bf16
    placement = json.loads(out.read_text())
    assert placement["layers"] == LAYERS and placement["slots_per_rank"] == 5
    for slots in placement["slots"]:
        assert len(slots) == 20 and set(slots) == set(range(EXPERTS))
    # The same file gives the same placement, and from there the balance is what it was.
    assert eplb(*arguments)[0] == 0 and json.loads(out.read_text()) == placement
    code, output, errors = eplb("--load", recorded[0], "--current", out, "--policy", policy,
                                "--eplb-config.window_size", 10**6)
    assert code == 0, errors
    assert overall(output)[0] == after


@pytest.mark.parametrize("damage,options,words", [
    (None, ["--ranks", 3], ["--redundant", "3 ranks", "2 redundant"]),
    (None, ["--ranks", 32], ["32 ranks", "16 slots"]),
    (None, [], ["--ranks is missing"]),
    (None, ["--ranks", 4, "--eplb-config.policy", "fast"], ["policy", "fast", "swift"]),
    (None, ["--ranks", 4, "--eplb-config.window", 5], ["'window'", "window_size"]),
    (None, ["--ranks", 4, "--current", "/nonexistent"], ["/nonexistent"]),
    (lambda text: text[:-20], ["--ranks", 4], ["load.jsonl", "cut off"]),
    (lambda text: text.replace('"prompt":[[', '"prompt":[[-1,', 1), ["--ranks", 4], [":2:", "17 values"]),
    (lambda text: text.replace('"prompt":[[', '"prompt":[[NaN,', 1), ["--ranks", 4], [":2:", "not valid JSON"]),
    (lambda text: "", ["--ranks", 4], ["empty"]),
    (lambda text: text.splitlines()[0] + "\n", ["--ranks", 4], ["no tokens"]),
])
def test_refusals_are_one_line(recorded, tmp_path, damage, options, words):
    path = recorded[0]
    if damage is not None:
        path = tmp_path / "load.jsonl"
        path.write_text(damage(recorded[0].read_text()))
    code, _, errors = eplb("--load", path, *options)
    assert code in (1, 2) and len(errors) == 1, errors
    for word in words:
        assert word in errors[0], errors


@pytest.mark.parametrize("strategy", ["uniform_random", "zipf:0.6", "balanced"])
def test_simulated_routing_is_exact(launcher, tmp_path, strategy):
    path = tmp_path / "load.jsonl"
    together = launcher.serve("--moe-routing-simulation", strategy, "--record-expert-load", path)
    alone = launcher.serve("--moe-routing-simulation", strategy, "--max-num-seqs", 1, "--max-num-batched-tokens", 7)
    assert "routers are simulated" in together.read_log()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: complete(together, prompt), prompts(6)))
    assert [complete(alone, prompt) for prompt in prompts(6)] == answers
    together.stop()
    if strategy == "balanced":
        records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        for layer in sum_counts(records, "prompt"):
            assert max(layer) - min(layer) <= 6  # each prompt fills the last round by itself


def test_unknown_simulation_is_refused():
    done = subprocess.run([str(TANDEM), "serve", str(DEMO), "--moe-routing-simulation", "zipf"], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and "zipf:ALPHA" in done.stderr.splitlines()[-1]
