"""Ranks that share attention and dense layers: almost as one rank, whose sums have another order, and exactly as
themselves, whatever else the topology is."""

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import free_port, http_json, wait_all_ready, wait_until
from gqa_model import make_gqa_model
from prompts import make_prompts
from test_ranks import rank_metric
from test_topologies import ask, ask_all, body_of, pull, read_answer

PROMPTS = make_prompts(40)
BACKENDS = ["naive", "allgather_reducescatter", "high_throughput", "low_latency"]
# How far logprobs may move, and how much less likely than the best a token may be that is chosen instead, in nats. Products
# with bf16 weights round their input, which another order of sums makes fall to the other side now and then; so may experts.
TOLERANCE = {"float32": 0.001, "bfloat16": 0.5}


def start(launcher, *options, wait=True):
    return launcher.serve("--tensor-parallel-size", 2, "--threads", 1, "--num-gpu-blocks-override", 600, *options, wait=wait)


def ask_mixed(url, prompts=PROMPTS):
    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(lambda item: ask(url, *item), enumerate(prompts)))


def differs(index, answer, wanted, tolerance):
    """Whether an answer goes another way than `wanted` somewhere; asserts that it does so only where two tokens were
    about as likely. A sampled token may also change where its random number lies at the edge of two tokens."""
    for position, (token, other) in enumerate(zip(answer[0], wanted[0])):
        if token == other:
            assert abs(answer[1][position] - wanted[1][position]) < tolerance, (index, position)
            continue
        if index % 2 == 0:
            best, second = sorted(wanted[2][position].values(), reverse=True)[:2]
            assert best - second < tolerance, (index, position, best, second)
        return True
    return False


def expect_near(answers, wanted, dtype="bfloat16"):
    differing = sum(differs(index, *pair, TOLERANCE[dtype]) for index, pair in enumerate(zip(answers, wanted)))
    assert differing <= (len(answers) // 2 if dtype == "bfloat16" else 1), f"{differing} answers go another way"


@pytest.fixture(scope="module")
def alone(launcher):
    server = launcher.serve("--no-enable-prefix-caching", "--max-num-seqs", 1)
    answers = ask_all(server.url, 1)
    server.stop()
    return answers[:len(PROMPTS)]


@pytest.fixture(scope="module")
def shared(launcher):
    """What two tensor ranks answer, one request after the other."""
    server = start(launcher, "--no-enable-prefix-caching", "--max-num-seqs", 1)
    answers = [ask(server.url, index, prompt) for index, prompt in enumerate(PROMPTS)]
    server.stop()
    return answers


def follower_pid(server):
    return int(re.findall(r"rank \d+ started, pid (\d+)", server.read_log())[-1])


def test_two_tensor_ranks_answer_almost_as_one(launcher, alone, shared):
    expect_near(shared, alone)
    assert shared != alone  # else nothing was split
    exact = launcher.serve("--dtype", "float32")
    server = start(launcher, "--data-parallel-size", 2, "--enable-expert-parallel", "--dtype", "float32")
    expect_near(ask_mixed(server.url), ask_mixed(exact.url), "float32")
    exact.stop()
    server.stop()


def test_mixed_load_and_chunks_change_nothing(launcher, shared):
    server = start(launcher, "--max-num-batched-tokens", 64)
    assert ask_mixed(server.url) == shared
    assert ask_mixed(server.url) == shared  # with prefixes that are known now
    server.stop()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_data_ranks_of_two_tensor_ranks(launcher, shared, backend):
    server = start(launcher, "--data-parallel-size", 2, "--enable-expert-parallel", "--all2all-backend", backend,
                   "--max-num-batched-tokens", 64)
    assert ask_mixed(server.url) == shared
    for index in (1, 2, 5):  # the other data rank has nothing to do
        assert ask(server.url, index, PROMPTS[index]) == shared[index]
    server.stop()


def test_two_half_batches(launcher, shared):
    server = start(launcher, "--data-parallel-size", 2, "--enable-expert-parallel", "--enable-dbo",
                   "--dbo-decode-token-threshold", 2, "--dbo-prefill-token-threshold", 8)
    assert ask_mixed(server.url) == shared
    assert rank_metric(server, "tandem:group_split_rounds_total") > 0
    server.stop()


def test_four_tensor_ranks(launcher, alone):
    server = launcher.serve("--tensor-parallel-size", 4, "--threads", 1, "--num-gpu-blocks-override", 600)
    answers = ask_mixed(server.url)
    expect_near(answers, alone)
    assert ask_mixed(server.url) == answers
    server.stop()


def test_a_tensor_rank_that_dies_comes_back(launcher, shared):
    server = start(launcher)
    assert ask_mixed(server.url) == shared
    first = follower_pid(server)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: follower_pid(server) != first, what="a new process")
    wait_until(lambda: http_json(server.url + "/health")[0] == 200, what="health")
    # Its cache is empty, so no prefix may be taken for known.
    assert ask_mixed(server.url) == shared
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(follower_pid(server), 0)


def test_a_server_that_is_killed_takes_its_tensor_ranks_along(launcher):
    server = start(launcher)
    pid = follower_pid(server)
    server.popen.kill()
    server.popen.wait()

    def is_gone():
        try:
            with open(f"/proc/{pid}/stat") as stat:
                return stat.read().split()[2] == "Z"
        except FileNotFoundError:
            return True
    wait_until(is_gone, what="the end of the tensor rank")


def kv_config(role):
    return json.dumps({"kv_connector": "UcxConnector", "kv_role": role, "kv_port": free_port()})


@pytest.mark.parametrize("prefill_size, decode_size", [(2, 2), (2, 1), (1, 2)])
def test_prefill_and_decode_of_other_sizes(launcher, alone, shared, prefill_size, decode_size):
    def worker(size, role):
        return launcher.serve("--tensor-parallel-size", size, "--threads", 1, "--num-gpu-blocks-override", 600,
                              "--kv-transfer-config", kv_config(role), wait=False)
    workers = [worker(prefill_size, "kv_producer"), worker(decode_size, "kv_consumer")]
    wait_all_ready(workers)
    router = launcher.route(workers[:1], workers[1:], "--enforce-disagg")
    answers = ask_mixed(router.url)
    assert workers[1].metric("tandem:kv_transfers_total", outcome="received") > 0
    if prefill_size == decode_size:
        assert answers == shared
    expect_near(answers, alone)
    assert ask_mixed(router.url) == answers
    for process in [router, *workers]:
        process.stop()


# ---- Heads of KV that the ranks share: GQA ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    return make_gqa_model(tmp_path_factory.mktemp("gqa"))


@pytest.fixture(scope="module")
def answers_of(launcher, gqa):
    """What one server of `size` tensor ranks answers, one request after the other; each is computed once."""
    known = {}

    def answer(size, *options):
        key = (size, *options)
        if key not in known:
            server = launcher.serve("--tensor-parallel-size", size, "--threads", 1, "--num-gpu-blocks-override", 600,
                                    "--no-enable-prefix-caching", "--max-num-seqs", 1, *options, model=gqa)
            known[key] = [ask(server.url, index, prompt) for index, prompt in enumerate(PROMPTS)]
            server.stop()
        return known[key]
    return answer


def start_pair(launcher, gqa, prefill_size, decode_size, *options, prefill=(), decode=()):
    def worker(size, role, *more):
        return launcher.serve("--tensor-parallel-size", size, "--threads", 1, "--num-gpu-blocks-override", 600,
                              "--kv-transfer-config", kv_config(role), *options, *more, model=gqa, wait=False)
    workers = [worker(prefill_size, "kv_producer", *prefill), worker(decode_size, "kv_consumer", *decode)]
    wait_all_ready(workers)
    return workers


def pull_mixed(workers):
    """Into blocks without a known prefix."""
    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(lambda item: pull(*workers, *item, cache_salt="pulled"), enumerate(PROMPTS)))


def expect_nothing_pinned(workers):
    for worker in workers:
        wait_until(lambda: worker.metric("tandem:kv_blocks_pinned") == 0, what="no pinned blocks")


DBO = ("--enable-dbo", "--dbo-prefill-token-threshold", 2, "--dbo-decode-token-threshold", 2)


@pytest.mark.parametrize("size, options, prefill", [
    (2, (), ()),
    (2, (), DBO),
    (4, ("--kv-transport", "tcp"), ()),
    (2, ("--kv-transport", "ucx"), ()),
    (2, ("--kv-cache-dtype", "fp8"), ("--block-size", 32)),
])
def test_heads_of_the_same_size_are_exact(launcher, gqa, answers_of, size, options, prefill):
    wanted = answers_of(size, *(option for option in options if options[0] == "--kv-cache-dtype"))
    workers = start_pair(launcher, gqa, size, size, *options, prefill=("--max-num-batched-tokens", 64, *prefill))
    router = launcher.route(workers[:1], workers[1:], "--enforce-disagg")
    assert ask_mixed(router.url) == wanted
    whole = workers[1].metric("tandem:kv_transfer_bytes_total")
    assert (workers[0].metric("tandem:group_split_rounds_total") > 0) == bool(prefill == DBO)
    assert workers[1].metric("tandem:kv_transfers_total", outcome="received") == len(PROMPTS)
    # With the prefixes that decode knows now, which are not sent again.
    assert ask_mixed(router.url) == wanted
    assert workers[1].metric("tandem:kv_transfer_bytes_total") - whole < whole / 2
    assert workers[1].metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 0
    expect_nothing_pinned(workers)
    assert pull_mixed(workers) == wanted
    expect_nothing_pinned(workers)
    for process in [router, *workers]:
        process.stop()


@pytest.mark.parametrize("prefill_size, decode_size, prefill", [(2, 1, ()), (1, 2, ()), (4, 2, ("--block-size", 64))])
def test_heads_of_other_sizes(launcher, gqa, answers_of, prefill_size, decode_size, prefill):
    exact = ("--dtype", "float32")
    workers = start_pair(launcher, gqa, prefill_size, decode_size, *exact, prefill=prefill)
    router = launcher.route(workers[:1], workers[1:], "--enforce-disagg")
    answers = ask_mixed(router.url)
    assert workers[1].metric("tandem:kv_transfers_total", outcome="received") == len(PROMPTS)
    expect_near(answers, answers_of(1, *exact), "float32")
    assert ask_mixed(router.url) == answers
    expect_near(pull_mixed(workers), answers_of(1, *exact), "float32")
    expect_nothing_pinned(workers)
    for process in [router, *workers]:
        process.stop()


def test_heads_of_several_data_ranks(launcher, gqa, answers_of):
    def group(role):
        config = json.dumps({"kv_connector": "UcxConnector", "kv_role": role, "kv_port": free_port(count=2)})
        return launcher.serve("--data-parallel-size", 2, "--tensor-parallel-size", 2, "--enable-expert-parallel",
                              "--threads", 1, "--num-gpu-blocks-override", 600, "--kv-transfer-config", config,
                              model=gqa, wait=False)
    workers = [group("kv_producer"), group("kv_consumer")]
    wait_all_ready(workers)
    router = launcher.route(workers[:1], workers[1:], "--enforce-disagg")
    assert ask_mixed(router.url) == answers_of(2)  # all of them with transfers, which --enforce-disagg demands
    for process in [router, *workers]:
        process.stop()


def test_ranks_that_die_or_freeze_while_heads_travel(launcher, gqa, answers_of):
    """A follower maps the same memory when it comes back; nothing stays pinned, and nothing wrong is known."""
    wanted = answers_of(2)
    workers = start_pair(launcher, gqa, 2, 2, "--rank-timeout", 1, prefill=("--max-num-batched-tokens", 64))
    router = launcher.route(workers[:1], workers[1:], "--enforce-disagg")

    def ask_or_fail(index):
        status, answer = http_json(router.url + "/v1/completions", body_of(index, PROMPTS[index]))
        assert status == 200 or answer["error"]["message"], answer
        return status != 200 or read_answer(answer) == wanted[index]

    def ask_while(fault):
        """Everything, and the fault as soon as some answers are there."""
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask_or_fail, index) for index in range(len(PROMPTS))]
            wait_until(lambda: sum(each.done() for each in asked) > 3, what="some answers")
            fault()
            assert all(each.result() for each in asked)

    def freeze(pid):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)

    for worker, dies in ((workers[1], True), (workers[0], True), (workers[1], False), (workers[0], False)):
        first = follower_pid(worker)
        epochs = worker.metric("tandem:group_epochs_total")
        ask_while(lambda: os.kill(first, signal.SIGKILL) if dies else freeze(first))
        wait_until(lambda: worker.metric("tandem:group_epochs_total") > epochs, what="a new epoch")
        assert (follower_pid(worker) != first) == dies
        wait_all_ready(workers)
        expect_nothing_pinned(workers)
        wait_until(lambda: http_json(router.url + "/v1/completions", body_of(0, PROMPTS[0]))[0] == 200, what="an answer")
        assert ask_mixed(router.url) == wanted
    # The whole decode worker, whose followers go with it.
    ask_while(workers[1].popen.kill)
    expect_nothing_pinned(workers[:1])
    for process in (router, workers[0]):
        process.stop()


FOLLOWING = ["--tensor-parallel-size", 2, "--tensor-parallel-rank", 1, "--data-parallel-rpc-port", 9]


def test_what_cannot_be_shared_is_refused(launcher):
    for options, words in (
            (["--tensor-parallel-size", 3], "num_attention_heads of"),
            (["--tensor-parallel-size", 2, "--tensor-parallel-rank", 2], "--tensor-parallel-size 2 has 0 … 1"),
            (["--data-parallel-size", 2, "--tensor-parallel-size", 2], "needs --enable-expert-parallel"),
            (["--tensor-parallel-size", 2, "--tensor-parallel-kv-memory", "1:2"], "is for --tensor-parallel-rank from 1 on"),
            (FOLLOWING + ["--tensor-parallel-kv-memory", "1-2"], "is not PROCESS:DESCRIPTOR"),
            (FOLLOWING + ["--tensor-parallel-kv-memory", "1:2"], "is for models whose KV heads are shared")):
        refused = launcher.serve(*options, wait=False)
        assert refused.popen.wait(30) == 1
        assert words in refused.read_log()


def test_no_process_shows_the_key_on_its_command_line(launcher):
    """Which every user of the machine can read; those of ranks and of their followers are written by us."""
    server = start(launcher, "--data-parallel-size", 2, "--enable-expert-parallel", "--api-key", "a-key-of-mine", wait=False)
    wait_until(lambda: http_json(server.url + "/health")[0] == 200, what="health")
    body = {"model": "demo", "prompt": [5, 6], "max_tokens": 2}
    assert http_json(server.url + "/v1/completions", body)[0] == 401
    assert http_json(server.url + "/v1/completions", body, {"Authorization": "Bearer a-key-of-mine"})[0] == 200
    children = [int(pid) for pid in re.findall(r"rank \d+ started, pid (\d+)", server.read_log())]
    assert len(children) == 4
    for pid in children:
        with open(f"/proc/{pid}/cmdline") as command:
            text = command.read()
        assert "--secret-config" in text and "a-key-of-mine" not in text
    server.stop()
