"""A rank group over two nodes, here two sets of namespaces joined by a veth pair: the commands are those of vLLM's guide to
expert parallelism for two nodes, with only the program, the model, the sizes and the addresses changed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time

import pytest

from conftest import DEMO, TANDEM, wait_until
from namespaces import ADDRESSES, DEVICES, NAMES, inside, ip, two_namespaces
from prompts import make_prompts
from test_topologies import body_of, read_answer

PROMPTS = make_prompts(24)
TIMEOUT_S = 3


@pytest.fixture(scope="module")
def nodes():
    with two_namespaces():
        yield


CLIENT = """
import json, sys, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
url, bodies = sys.argv[1], json.load(sys.stdin)
def ask(body):
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, json.dumps(str(error))
with ThreadPoolExecutor(24) as pool:
    json.dump(list(pool.map(ask, bodies)), sys.stdout)
"""


def ask_inside(path, bodies, background=False, node=0):
    """POSTs (or GETs for None) from inside a node; [(status, JSON)]."""
    process = subprocess.Popen(inside(NAMES[node], "python3", "-c", CLIENT, f"http://127.0.0.1:8000{path}"),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(bodies))
    process.stdin.close()

    def finish():
        text = process.stdout.read()
        process.wait()
        return [(status, json.loads(body) if body else None) for status, body in json.loads(text)]
    return finish if background else finish()


def rank_metric(node, log, name):
    """Of the first rank that says in this log where it serves."""
    url = re.search(r"rank\d \[serve\] serving demo on (http://\S+)", log)[1]
    text = subprocess.run(inside(NAMES[node], "python3", "-c", "import sys, urllib.request\n"
                                 "print(urllib.request.urlopen(sys.argv[1]).read().decode())", url + "/metrics"),
                          check=True, capture_output=True, text=True).stdout
    return float(re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)[1])


def health(node=0):
    return ask_inside("/health", [None], node=node)[0]


class Node:
    def __init__(self, name, log_path, *options):
        self.log_path = log_path
        self.log = open(log_path, "w")
        command = [TANDEM, "serve", DEMO, "--served-model-name", "demo", "--threads", 1, "--num-gpu-blocks-override", 600,
                   "--rank-timeout", TIMEOUT_S, *options]
        self.popen = subprocess.Popen(inside(name, *command), stdout=self.log, stderr=self.log)

    def rank_pids(self):
        return {int(r): int(p) for r, p in re.findall(r"rank (\d+) started, pid (\d+)", self.read_log())}

    def read_log(self):
        return self.log_path.read_text()

    def stop(self):
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            self.popen.wait(15)
        self.log.close()


@contextlib.contextmanager
def running(first, second):
    """Stops both nodes in the end, and shows their logs if something did not hold."""
    try:
        yield
    except AssertionError:
        print(first.read_log()[-3000:], second.read_log()[-3000:])
        raise
    finally:
        second.stop()
        first.stop()


def start_node_1(log_path, backend, *options):
    return Node(NAMES[0], log_path,
                "--all2all-backend", backend,
                "--tensor-parallel-size", 1,
                "--enable-expert-parallel",
                "--data-parallel-size", 4,
                "--data-parallel-size-local", 2,
                "--data-parallel-address", ADDRESSES[0],
                "--data-parallel-rpc-port", 13345,
                "--api-server-count=2", *options)


def start_node_2(log_path, backend, *options):
    return Node(NAMES[1], log_path,
                "--all2all-backend", backend,
                "--tensor-parallel-size", 1,
                "--enable-expert-parallel",
                "--data-parallel-size", 4,
                "--data-parallel-size-local", 2,
                "--data-parallel-start-rank", 2,
                "--data-parallel-address", ADDRESSES[0],
                "--data-parallel-rpc-port", 13345,
                "--headless", *options)


@pytest.fixture(scope="module")
def expected(launcher):
    from conftest import http_json
    alone = launcher.serve()
    answers = [read_answer(http_json(alone.url + "/v1/completions", body_of(i, prompt))[1])
               for i, prompt in enumerate(PROMPTS)]
    alone.stop()
    return answers


def all_bodies():
    return [body_of(i, prompt) for i, prompt in enumerate(PROMPTS)]


def wait_until_standing(what):
    wait_until(lambda: health()[0] == 200, 40, what)


@pytest.mark.parametrize("overlap", [[], ["--enable-dbo", "--dbo-decode-token-threshold", 2, "--dbo-prefill-token-threshold",
                                           2, "--max-num-batched-tokens", 64]], ids=["whole_steps", "two_parts"])
@pytest.mark.parametrize("backend", ["naive", "allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency"])
def test_two_nodes_answer_as_one_process(nodes, expected, tmp_path, backend, overlap):
    first = start_node_1(tmp_path / "n1.log", backend, *overlap)
    second = start_node_2(tmp_path / "n2.log", backend, *overlap)
    with running(first, second):
        wait_until_standing("both nodes stand")
        answers = ask_inside("/v1/completions", all_bodies())
        assert [status for status, _ in answers] == [200] * len(PROMPTS), answers
        assert [read_answer(answer) for _, answer in answers] == expected
        split = rank_metric(1, second.read_log(), "tandem:group_split_rounds_total")
        assert (split > 10) == bool(overlap), split


def test_experts_are_balanced_by_nodes(nodes, expected, tmp_path):
    """The demo model has 4 groups of experts: each stays on one node."""
    eplb = ["--enable-eplb", "--max-num-batched-tokens", 64, "--eplb-config",
            json.dumps({"window_size": 16, "step_interval": 24, "num_redundant_experts": 8})]
    first, second = (start(tmp_path / f"{start.__name__}.log", "low_latency", *eplb)
                     for start in (start_node_1, start_node_2))
    with running(first, second):
        wait_until_standing("both nodes stand")
        for _ in range(3):
            answers = ask_inside("/v1/completions", all_bodies())
            assert [read_answer(answer) for _, answer in answers] == expected
        group = ask_inside("/expert_load", [None])[0][1]["group"]
        assert group["num_nodes"] == 2 and group["hierarchical"] and group["changes"] >= 4, group
        for ranks in group["experts"]:
            nodes_of = [{expert // 4 for rank in ranks[2 * node:2 * node + 2] for expert in rank} for node in (0, 1)]
            assert nodes_of[0] | nodes_of[1] == {0, 1, 2, 3} and not nodes_of[0] & nodes_of[1], ranks


def test_an_endpoint_on_every_node(nodes, expected, tmp_path):
    options = ["--enable-expert-parallel", "--data-parallel-size", 4, "--data-parallel-size-local", 2,
               "--data-parallel-address", ADDRESSES[0], "--data-parallel-rpc-port", 13345, "--data-parallel-hybrid-lb", "--api-server-count", 2]
    first = Node(NAMES[0], tmp_path / "n1.log", *options)
    second = Node(NAMES[1], tmp_path / "n2.log", *options, "--data-parallel-start-rank", 2)
    with running(first, second):
        for node in (0, 1):
            wait_until(lambda: health(node)[0] == 200, 40, f"node {node} stands")
            answers = ask_inside("/v1/completions", all_bodies(), node=node)
            assert [read_answer(answer) for _, answer in answers] == expected


def test_tensor_ranks_on_each_node(nodes, launcher, tmp_path):
    """Two data ranks, one on each node, of two tensor ranks: the answers of two tensor ranks on one host."""
    from conftest import http_json
    alone = launcher.serve("--tensor-parallel-size", 2, "--threads", 1, "--num-gpu-blocks-override", 600)
    expected = [read_answer(http_json(alone.url + "/v1/completions", body)[1]) for body in all_bodies()]
    alone.stop()
    options = ["--enable-expert-parallel", "--data-parallel-size", 2, "--data-parallel-size-local", 1,
               "--tensor-parallel-size", 2, "--data-parallel-address", ADDRESSES[0], "--data-parallel-rpc-port", 13345]
    first = Node(NAMES[0], tmp_path / "n1.log", *options)
    second = Node(NAMES[1], tmp_path / "n2.log", *options, "--data-parallel-start-rank", 1, "--headless")
    with running(first, second):
        wait_until_standing("both nodes stand")
        answers = ask_inside("/v1/completions", all_bodies())
        assert [read_answer(answer) for _, answer in answers] == expected


@pytest.fixture(scope="module")
def pair(nodes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    first, second = start_node_1(folder / "n1.log", "low_latency"), start_node_2(folder / "n2.log", "low_latency")
    yield first, second
    second.stop()
    first.stop()


@pytest.mark.parametrize("how", ["killed", "stopped", "cut"])
def test_a_lost_node_is_noticed_in_time_and_taken_back(pair, expected, how):
    first, second = pair
    wait_until_standing("both nodes stand")
    running = ask_inside("/v1/completions", [body | {"max_tokens": 400} for body in all_bodies()[:8]], background=True)
    time.sleep(0.5)
    pids = second.rank_pids()
    if how == "killed":
        second.popen.send_signal(signal.SIGSTOP)  # or it would start them again before the health is seen
    lost_at = time.time()
    if how == "cut":
        ip("-n", NAMES[1], "link", "set", DEVICES[1], "down")
    else:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    wait_until(lambda: health()[0] == 503, TIMEOUT_S + 3, "the loss is told")
    noticed_s = time.time() - lost_at
    status, told = health()
    assert status == 200 or re.search(r"rank [23] |ranks 2, 3", json.dumps(told)), told
    assert noticed_s < (1.5 if how == "killed" else TIMEOUT_S + 1.5)
    time.sleep(1)
    if how == "cut":
        ip("-n", NAMES[1], "link", "set", DEVICES[1], "up")
    elif how == "stopped":
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
    else:
        second.popen.send_signal(signal.SIGCONT)
    wait_until_standing("both nodes stand again")
    for status, answer in running():
        # Moved to the next epoch, or a named error; never another answer (its length shows that it is whole).
        if status == 200:
            assert answer["usage"]["completion_tokens"] == 400
        else:
            assert status in (502, 503, 504) and answer["error"]["message"], answer
    answers = ask_inside("/v1/completions", all_bodies())
    assert [read_answer(answer) for _, answer in answers] == expected
    assert (second.rank_pids() == pids) == (how != "killed")
