"""Starts real tandem processes on loopback for the end-to-end tests."""

import contextlib
import json
import os
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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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

    def __init__(self, arguments, log_path, url):
        self.url = url
        self.log_path = log_path
        self.log = open(log_path, "w")
        self.popen = subprocess.Popen([str(TANDEM), *map(str, arguments)], stdout=self.log, stderr=self.log)

    def wait_ready(self, timeout_s=60):
        deadline = time.time() + timeout_s
        while time.time() < deadline:
            if self.popen.poll() is not None:
                raise AssertionError(f"exited with {self.popen.returncode}:\n{self.read_log()}")
            with contextlib.suppress(OSError):
                if http_json(self.url + "/health", timeout=2)[0] == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.read_log()}")

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


class Launcher:
    def __init__(self, folder):
        self.folder = folder
        self.processes = []

    def start(self, arguments, url):
        process = Process(arguments, self.folder / f"process-{len(self.processes)}.log", url)
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
