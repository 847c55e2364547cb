"""Pull: what prefill has published and decode never fetches gives its blocks back at once, not when its lease of 30 s ends."""

import http.client
import json
import os
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import free_port, http_json, wait_until
from test_ranks import rank_urls, start_ranks

SOON_S = 2  # a lease is 30
PINNED = "tandem:kv_blocks_pinned"


def body(first, tokens=64):
    return {"model": "demo", "prompt": list(range(first, first + tokens)), "max_tokens": 4, "ignore_eos": True}


def ask(url, first, timeout=30):
    return http_json(url + "/v1/completions", body(first), timeout=timeout)


class Leaver:
    """A client that sends its request and may leave without an answer."""

    def __init__(self, url, first):
        host = url.removeprefix("http://")
        self.connection = http.client.HTTPConnection(host, timeout=30)
        self.connection.request("POST", "/v1/completions", json.dumps(body(first)), {"Content-Type": "application/json"})

    def leave(self):
        self.connection.close()


def released(router):
    return router.metric("tandem:router_released_publications_total")


def wait_unpinned(prefill):
    wait_until(lambda: prefill.metric(PINNED) == 0, SOON_S, "prefill's blocks are free")


@pytest.fixture
def trio(launcher):
    prefill = launcher.worker("kv_producer")
    decode = launcher.worker("kv_consumer")
    router = launcher.route([prefill], [decode], "--transfer-mode", "pull", "--enforce-disagg", "--max-retries", 0)
    assert ask(router.url, 300)[0] == 200
    wait_unpinned(prefill)
    assert released(router) == 0  # decode has fetched it
    yield prefill, decode, router
    for process in (router, decode, prefill):
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGCONT)
        process.stop()


def test_decode_that_dies_before_it_fetches(trio):
    prefill, decode, router = trio
    os.kill(decode.popen.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, router.url, 400)
        wait_until(lambda: prefill.metric(PINNED) == 4, 10, "prefill has published")
        killed_at = time.time()
        os.kill(decode.popen.pid, signal.SIGKILL)
        wait_unpinned(prefill)
        print(f"the blocks were free {time.time() - killed_at:.2f} s after decode was killed")
        assert answer.result()[0] == 503
    assert released(router) == 1
    # Nobody listens there now, and the router may not know it yet.
    for first in (500, 600):
        assert ask(router.url, first)[0] == 503
    wait_unpinned(prefill)


def test_client_that_leaves_before_decode_fetches(trio):
    prefill, decode, router = trio
    os.kill(decode.popen.pid, signal.SIGSTOP)
    client = Leaver(router.url, 400)
    wait_until(lambda: prefill.metric(PINNED) == 4, 10, "prefill has published")
    client.leave()
    wait_unpinned(prefill)
    assert released(router) == 1
    os.kill(decode.popen.pid, signal.SIGCONT)
    assert ask(router.url, 400)[0] == 200  # decode has not harmed itself
    wait_until(lambda: decode.metric(PINNED) == 0, SOON_S, "decode's blocks are free")


def test_deadline_that_passes_before_decode_fetches(trio):
    prefill, decode, router = trio
    os.kill(decode.popen.pid, signal.SIGSTOP)
    status, answer = http_json(router.url + "/v1/completions", body(400), {"X-Request-Timeout-Ms": "700"})
    assert status == 504, answer
    wait_unpinned(prefill)
    assert released(router) == 1


def test_clients_that_leave_at_any_moment(trio):
    """Also when prefill's answer and the cancel of its leg cross."""
    prefill, decode, router = trio
    for i in range(60):
        client = Leaver(router.url, 300 + 10 * i)
        time.sleep(0.0005 * (i % 30))
        client.leave()
    wait_until(lambda: router.metric("tandem:router_worker_requests") == 0, 10, "the router is at rest")
    for worker in (prefill, decode):
        wait_until(lambda: worker.metric("vllm:num_requests_running") == 0, 10, "nothing runs")
        wait_until(lambda: worker.metric(PINNED) == 0, SOON_S, "all blocks are free")
    print(f"{released(router):.0f} of 60 publications were released")
    assert ask(router.url, 300)[0] == 200


def test_only_who_has_the_handle_releases(trio):
    prefill, _, router = trio
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    status, answer = http_json(prefill.url + "/v1/completions", body(400) | {"kv_transfer_params": params})
    assert status == 200
    published = answer["kv_transfer_params"]
    path = "/tandem/v1/release_publication"

    def release(url, **changes):
        return http_json(url + path, {"kv_transfer_params": published | changes})[0]

    forged = published["remote_request_id"][:-1] + ("0" if published["remote_request_id"][-1] != "0" else "1")
    assert release(prefill.url, remote_request_id=forged) == 202
    assert release(prefill.url, remote_engine_id="another:1") == 202
    assert release(prefill.url, remote_request_id=None) == 400
    assert release(router.url) == 400  # not for clients
    time.sleep(0.2)
    assert prefill.metric(PINNED) == 4
    assert release(prefill.url) == 202
    wait_unpinned(prefill)
    assert release(prefill.url) == 202


def rank_pinned(url):
    with urllib.request.urlopen(url + "/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(PINNED + "{"))


def test_a_rank_groups_endpoint_hands_a_release_on(launcher):
    config = json.dumps({"kv_connector": "UcxConnector", "kv_role": "kv_producer", "kv_port": free_port(count=2)})
    prefill = start_ranks(launcher, 2, "--kv-transfer-config", config)
    decode = launcher.worker("kv_consumer")
    router = launcher.route([prefill], [decode], "--transfer-mode", "pull", "--enforce-disagg", "--max-retries", 0)
    assert ask(router.url, 300)[0] == 200
    ranks = list(rank_urls(prefill).values())
    assert len(ranks) == 2

    def pinned():
        return sum(map(rank_pinned, ranks))

    os.kill(decode.popen.pid, signal.SIGSTOP)
    clients = [Leaver(router.url, 400 + 100 * i) for i in range(4)]
    wait_until(lambda: pinned() == 16, 10, "both ranks have published")
    for client in clients:
        client.leave()
    wait_until(lambda: pinned() == 0, SOON_S, "the blocks of all ranks are free")
    assert released(router) == 4
    os.kill(decode.popen.pid, signal.SIGCONT)
    for process in (router, decode, prefill):
        process.stop()
