"""Starts real tandem processes on loopback for the end-to-end tests."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
TANDEM = Path(os.environ.get("TANDEM_BINARY", ROOT / "build" / "tandem"))
DEMO = ROOT / "models" / "demo"


# Below the range from which the kernel takes the ports of outgoing connections: a port from that range can be taken
# by anybody's connection between its choice here and its use by the process under test.
FIRST_PORT, LAST_PORT = 10000, 32000
given_ports = set()


def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port(count=1):
    """The first of `count` ports in a row that nothing listens on; each is given out once in a run."""
    while True:
        first = random.randrange(FIRST_PORT, LAST_PORT - count)
        wanted = range(first, first + count)
        if given_ports.isdisjoint(wanted) and all(map(is_free, wanted)):
            given_ports.update(wanted)
            return first


def http_json(url, body=None, headers=None, timeout=60):
    """POSTs `body` (or GETs without one); returns (status, parsed JSON or text)."""
    data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except json.JSONDecodeError:
        return status, text


class Process:
    """One tandem process; its log is kept and shown when a test fails."""

    def __init__(self, arguments, log_path, url, before_exec=None):
        self.url = url
        self.log_path = log_path
        self.log = open(log_path, "w")
        self.popen = subprocess.Popen([str(TANDEM), *map(str, arguments)], stdout=self.log, stderr=self.log,
                                      preexec_fn=before_exec)

    def is_ready(self):
        with contextlib.suppress(OSError):
            return http_json(self.url + "/health", timeout=2)[0] == 200
        return False

    def wait_ready(self, timeout_s=60):
        deadline = time.time() + timeout_s
        while time.time() < deadline:
            if self.has_exited():
                raise AssertionError(f"exited with {self.popen.returncode}:\n{self.read_log()}")
            if self.is_ready():
                return self
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.read_log()}")

    def has_exited(self):
        return self.popen.poll() is not None

    def read_log(self):
        return Path(self.log_path).read_text()

    def metric(self, name, **labels):
        """Sum of the series of `name` that carry `labels`."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as response:
            text = response.read().decode()
        total, found = 0.0, False
        for line in text.splitlines():
            if not line.startswith(name + "{") and not line.startswith(name + " "):
                continue
            if all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
                found = True
        assert found, f"no series {name} {labels} at {self.url}"
        return total

    def client(self):
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    def stop(self):
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(10)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        self.log.close()


def wait_all_ready(processes, timeout_s=60):
    """For processes of which none is ready before all have met: the one that exits is the one to blame."""
    def settled():
        return any(p.has_exited() for p in processes) or all(p.is_ready() for p in processes)

    deadline = time.time() + timeout_s
    while not settled() and time.time() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.wait_ready(timeout_s=0.1)


class Launcher:
    def __init__(self, folder):
        self.folder = folder
        self.processes = []

    def start(self, arguments, url, before_exec=None):
        process = Process(arguments, self.folder / f"process-{len(self.processes)}.log", url, before_exec)
        self.processes.append(process)
        return process

    def serve(self, *options, model=DEMO, port=None, wait=True):
        port = port or free_port()
        process = self.start(["serve", model, "--port", port, "--served-model-name", "demo", *options],
                             f"http://127.0.0.1:{port}")
        return process.wait_ready() if wait else process

    def worker(self, role, *options, kv_port=None, connector="UcxConnector", port=None):
        config = {"kv_connector": connector, "kv_role": role, "kv_port": kv_port or free_port()}
        return self.serve("--kv-transfer-config", json.dumps(config), *options, port=port)

    def route(self, prefill, decode, *options, port=None):
        port = port or free_port()
        arguments = ["route", "--port", port]
        if prefill:
            arguments += ["--prefill", *[worker.url for worker in prefill]]
        arguments += ["--decode", *[worker.url for worker in decode]]
        return self.start([*arguments, *options], f"http://127.0.0.1:{port}").wait_ready()

    def stop(self):
        for process in reversed(self.processes):
            process.stop()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    started = Launcher(tmp_path_factory.mktemp("logs"))
    yield started
    started.stop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed and "launcher" in getattr(item, "funcargs", {}):
        for process in item.funcargs["launcher"].processes:
            report.sections.append((str(process.log_path), process.read_log()[-3000:]))


def wait_until(condition, timeout_s=10, what="condition"):
    """`condition` may raise OSError while a process is down."""
    deadline = time.time() + timeout_s
    while time.time() < deadline:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not hold within {timeout_s} s")
