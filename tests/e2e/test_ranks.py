"""Several ranks with the experts spread over them answer exactly as one process does, and survive the loss of a rank."""

import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import free_port, http_json, wait_all_ready, wait_until
from prompts import make_prompts
from test_topologies import ask, ask_all, body_of, read_answer

PROMPTS = make_prompts(40)
BACKENDS = ["naive", "allgather_reducescatter", "high_throughput", "low_latency"]


@pytest.fixture(scope="module")
def expected(launcher):
    alone = launcher.serve("--no-enable-prefix-caching", "--max-num-seqs", 1)
    answers = ask_all(alone.url, 1)
    alone.stop()
    return answers


def start_ranks(launcher, size, *options):
    return launcher.serve("--data-parallel-size", size, "--enable-expert-parallel", "--threads", 1,
                          "--num-gpu-blocks-override", 600, *options)


def rank_pids(server):
    """The present process of each rank, from the launcher's log."""
    found = {}
    for rank, pid in re.findall(r"rank (\d+) started, pid (\d+)", server.read_log()):
        found[int(rank)] = int(pid)
    return found


def cpu_seconds(pid):
    """Of all threads, to the nanosecond."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/schedstat") as stat:
            total += int(stat.read().split()[0])
    return total / 1e9


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_ranks_answer_as_one(launcher, expected, backend):
    server = start_ranks(launcher, 4, "--all2all-backend", backend, "--max-num-batched-tokens", 64)
    with ThreadPoolExecutor(12) as pool:  # mixed: long prompts in chunks beside answers, some ranks with nothing to do
        answers = list(pool.map(lambda item: ask(server.url, *item), enumerate(PROMPTS)))
    assert answers == expected[:len(PROMPTS)]
    # One rank is busy and three are idle.
    for index in (1, 2, 5):
        assert ask(server.url, index, PROMPTS[index]) == expected[index]
    server.stop()


@pytest.mark.parametrize("row_format", ["int8", "fp8"])
def test_rounded_rows_answer_alike_everywhere(launcher, expected, row_format):
    """By other backends and with other numbers of ranks."""
    seen = []
    for size, backend in ((4, "low_latency"), (2, "high_throughput")):
        server = start_ranks(launcher, size, "--all2all-backend", backend, "--dispatch-format", row_format)
        with ThreadPoolExecutor(8) as pool:
            seen.append(list(pool.map(lambda item: ask(server.url, *item), enumerate(PROMPTS[:16]))))
        server.stop()
    assert seen[0] == seen[1]
    assert seen[0] != expected[:16]  # they were rounded


def test_eight_ranks_answer_as_one(launcher, expected):
    server = start_ranks(launcher, 8)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda item: ask(server.url, *item), enumerate(PROMPTS)))
    assert answers == expected[:len(PROMPTS)]
    server.stop()


def test_all_ranks_take_requests_and_hold_their_share(launcher):
    server = start_ranks(launcher, 4)
    log = server.read_log()
    for rank in range(4):
        assert re.search(rf"rank {rank} of 4: experts {4 * rank} … {4 * rank + 3} of 16", log), log
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: ask(server.url, *item), enumerate(PROMPTS[:24])))
    for url in set(re.findall(r"serving demo on (http://127.0.0.1:\d+)\n", server.read_log())):
        assert rank_requests(url) > 0, url
    server.stop()


def test_a_request_may_name_its_rank(launcher, expected):
    server = start_ranks(launcher, 3)
    body = body_of(0, PROMPTS[0])
    before = {rank: rank_requests(url) for rank, url in rank_urls(server).items()}
    for _ in range(5):
        status, answer = http_json(server.url + "/v1/completions", body, {"X-Data-Parallel-Rank": "2"})
        assert status == 200 and read_answer(answer) == expected[0]
    after = {rank: rank_requests(url) for rank, url in rank_urls(server).items()}
    assert {rank: after[rank] - before[rank] for rank in after} == {"0": 0, "1": 0, "2": 5}
    status, answer = http_json(server.url + "/v1/completions", body, {"X-Data-Parallel-Rank": "3"})
    assert status == 400 and "0 … 2" in answer["error"]["message"]
    server.stop()


def rank_urls(server):
    # The log names the endpoint of every rank; the last ones are those that live.
    return dict(re.findall(r"rank(\d+) \[serve\] serving demo on (http://\S+)", server.read_log()))


def rank_requests(url):
    status, text = http_json(url + "/metrics")
    assert status == 200
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
               if line.startswith("vllm:request_success_total{"))


def test_an_idle_group_sleeps(launcher):
    server = start_ranks(launcher, 4)
    ask(server.url, 0, PROMPTS[0])
    time.sleep(1)
    pids = list(rank_pids(server).values())
    assert len(pids) == 4
    before = sum(map(cpu_seconds, pids))
    time.sleep(5)
    used = sum(map(cpu_seconds, pids)) - before
    assert used < 0.05, f"{used:.3f} s of CPU in 5 s"  # 1 % of a core
    server.stop()


def rank_transfers(url):
    status, text = http_json(url + "/metrics")
    assert status == 200
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
               if line.startswith("tandem:kv_transfers_total{") and 'outcome="received"' in line)


EPLB = ["--enable-eplb", "--eplb-config", json.dumps({"window_size": 16, "step_interval": 24, "policy": "default",
                                                      "num_redundant_experts": 8, "log_balancedness": True})]


def rank_metric(server, name):
    total = 0.0
    for url in rank_urls(server).values():
        status, text = http_json(url + "/metrics")
        assert status == 200
        total += sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((name + " ", name + "{")))
    return total


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_that_move_change_no_answer(launcher, expected, backend):
    server = start_ranks(launcher, 4, "--all2all-backend", backend, "--max-num-batched-tokens", 64, *EPLB)
    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda item: ask(server.url, *item), enumerate(PROMPTS)))
        assert answers == expected[:len(PROMPTS)]
    assert rank_metric(server, "tandem:eplb_rebalances_total") >= 1
    assert rank_metric(server, "tandem:eplb_moved_experts_total") >= 8
    server.stop()


DBO = ["--enable-dbo", "--dbo-decode-token-threshold", 2, "--dbo-prefill-token-threshold", 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_in_two_parts_change_no_answer(launcher, expected, backend):
    """Beside experts that move, with chunks that are cut in their middle."""
    server = start_ranks(launcher, 4, "--all2all-backend", backend, "--max-num-batched-tokens", 64, *DBO, *EPLB)
    for _ in range(2):
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda item: ask(server.url, *item), enumerate(PROMPTS)))
        assert answers == expected[:len(PROMPTS)]
    steps = rank_metric(server, "tandem:group_rounds_total") / 4
    split = rank_metric(server, "tandem:group_split_rounds_total") / 4
    assert steps / 10 < split < steps  # ranks with few rows keep all from it
    server.stop()


def test_a_rank_that_comes_back_takes_up_the_moved_experts(launcher, expected):
    server = start_ranks(launcher, 3, "--rank-timeout", 2, "--enable-eplb", "--eplb-config",
                         json.dumps({"window_size": 16, "step_interval": 40, "num_redundant_experts": 2}))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: ask(server.url, *item), enumerate(PROMPTS)))
    assert rank_metric(server, "tandem:eplb_moved_experts_total") >= 3
    os.kill(rank_pids(server)[2], signal.SIGKILL)
    wait_until(lambda: health(server)[0] == 503, 5, "the loss is told")
    wait_until(lambda: health(server)[0] == 200, 30, "the group stands again")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda item: ask(server.url, *item), enumerate(PROMPTS)))
    assert answers == expected[:len(PROMPTS)]
    assert "experts again, to hold those that the group expects" in server.read_log()
    server.stop()


class Stream(threading.Thread):
    """One streamed answer of `max_tokens` tokens."""

    def __init__(self, url, index, max_tokens):
        super().__init__()
        self.url, self.index, self.max_tokens = url, index, max_tokens
        self.answer = None
        self.start()

    def run(self):
        body = body_of(self.index, PROMPTS[self.index]) | {"max_tokens": self.max_tokens}
        self.answer = http_json(self.url + "/v1/completions", body, timeout=90)


def health(server):
    return http_json(server.url + "/health", timeout=5)


def names_rank(server, rank):
    status, body = health(server)
    return status == 503 and f"rank {rank} " in json.dumps(body)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_rank_costs_no_answer(launcher, how):
    max_tokens = 150
    alone = launcher.serve()
    wanted = [http_json(alone.url + "/v1/completions", body_of(i, PROMPTS[i]) | {"max_tokens": max_tokens})
              for i in range(8)]
    alone.stop()
    server = start_ranks(launcher, 3, "--rank-timeout", 2)
    streams = [Stream(server.url, i, max_tokens) for i in range(8)]
    time.sleep(0.3)
    pid = rank_pids(server)[1]
    lost_at = time.time()
    os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    wait_until(lambda: names_rank(server, 1), 4, "the loss of rank 1 is told")
    assert time.time() - lost_at < (1 if how == "killed" else 3)
    assert health(server)[1]["status"].startswith("degraded")
    if how == "stopped":
        time.sleep(1)
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: health(server)[0] == 200, 30, "the group stands again")
    for stream, (status, answer) in zip(streams, wanted):
        stream.join()
        assert status == 200 and stream.answer[0] == 200, stream.answer
        assert read_answer(stream.answer[1]) == read_answer(answer)
    assert (rank_pids(server)[1] == pid) == (how == "stopped")
    server.stop()


def external_rank(launcher, size, rank, meeting, *options):
    return launcher.serve("--data-parallel-size", size, "--data-parallel-rank", rank, "--enable-expert-parallel",
                          "--data-parallel-rpc-port", meeting, "--threads", 1, "--num-gpu-blocks-override", 600,
                          *options, wait=False)


def test_prefill_group_and_decode_group(launcher, expected):
    """DP 2 prefill and DP 4 decode, each rank with its own endpoint, behind one router."""
    def group(size, role):
        meeting, kv_port = free_port(), free_port(count=size)  # each rank adds its number
        config = json.dumps({"kv_connector": "UcxConnector", "kv_role": role, "kv_port": kv_port})
        return [external_rank(launcher, size, rank, meeting, "--kv-transfer-config", config) for rank in range(size)]

    prefill, decode = group(2, "kv_producer"), group(4, "kv_consumer")
    wait_all_ready(prefill + decode)  # none is ready before all of its group are
    router = launcher.route(prefill, decode, "--enforce-disagg")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda item: ask(router.url, *item), enumerate(PROMPTS)))
    assert answers == expected[:len(PROMPTS)]
    assert all(rank.metric("tandem:kv_transfers_total", outcome="received") > 0 for rank in decode)
    for process in [router, *prefill, *decode]:
        process.stop()


@pytest.mark.parametrize("kind", ["push", "pull"])
def test_groups_of_one_endpoint_each_behind_a_router(launcher, expected, kind):
    """The router knows two endpoints; which rank of a group computes a leg is that group's business."""
    def group(size, role):
        config = json.dumps({"kv_connector": "UcxConnector", "kv_role": role, "kv_port": free_port(count=size)})
        return start_ranks(launcher, size, "--kv-transfer-config", config)

    prefill, decode = group(2, "kv_producer"), group(3, "kv_consumer")
    router = launcher.route([prefill], [decode], "--enforce-disagg", "--transfer-mode", kind)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda item: ask(router.url, *item), enumerate(PROMPTS)))
    assert answers == expected[:len(PROMPTS)]
    received = [rank_transfers(url) for url in rank_urls(decode).values()]
    assert len(received) == 3 and sum(received) == len(PROMPTS) and min(received) > 0, received
    for process in (router, prefill, decode):
        process.stop()


def test_a_rank_with_another_setting_is_refused(launcher):
    meeting = free_port()
    ranks = [external_rank(launcher, 2, 0, meeting, "--max-num-batched-tokens", 128),
             external_rank(launcher, 2, 1, meeting, "--max-num-batched-tokens", 256)]
    def is_told(rank):
        text = json.dumps(health(rank)[1])
        return "128" in text and "256" in text

    # The one that joins last is refused, with both values.
    wait_until(lambda: any(map(is_told, ranks)), 20, "the refusal names both values")
    assert [health(rank)[0] for rank in ranks] == [503, 503]
    for rank in ranks:
        rank.stop()


@pytest.mark.parametrize("options", [("--kv-cache-dtype", "fp8"), ("--max-model-len", 64), ("--block-size", 32)])
def test_ranks_that_would_answer_differently_are_refused(launcher, options):
    meeting = free_port()
    ranks = [external_rank(launcher, 2, 0, meeting), external_rank(launcher, 2, 1, meeting, *options)]

    def is_told():
        return any(options[0] in rank.read_log() and "refuses rank" in rank.read_log() for rank in ranks)
    wait_until(is_told, what="the refusal")
    # Not the client's fault, whichever of the two it is.
    body = {"model": "demo", "prompt": [5, 6], "max_tokens": 2}
    assert all(http_json(rank.url + "/v1/completions", body)[0] == 503 for rank in ranks)
    for rank in ranks:
        rank.stop()


@pytest.mark.parametrize("common, options, words", [
    ([], ["--dtype", "float32"], r'differ in --dtype \("[a-z0-9]+" and "[a-z0-9]+"\)'),
    (["--load-format", "dummy"], ["--seed", 5], r'differ in --seed \("[05]" and "[05]"\)'),
    ([], ["--quantization", "wint8"], r'--quantization \("[a-z0-9]+" and "[a-z0-9]+"\)'),
    ([], ["--enable-eplb"], r'differ in --enable-eplb \("[a-z]+" and "[a-z]+"\)'),
    (["--enable-eplb"], ["--eplb-config", '{"num_redundant_experts": 2}'], r'as "--eplb-config", rank \d has'),
    ([], ["--all2all-backend", "naive"], 'as "--all2all-backend"'),
], ids=lambda value: value[0].lstrip("-") if isinstance(value, list) and value else "")
def test_a_refusal_names_the_option(launcher, common, options, words):
    meeting = free_port()
    ranks = [external_rank(launcher, 2, 0, meeting, *common), external_rank(launcher, 2, 1, meeting, *common, *options)]
    wait_until(lambda: any(re.search(words, rank.read_log()) for rank in ranks), what=f"the refusal with {words}")
    for rank in ranks:
        rank.stop()


@pytest.mark.parametrize("options, words", [
    (["--data-parallel-size", 4], "--enable-expert-parallel"),
    (["--headless"], "--headless is for several ranks"),
    (["--tensor-parallel-rank", 1], "--tensor-parallel-rank is for several ranks"),
    (["--data-parallel-size", 400, "--enable-expert-parallel"], "400 ranks cannot share 16 experts"),
    (["--data-parallel-size", 17, "--enable-expert-parallel"], "16 experts"),
    (["--data-parallel-size", 2, "--enable-expert-parallel", "--headless"], "--data-parallel-start-rank"),
    (["--data-parallel-size", 2, "--enable-expert-parallel", "--data-parallel-rank", 2], "0 … 1"),
])
def test_options_that_contradict_each_other(launcher, options, words):
    server = launcher.serve(*options, wait=False)
    assert server.popen.wait(20) == 1
    assert words in server.read_log()
