"""Experts that move between ranks while requests run: what is shown of them, formats of weights, and roles apart."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import free_port, http_json, wait_all_ready
from test_eplb import EXPERTS, LAYERS, TOP_K, sum_counts
from test_ranks import PROMPTS, external_rank, rank_metric, rank_urls, start_ranks
from test_topologies import ask, expected  # noqa: F401 (a fixture)


def eplb(**changes):
    config = {"window_size": 16, "step_interval": 24, "num_redundant_experts": 8, **changes}
    return ["--enable-eplb", "--eplb-config", json.dumps(config)]


def ask_some(url, count=len(PROMPTS)):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda item: ask(url, *item), enumerate(PROMPTS[:count])))


def load_of(url):
    status, answer = http_json(url + "/expert_load")
    assert status == 200, answer
    return answer


def test_the_load_of_a_group_is_shown(launcher, expected):  # noqa: F811
    server = start_ranks(launcher, 4, *eplb(log_balancedness=True))
    urls = rank_urls(server)
    status, answer = http_json(server.url + "/expert_load")
    assert status == 503 and "rank 0" in answer["error"]["message"], "nothing has been counted yet"
    for _ in range(2):
        assert ask_some(server.url) == expected[:len(PROMPTS)]
    shown = load_of(server.url)
    assert shown == load_of(urls["0"]) | {"model": shown["model"]}
    assert (shown["layers"], shown["num_experts"], shown["experts_per_token"]) == (LAYERS, EXPERTS, TOP_K)
    group = shown["group"]
    assert (group["num_ranks"], group["num_nodes"], group["slots_per_rank"]) == (4, 1, 6)
    assert not group["hierarchical"] and group["changes"] >= 4 and 0 < group["steps"] <= 16
    # Layer x rank x expert: every expert is there, and what its slots carry is what its rank carries.
    for layer in range(len(LAYERS)):
        assert {expert for rank in group["experts"][layer] for expert in rank} == set(range(EXPERTS))
        for rank in range(4):
            assert len(group["experts"][layer][rank]) == len(group["tokens"][layer][rank]) == 6
            assert sum(group["tokens"][layer][rank]) == pytest.approx(group["rank_tokens"][layer][rank], abs=0.6)
        loads = group["rank_tokens"][layer]
        assert group["balance"]["layers"][layer] == pytest.approx(sum(loads) / 4 / max(loads), abs=0.01)
    assert len({round(sum(loads)) for loads in group["rank_tokens"]}) == 1, "all layers saw the same rows"
    assert group["balance"]["worst"] == min(group["balance"]["layers"])
    assert group["planned"]["overall"] > 0.9
    for series in ('tandem:eplb_balancedness{placement="measured",layers="p99"}',
                   'tandem:eplb_balancedness{placement="planned",layers="worst"}',
                   f'tandem:eplb_layer_balancedness{{layer="{LAYERS[-1]}"}}', 'tandem:eplb_rank_tokens{rank="3"}'):
        assert series in http_json(urls["0"] + "/metrics")[1]
    status, answer = http_json(urls["2"] + "/expert_load")
    assert status == 503 and "rank 0" in answer["error"]["message"]
    server.stop()


def test_a_group_that_counts_nothing_says_so(launcher):
    server = start_ranks(launcher, 2)
    status, answer = http_json(server.url + "/expert_load")
    assert status == 404 and "--enable-eplb" in answer["error"]["message"]
    server.stop()


@pytest.mark.parametrize("quantization", ["w8a8", "wint8", "wint4", "w4a8"])
def test_scales_move_with_their_experts(launcher, quantization):
    alone = launcher.serve("--quantization", quantization)
    wanted = ask_some(alone.url, 24)
    alone.stop()
    server = start_ranks(launcher, 4, "--quantization", quantization, "--max-num-batched-tokens", 64, *eplb())
    for _ in range(2):
        assert ask_some(server.url, 24) == wanted
    assert rank_metric(server, "tandem:eplb_rebalances_total") >= 2
    assert rank_metric(server, "tandem:eplb_moved_experts_total") >= 8
    server.stop()


def read_counts(path, phase):
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return sum(map(sum, sum_counts(records, phase)))


def test_prefill_and_decode_count_apart(launcher, expected, tmp_path):  # noqa: F811
    def group(role):
        meeting, kv_port = free_port(), free_port(count=2)  # each rank adds its number
        config = json.dumps({"kv_connector": "UcxConnector", "kv_role": role, "kv_port": kv_port})
        return [external_rank(launcher, 2, rank, meeting, "--kv-transfer-config", config, "--no-enable-prefix-caching",
                              "--max-num-batched-tokens", 32, "--max-num-seqs", 32,  # more steps
                              "--record-expert-load", tmp_path / f"{role}.{rank}", *eplb(num_redundant_experts=4))
                for rank in range(2)]

    prefill, decode = group("kv_producer"), group("kv_consumer")
    wait_all_ready(prefill + decode)
    router = launcher.route(prefill, decode, "--enforce-disagg")
    for _ in range(2):
        assert ask_some(router.url) == expected[:len(PROMPTS)]
    placements = []
    for ranks in (prefill, decode):
        report = load_of(ranks[0].url)["group"]
        assert report["changes"] > 0, "both groups have balanced themselves"
        placements.append(report["experts"])
    assert placements[0] != placements[1], "each by its own counts"
    for process in [router, *prefill, *decode]:
        process.stop()
    counted = {(role, phase): sum(read_counts(tmp_path / f"{role}.{rank}", phase) for rank in range(2))
               for role in ("kv_producer", "kv_consumer") for phase in ("prompt", "generated")}
    slots = TOP_K * len(LAYERS)
    assert counted["kv_producer", "prompt"] == 2 * sum(len(prompt) for prompt in PROMPTS) * slots
    assert counted["kv_producer", "generated"] == 0
    assert counted["kv_consumer", "prompt"] == 0
    assert counted["kv_consumer", "generated"] > 0
