"""`tandem up`: workers that are killed in mid-request, clients that leave, and a clean end."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from conftest import DEMO, TANDEM, free_port, http_json, wait_until

CLUSTER = """\
model: {model}
options:
  served-model-name: demo
workers:
  - {{name: prefill, role: prefill, port: {prefill}, kv_port: {prefill_kv}}}
  - {{name: decode, role: decode, port: {decode}, kv_port: {decode_kv}}}
router: {{port: {router}}}
"""


class Cluster:
    def __init__(self, launcher, folder, *options):
        names = ("prefill", "prefill_kv", "decode", "decode_kv", "router")
        self.ports = {name: free_port() for name in names}
        path = folder / "cluster.yaml"
        path.write_text(CLUSTER.format(model=DEMO, **self.ports))
        self.url = f"http://127.0.0.1:{self.ports['router']}"
        self.up = launcher.start(["up", path, "--run-dir", folder / "run", *options], self.url).wait_ready()
        from conftest import Process
        self.workers = {name: Process.__new__(Process) for name in ("prefill", "decode")}
        for name, worker in self.workers.items():
            worker.url = f"http://127.0.0.1:{self.ports[name]}"
        for worker in self.workers.values():
            wait_until(lambda: http_json(worker.url + "/health")[0] == 200, 60, "worker ready")
        # Before the first request: a gauge follows an answer's last token a moment later.
        self.all_blocks = self.free_blocks()
        wait_until(lambda: self.ask(2)[0] == 200, 30, "first answer")

    def ask(self, max_tokens, prompt=tuple(range(300, 340)), timeout=30):
        body = {"model": "demo", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True}
        return http_json(self.url + "/v1/completions", body, timeout=timeout)

    def children(self):
        """name → pid of the workers and the router, from their whole command lines."""
        found = {}
        listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.up.popen.pid)], capture_output=True, text=True)
        for pid in map(int, listing.stdout.split()):
            # Not from ps: how wide it prints depends on the terminal and on COLUMNS.
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "route" in arguments:
                found["router"] = pid
            for name in ("prefill", "decode"):
                if "serve" in arguments and str(self.ports[name]) in arguments:
                    found[name] = pid
        return found

    def free_blocks(self):
        return {name: worker.metric("tandem:kv_blocks_available") for name, worker in self.workers.items()}

    def wait_all_blocks_free(self, timeout_s):
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.free_blocks() == self.all_blocks, timeout_s)
        assert self.free_blocks() == self.all_blocks


@pytest.fixture(scope="module")
def cluster(launcher, tmp_path_factory):
    return Cluster(launcher, tmp_path_factory.mktemp("cluster"))


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_killed_worker_costs_one_request_at_most(cluster, victim):
    status, reference = cluster.ask(20)
    assert status == 200
    outcome = {}

    def run():
        prompt = range(300, 2300) if victim == "prefill" else range(300, 400)
        begin = time.time()
        outcome["answer"] = cluster.ask(1500 if victim == "decode" else 4, [400 + token % 3000 for token in prompt])
        outcome["seconds"] = time.time() - begin

    thread = threading.Thread(target=run)
    thread.start()
    busy = cluster.workers[victim]
    wait_until(lambda: busy.metric("vllm:num_requests_running") >= 1, 10, "the request runs on the victim")
    killed_at = time.time()
    os.kill(cluster.children()[victim], signal.SIGKILL)
    thread.join(30)
    assert not thread.is_alive(), "the client hangs"
    status, answer = outcome["answer"]
    assert time.time() - killed_at < 5 or status == 200
    if status != 200:
        assert answer["error"]["message"] and answer["error"]["type"], answer
    wait_until(lambda: http_json(busy.url + "/health")[0] == 200, 20, "the worker is back")
    wait_until(lambda: cluster.ask(20)[0] == 200, 10, "the next request succeeds")
    assert cluster.ask(20)[1]["choices"][0]["token_ids"] == reference["choices"][0]["token_ids"]
    cluster.wait_all_blocks_free(20)
    for worker in cluster.workers.values():
        assert worker.metric("tandem:kv_blocks_pinned") == 0


def test_client_that_leaves_frees_both_sides(cluster):
    body = {"model": "demo", "prompt": list(range(300, 700)), "max_tokens": 1500, "ignore_eos": True, "stream": True}
    import http.client
    connection = http.client.HTTPConnection("127.0.0.1", cluster.ports["router"], timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.read(40)
    connection.sock.close()
    response.close()
    cluster.wait_all_blocks_free(5)
    for worker in cluster.workers.values():
        wait_until(lambda: worker.metric("vllm:num_requests_running") == 0, 5, "nothing runs")


def test_interrupt_leaves_no_process(cluster):
    pids = list(cluster.children().values())
    assert len(pids) == 3
    begin = time.time()
    cluster.up.popen.send_signal(signal.SIGINT)
    cluster.up.popen.wait(6)
    assert time.time() - begin < 5.5
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}"), f"{pid} lives on"


def test_a_cluster_that_ends_finishes_its_answers(launcher, tmp_path):
    cluster = Cluster(launcher, tmp_path, "--shutdown-timeout", 30)
    pids = list(cluster.children().values())
    answers = []
    asking = threading.Thread(target=lambda: answers.append(cluster.ask(1500)))
    asking.start()
    decode = cluster.workers["decode"]
    wait_until(lambda: decode.metric("vllm:num_requests_running") == 1, what="the request")
    cluster.up.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: http_json(cluster.url + "/health") == (503, {"status": "draining"}), what="draining")
    asking.join(30)
    assert answers and answers[0][0] == 200 and answers[0][1]["usage"]["completion_tokens"] == 1500, answers
    assert cluster.up.popen.wait(6) == 0
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}"), f"{pid} lives on"
