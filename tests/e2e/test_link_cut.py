"""Prefill and decode in two network namespaces with 5 ms between them, and a line that is cut for 3 s in mid-transfer."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import DEMO, TANDEM, http_json, wait_until
from namespaces import ADDRESSES, DEVICES, NAMES, inside, ip, join_by_veth, two_namespaces

DELAY_MS = 5
CUT_S = 3
TIMEOUT_S = 20
HERE = Path(__file__).parent


def join_by_netem():
    """A veth pair with netem on both ends; what the kernel says if it lacks netem."""
    join_by_veth()
    for name, device in zip(NAMES, DEVICES):
        made = subprocess.run(inside(name, "tc", "qdisc", "add", "dev", device, "root", "netem", "delay", f"{DELAY_MS}ms"),
                              capture_output=True, text=True)
        if made.returncode != 0:
            ip("-n", NAMES[0], "link", "del", DEVICES[0])
            return made.stderr.strip()
    return None


def join_by_tun():
    relay = subprocess.Popen([sys.executable, HERE / "delayed_link.py", NAMES[0], DEVICES[0], NAMES[1], DEVICES[1],
                              str(DELAY_MS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if relay.stdout.readline() != "ready\n":
        pytest.skip("neither `tc netem` nor a TUN device is there to make a line with a delay")
    return relay


@pytest.fixture(scope="module")
def line():
    relays = []

    def join():
        lack = join_by_netem()
        if lack is not None:
            print(f"no netem ({lack}): the delay is made by delayed_link.py")
            relays.append(join_by_tun())

    with two_namespaces(join, mtu=9000):
        wait_until(lambda: subprocess.run(inside(NAMES[0], "ping", "-c1", "-W1", ADDRESSES[1]) if shutil.which("ping") else
                                          inside(NAMES[0], "ip", "link"), capture_output=True).returncode == 0, 10, "the line is up")
        yield
        for relay in relays:
            relay.stdin.close()
            relay.wait()


def get(name, url):
    script = "import sys,urllib.request as u; sys.stdout.write(u.urlopen(sys.argv[1],timeout=5).read().decode())"
    done = subprocess.run(inside(name, sys.executable, "-c", script, url), capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def metric(name, url, series):
    return sum(float(line.rsplit(" ", 1)[1]) for line in get(name, url + "/metrics").splitlines()
               if line.startswith((series + "{", series + " ")))


class Pair:
    """Two workers with namespaces of processes of their own, as on two hosts, and a router beside prefill."""

    def __init__(self, folder):
        self.folder, self.running = folder, []
        self.router = "http://127.0.0.1:8000"
        self.workers = [f"http://{address}:8100" for address in ADDRESSES]
        for name, address, role in zip(NAMES, ADDRESSES, ("kv_producer", "kv_consumer")):
            config = {"kv_connector": "UcxConnector", "kv_role": role, "kv_ip": address, "kv_port": 14579}
            self.start(role, name, "unshare", "--pid", "--ipc", "--uts", "--mount-proc", "--fork", "--kill-child", TANDEM,
                       "serve", DEMO, "--host", address, "--port", 8100, "--served-model-name", "demo", "--threads", 1,
                       "--kv-cache-memory-bytes", "64M", "--kv-transfer-config", json.dumps(config))
        self.start("router", NAMES[0], TANDEM, "route", "--port", 8000, "--prefill", self.workers[0], "--decode",
                   self.workers[1], "--enforce-disagg")
        wait_until(lambda: get(NAMES[0], self.router + "/health"), 60, "the router is ready")

    def start(self, log_name, name, *command):
        with open(self.folder / f"{log_name}.log", "w") as log:
            self.running.append(subprocess.Popen(inside(name, *command), stdout=log, stderr=log))

    def begin_asking(self, bodies, parallel):
        asking = subprocess.Popen(inside(NAMES[0], sys.executable, HERE / "ask_many.py"), stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        asking.stdin.write(json.dumps({"url": self.router, "bodies": bodies, "parallel": parallel, "timeout_s": TIMEOUT_S}))
        asking.stdin.close()
        return asking

    def ask(self, bodies, parallel=4):
        return self.finish(self.begin_asking(bodies, parallel))

    @staticmethod
    def finish(asking):
        results = json.loads(asking.stdout.read())
        assert asking.wait() == 0
        return results

    def at_rest(self):
        """Blocks that are free, and what counts work in progress."""
        free = [metric(name, url, "tandem:kv_blocks_available") for name, url in zip(NAMES, self.workers)]
        busy = [metric(name, url, series) for name, url in zip(NAMES, self.workers)
                for series in ("tandem:kv_blocks_pinned", "vllm:num_requests_running", "vllm:num_requests_waiting")]
        busy += [metric(NAMES[0], self.router, series)
                 for series in ("tandem:router_worker_requests", "tandem:router_worker_tokens")]
        return free, sum(busy)

    def stop(self):
        for process in self.running:  # unshare passes no signal on but ends its child with itself
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def pair(line, tmp_path_factory):
    started = Pair(tmp_path_factory.mktemp("pair"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def alone(launcher):
    return launcher.serve("--threads", 1)


def make_body(seed, length, max_tokens=8):
    return {"model": "demo", "prompt": [300 + (seed * 131 + 7 * i * (seed + 1)) % 3000 for i in range(length)],
            "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True, "logprobs": 1}


def read_answer(answer):
    choice = answer["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]


def test_answers_are_exact_over_a_line_with_a_delay(pair, alone):
    bodies = [make_body(seed, length) for seed, length in enumerate((1, 16, 17, 200, 700, 1500))]
    for index, status, answer, _, _ in pair.ask(bodies):
        assert status == 200, answer
        assert read_answer(answer) == read_answer(http_json(alone.url + "/v1/completions", bodies[index])[1])
    log = (pair.folder / "kv_producer.log").read_text()
    assert "over tcp/" in log, log  # auto found that nothing can be shared …
    assert "no shared memory with" in log, log  # … and says so


def test_a_cut_line_gives_exact_answers_or_named_errors(pair, alone):
    wait_until(lambda: pair.at_rest()[1] == 0, 30, "all is at rest")
    free, _ = pair.at_rest()
    bodies = [make_body(100 + seed, 1200 + 16 * seed) for seed in range(24)]
    asking = pair.begin_asking(bodies, 6)
    wait_until(lambda: metric(NAMES[0], pair.workers[0], "tandem:kv_blocks_pinned") > 0, 20, "a transfer is running")
    time.sleep(0.3)
    cut = time.monotonic()
    ip("-n", NAMES[0], "link", "set", DEVICES[0], "down")
    time.sleep(CUT_S)
    ip("-n", NAMES[0], "link", "set", DEVICES[0], "up")
    joined = time.monotonic()

    results = pair.finish(asking)
    assert len(results) == len(bodies)
    assert sum(begin < cut < end for *_, begin, end in results) > 0  # the cut did hit somebody
    outcomes = {}
    for index, status, answer, begin, end in results:
        assert end - begin < TIMEOUT_S + 3, f"request {index} took {end - begin:.1f} s"
        if status == 200:
            assert read_answer(answer) == read_answer(http_json(alone.url + "/v1/completions", bodies[index])[1])
        else:
            assert status > 0 and answer["error"]["message"] and answer["error"]["type"], (status, answer)
        name = "exact" if status == 200 else f"{status} {answer['error'].get('code') or answer['error']['type']}"
        outcomes[name] = outcomes.get(name, 0) + 1
    print(f"cut for {joined - cut:.1f} s: {outcomes}; slowest {max(end - begin for *_, begin, end in results):.1f} s")

    later = [make_body(500 + seed, 300) for seed in range(4)]
    for index, status, answer, _, _ in pair.ask(later):
        assert status == 200, answer
        assert read_answer(answer) == read_answer(http_json(alone.url + "/v1/completions", later[index])[1])
    wait_until(lambda: pair.at_rest() == (free, 0), 30, "blocks and counters are back")
