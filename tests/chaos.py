#!/usr/bin/env python3
"""Two prefill workers, two decode workers and a router under load while workers are killed, frozen and restarted.

    .venv/bin/python tests/chaos.py --seconds 600

What must hold, whatever happens to the workers:
  - an answer that completes equals the undisturbed one: token ids, logprobs and finish reason, with ==;
  - every other ends with a named error, within its deadline; nobody hangs, no stream just stops;
  - while only decode workers are killed (the second part), every request completes;
  - afterwards KV blocks, descriptors, memory and load counters are back where they were.

Exit status 0 if all of it held. The seed is printed; it decides requests and disturbances, not their timing.
"""

import argparse
import collections
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parents[1]
TANDEM = Path(os.environ.get("TANDEM_BINARY", ROOT / "build" / "tandem"))
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")

DEADLINE_S = 20.0  # of each request, sent with it
SLACK_S = 2.0      # the front end ends a request one second after its deadline if its worker has not
SHARE_OF_KILLS_ONLY = 0.3  # of the time: the second part


def free_ports(count):
    """Ports below those that the kernel gives to outgoing connections, which could take one while its worker is dead."""
    ports = []
    while len(ports) < count:
        port = random.randrange(10000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
    return ports


class Cluster:
    """`tandem up`, which starts a worker again when it dies."""

    def __init__(self, folder, model):
        ports = free_ports(1 + 2 * len(WORKERS))
        self.router_port, self.folder = ports[0], Path(folder)
        self.ports = dict(zip(WORKERS, ports[1:]))
        lines = [f"model: {model}", "options: {served-model-name: [demo], threads: 1, kv-cache-memory-bytes: 16M}", "workers:"]
        for name, kv_port in zip(WORKERS, ports[1 + len(WORKERS):]):
            lines.append(f"  - {{name: {name}, role: {name.split('-')[0]}, port: {self.ports[name]}, kv_port: {kv_port}}}")
        lines.append(f"router: {{port: {self.router_port}}}")
        file = self.folder / "cluster.yaml"
        file.write_text("\n".join(lines) + "\n")
        self.output = open(self.folder / "up.log", "w")
        self.process = subprocess.Popen([str(TANDEM), "up", str(file), "--run-dir", str(self.folder / "run")],
                                        stdout=self.output, stderr=self.output)

    def port(self, name):
        return self.router_port if name == "router" else self.ports[name]

    def get(self, name, path, timeout=2):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port(name)}{path}", timeout=timeout) as response:
            return response.read().decode()

    def pid(self, name):
        try:
            return int((self.folder / "run" / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None  # between its death and its next start

    def signal(self, name, number):
        pid = self.pid(name)
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def wait_ready(self, timeout_s=90):
        end = time.monotonic() + timeout_s
        for name in (*WORKERS, "router"):
            while True:
                if self.process.poll() is not None:
                    raise AssertionError("the launcher ended:\n" + (self.folder / "up.log").read_text()[-3000:])
                with contextlib.suppress(OSError):
                    self.get(name, "/health")
                    break
                assert time.monotonic() < end, f"{name} is not ready after {timeout_s} s"
                time.sleep(0.05)
        # The router's own view follows its probes.
        while self.metric("router", "tandem:router_worker_up") < len(WORKERS):
            assert time.monotonic() < end, "the router does not see all workers up"
            time.sleep(0.05)

    def metric(self, name, metric, label=""):
        total = 0.0
        for line in self.get(name, "/metrics", timeout=10).splitlines():
            if line.startswith((metric + "{", metric + " ")) and label in line:
                total += float(line.rsplit(" ", 1)[1])
        return total

    def stop(self):
        for name in WORKERS:
            self.signal(name, signal.SIGCONT)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.output.close()


class Pulse(threading.Thread):
    """Notes when the whole machine stood still (a suspended or overloaded host): that is no fault of the program."""

    def __init__(self):
        super().__init__(daemon=True)
        self.pauses = []
        self.start()

    def run(self):
        last = time.monotonic()
        while True:
            time.sleep(0.1)
            now = time.monotonic()
            if now - last > 1.0:
                self.pauses.append((last, now))
            last = now

    def seconds_within(self, begin, end):
        return sum(max(0.0, min(end, b) - max(begin, a)) for a, b in list(self.pauses))


def make_requests():
    """The same for every run: greedy and seeded, short and long, whole and streamed."""
    draw = random.Random(7)
    requests = []
    for i in range(48):
        prompt = [draw.randrange(300, 4000) for _ in range(draw.choice((5, 40, 150, 600, 1500)))]
        body = {"model": "demo", "prompt": prompt, "max_tokens": draw.choice((1, 8, 40, 120, 300)), "logprobs": 2,
                "return_token_ids": True, "ignore_eos": True, "stream": i % 3 != 0}
        if i % 2:
            body.update(temperature=0.9, top_p=0.9, seed=1000 + i, repetition_penalty=1.1, presence_penalty=0.3)
        else:
            body.update(temperature=0)
        requests.append(body)
    return requests


class Ended(Exception):
    """How a request ended other than with an answer: ("error", name) or ("broken" | "hang" | "left", what)."""


class Answer:
    def __init__(self):
        self.tokens, self.logprobs, self.top, self.finish = [], [], [], None

    def add(self, choice):
        self.tokens += choice.get("token_ids") or []
        if choice.get("logprobs"):
            self.logprobs += choice["logprobs"]["token_logprobs"]
            self.top += choice["logprobs"]["top_logprobs"]
        self.finish = choice.get("finish_reason") or self.finish

    def key(self):
        return self.tokens, self.logprobs, self.top, self.finish


def name_of_error(error, status):
    if not error.get("message") or not error.get("type"):
        raise Ended("broken", f"an error without a name: {error}")
    raise Ended("error", f"{status} {error.get('code') or error['type']}")


def ask_plain(port, body, leave_after=None):
    """One request over a socket of its own; leaves after so many tokens if asked to."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S + SLACK_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json", "X-Request-Timeout-Ms": str(int(DEADLINE_S * 1000))})
        response = connection.getresponse()
        answer = Answer()
        if response.status != 200 or not body["stream"]:
            whole = json.loads(response.read())
            if response.status != 200:
                name_of_error(whole["error"], response.status)
            answer.add(whole["choices"][0])
            return answer
        for line in response:
            if line == b"data: [DONE]\n":
                if answer.finish is None:
                    raise Ended("broken", "[DONE] without a finish reason")
                return answer
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                name_of_error(event["error"], "stream")
            for choice in event["choices"]:
                answer.add(choice)
            if leave_after is not None and len(answer.tokens) >= leave_after:
                raise Ended("left", "")
        raise Ended("broken", "a stream that just stops")
    except TimeoutError as error:
        raise Ended("hang", str(error)) from error
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise Ended("broken", f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()


def ask_openai(port, body):
    """The same through the openai client."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0,
                           timeout=DEADLINE_S + SLACK_S)
    arguments = {key: value for key, value in body.items() if key in ("model", "prompt", "max_tokens", "logprobs", "stream",
                                                                      "temperature", "top_p", "seed", "presence_penalty")}
    answer = Answer()
    try:
        with client:
            result = client.completions.create(
                **arguments, extra_headers={"X-Request-Timeout-Ms": str(int(DEADLINE_S * 1000))},
                extra_body={key: value for key, value in body.items() if key not in arguments})
            for part in result if body["stream"] else [result]:
                for choice in part.choices:
                    answer.add(choice.model_dump())
        if answer.finish is None:
            raise Ended("broken", "a stream that just stops")
        return answer
    except openai.APITimeoutError as error:
        raise Ended("hang", str(error)) from error
    except openai.APIConnectionError as error:
        raise Ended("broken", str(error)) from error
    except openai.APIError as error:
        name_of_error({"message": error.message, "type": error.type, "code": error.code},
                      getattr(error, "status_code", "stream"))


class Load:
    """Clients that ask one request after the other and judge every answer."""

    def __init__(self, port, pulse, seed, num_clients):
        self.port, self.pulse, self.seed, self.num_clients = port, pulse, seed, num_clients
        self.requests, self.expected = make_requests(), []
        self.lock = threading.Lock()
        self.problems = []
        self.counts = collections.Counter()
        self.slowest_s = 0.0

    def record(self):
        """The undisturbed answers, one after the other."""
        for body in self.requests:
            self.expected.append(ask_plain(self.port, body).key())
        assert len({tuple(key[0]) for key in self.expected}) > len(self.requests) // 2, "answers do not differ"

    def ask_one(self, index, how, leave_after=None, salt=""):
        begin = time.monotonic()
        body = {**self.requests[index], **({"cache_salt": salt} if salt else {})}
        try:
            answer = ask_openai(self.port, body) if how == "openai" else ask_plain(self.port, body, leave_after)
            outcome = ("ok", "") if answer.key() == self.expected[index] else \
                ("different", f"request {index} by {how}: {answer.tokens} instead of {self.expected[index][0]}")
        except Ended as ended:
            outcome = ended.args
        end = time.monotonic()
        if outcome[0] != "ok":
            time.sleep(0.3)  # a pause that has just ended is noted by then
        paused_s = self.pulse.seconds_within(begin - 1, end)
        took_s = end - begin - paused_s
        if took_s > DEADLINE_S + SLACK_S and outcome[0] != "hang":
            outcome = ("late", f"{took_s:.1f} s: {outcome}")
        with self.lock:
            if paused_s > 0 and outcome[0] in ("error", "hang"):
                self.counts["error while the machine stood still"] += 1
                return
            self.counts[" ".join(filter(None, outcome)) if outcome[0] == "error" else outcome[0]] += 1
            self.slowest_s = max(self.slowest_s, took_s)
            if outcome[0] not in ("ok", "left", "error"):
                self.problems.append(f"{outcome[0]}: {outcome[1]}")

    def run_all(self):
        """Every request once, by all clients together; all must succeed."""
        before = self.counts["ok"]
        queue = collections.deque(range(len(self.requests)))

        def work():
            while True:
                try:
                    index = queue.popleft()
                except IndexError:
                    return
                self.ask_one(index, "plain")

        self.join([threading.Thread(target=work) for _ in range(self.num_clients)])
        failed = before + len(self.requests) - self.counts["ok"]
        if failed:
            self.problems.append(f"{failed} of {len(self.requests)} undisturbed requests failed: {dict(self.counts)}")

    @staticmethod
    def join(threads):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def start_until(self, stop):
        def work(number):
            draw = random.Random(f"{self.seed} client {number}")
            while not stop.is_set():
                index = draw.randrange(len(self.requests))
                how = "openai" if number == 0 else "plain"
                leaves = number == 1 and draw.random() < 0.5  # one client often goes away in the middle
                # Most prompts are new to every prefix cache, so that their KV travels.
                salt = f"{self.seed} {number} {draw.random()}" if draw.random() < 0.7 else ""
                self.ask_one(index, how, draw.randrange(1, 20) if leaves else None, salt)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(self.num_clients)]
        for thread in threads:
            thread.start()
        return threads


class Disturber:
    def __init__(self, cluster, seed, every_s):
        self.cluster, self.every_s = cluster, every_s
        self.draw = random.Random(f"{seed} disturber")
        self.counts = collections.Counter()
        self.timers = []

    def disturb(self, kills_only):
        name = self.draw.choice(WORKERS[2:] if kills_only else WORKERS)
        action = "kill" if kills_only else self.draw.choice(("kill", "kill", "freeze", "freeze", "restart"))
        number = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "restart": signal.SIGTERM}[action]
        if not self.cluster.signal(name, number):
            return
        self.counts[action] += 1
        seconds = self.draw.uniform(1, 14)  # longer than the router's patience now and then
        if action == "freeze":
            timer = threading.Timer(seconds, self.cluster.signal, (name, signal.SIGCONT))
            timer.daemon = True
            timer.start()
            self.timers.append(timer)

    def run(self, seconds, kills_only):
        end = time.monotonic() + seconds
        while time.monotonic() + self.every_s < end:
            time.sleep(self.every_s)
            self.disturb(kills_only)
        time.sleep(max(0.0, end - time.monotonic()))

    def calm(self):
        for timer in self.timers:
            timer.cancel()
        for name in WORKERS:
            self.cluster.signal(name, signal.SIGCONT)


def shared_memory_bytes():
    status = os.statvfs("/dev/shm")
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def measure(cluster):
    """What must come back: by process, and /dev/shm as a whole."""
    found = {}
    for name in (*WORKERS, "router"):
        pid = cluster.pid(name)
        links = []
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
        rss_kib = next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                       if line.startswith("VmRSS"))
        found[name] = {"descriptors": len(links), "sockets": sum(link.startswith("socket:") for link in links),
                       "rss MiB": rss_kib / 1024}
        if name != "router":
            found[name]["free blocks"] = cluster.metric(name, "tandem:kv_blocks_available")
            found[name]["at work"] = sum(cluster.metric(name, metric) for metric in
                                         ("tandem:kv_blocks_pinned", "vllm:num_requests_running", "vllm:num_requests_waiting"))
    found["router"]["at work"] = cluster.metric("router", "tandem:router_worker_requests") + \
        cluster.metric("router", "tandem:router_worker_tokens")
    return found


# How far a figure may be above where it was. Blocks and counters: not at all. Descriptors: kept HTTP connections, of
# which each client of the load may leave one per worker. Memory: what the allocator keeps of the peak.
ALLOWED = {"free blocks": lambda _: 0, "at work": lambda _: 0, "descriptors": lambda clients: 2 * clients,
           "sockets": lambda clients: 2 * clients, "rss MiB": lambda _: 32}


def compare(before, after, num_clients):
    problems = []
    for name, figures in after.items():
        for what, value in figures.items():
            drift, allowed = value - before[name][what], ALLOWED[what](num_clients)
            if drift > allowed or (allowed == 0 and drift != 0):
                problems.append(f"{name}: {what} {value:.0f}, at the start {before[name][what]:.0f}")
    return problems


def settle(cluster, limit_s=15):
    """Until nothing is at work any more; then what remains is what stays."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and any(figures["at work"] for figures in measure(cluster).values()):
        time.sleep(0.1)
    time.sleep(1)


def run(seconds, seed, folder, every_s=5.0, num_clients=6, model=ROOT / "models" / "demo", say=print):
    """Returns the list of what did not hold."""
    pulse = Pulse()
    cluster = Cluster(folder, model)
    try:
        cluster.wait_ready()
        load = Load(cluster.router_port, pulse, seed, num_clients)
        load.record()
        for _ in range(2):
            load.run_all()
        settle(cluster)
        before, shared_before = measure(cluster), shared_memory_bytes()
        problems = list(load.problems)
        disturber = Disturber(cluster, seed, every_s)
        for part, kills_only, share in (("everything", False, 1 - SHARE_OF_KILLS_ONLY),
                                        ("decode workers killed", True, SHARE_OF_KILLS_ONLY)):
            load.counts, load.problems, load.slowest_s = collections.Counter(), [], 0.0
            moved = [cluster.metric("router", f"tandem:router_{what}_total") for what in ("retries", "migrations")]
            stop = threading.Event()
            threads = load.start_until(stop)
            disturber.counts.clear()
            disturber.run(seconds * share, kills_only)
            disturber.calm()
            stop.set()
            for thread in threads:
                thread.join()
            moved = [cluster.metric("router", f"tandem:router_{what}_total") - was
                     for what, was in zip(("retries", "migrations"), moved)]
            say(f"{part}: {dict(disturber.counts)}; {dict(load.counts)}; {moved[0]:.0f} repeated, {moved[1]:.0f} moved; "
                f"slowest {load.slowest_s:.1f} s")
            problems += load.problems
            if kills_only:
                problems += [f"killing decode workers cost requests: {what}" for what in load.counts
                             if what.startswith("error ") and "stood still" not in what]
            cluster.wait_ready()
        for _ in range(2):
            load.run_all()
        settle(cluster)
        after, shared_after = measure(cluster), shared_memory_bytes()
        for name in after:
            say(f"{name}: " + ", ".join(f"{what} {before[name][what]:.0f} -> {value:.0f}"
                                        for what, value in after[name].items()))
        say(f"/dev/shm: {shared_before >> 20} -> {shared_after >> 20} MiB; machine stood still: {len(pulse.pauses)} times")
        return problems + compare(before, after, num_clients)
    finally:
        cluster.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two disturbances")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--keep", help="folder for the logs; without it they are kept only after a failure")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    folder = arguments.keep or tempfile.mkdtemp(prefix="tandem-chaos-")
    os.makedirs(folder, exist_ok=True)
    problems = run(arguments.seconds, arguments.seed, folder, arguments.every, arguments.clients)
    for problem in problems:
        print("NOT HELD:", problem)
    print("all of it held" if not problems else f"{len(problems)} problems; logs in {folder}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
