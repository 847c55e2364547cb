"""`tandem check` on two hosts, here two sets of namespaces joined by a veth pair: what is wrong is found, with its remedy."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from conftest import DEMO, TANDEM, free_port
from namespaces import ADDRESSES, NAMES, inside, ip, two_namespaces

NOBODY = "10.93.47.9"
# Namespaces of processes and shared memory too, or the two would find each other on one host.
APART = ("unshare", "--pid", "--ipc", "--uts", "--mount-proc", "--fork", "--kill-child")
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.fixture(scope="module")
def hosts():
    with two_namespaces():
        yield


def copy_model(folder):
    """The demo model as "model" in `folder`; its large files are not copied."""
    model = folder / "model"
    model.mkdir(parents=True)
    for file in MODEL_FILES:
        (model / file).symlink_to(DEMO / file)
    return model


class Pair:
    """Two hosts: the check runs on the first, an agent on the second, each in a folder of its own with a model."""

    def __init__(self, folder):
        self.folders = (folder / "a", folder / "b")
        self.models = [copy_model(path) for path in self.folders]
        self.processes = []
        self.file = self.folders[0] / "cluster.yaml"
        self.write(f"  - {{role: prefill, host: {ADDRESSES[0]}}}\n  - {{role: decode, host: {ADDRESSES[1]}}}\n")

    def write(self, workers):
        options = "options: {threads: 1, kv-cache-memory-bytes: 64M}\n"
        self.file.write_text(f"model: model\n{options}workers:\n{workers}")

    def start(self, command, is_ready):
        process = subprocess.Popen(command, cwd=self.folders[1], stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        line = process.stdout.readline()
        assert is_ready in line, line

    def start_agent(self, program=TANDEM):
        self.start(inside(NAMES[1], *APART, program, "check-agent", "--host", ADDRESSES[1], "--lifetime-s", 60),
                   "answering `tandem check`")

    def check(self, *options):
        return subprocess.run(inside(NAMES[0], *APART, TANDEM, "check", self.file, *options), cwd=self.folders[0],
                              capture_output=True, text=True, timeout=60)

    def errors(self):
        """Exit code 1, and its errors; the table has the same ones."""
        done = self.check("--json")
        assert done.returncode == 1, done.stdout + done.stderr
        result = json.loads(done.stdout)
        assert not result["ok"]
        return [finding for finding in result["findings"] if finding["state"] == "error"]

    def stop(self):
        for process in self.processes:  # unshare passes no signal on but ends its child with itself
            process.kill()
            process.wait()


@pytest.fixture
def pair(hosts, tmp_path):
    pair = Pair(tmp_path)
    yield pair
    pair.stop()


def test_a_good_cluster_passes(pair):
    pair.start_agent()
    done = pair.check("--verbose")
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (f"{ADDRESSES[0]} -> {ADDRESSES[1]}  decode's kv_port 14580",
                 f"{ADDRESSES[1]} -> {ADDRESSES[0]}  prefill's kv_port 14579"):
        assert line in done.stdout, done.stdout
    for pair_name in (f"{ADDRESSES[0]} -> {ADDRESSES[1]}", f"{ADDRESSES[1]} -> {ADDRESSES[0]}"):
        lines = [line for line in done.stdout.splitlines() if pair_name in line and "KV transport" in line]
        assert len(lines) == 1 and "tcp/" in lines[0], done.stdout
    result = json.loads(pair.check("--json").stdout)
    assert result["ok"] and {f["category"] for f in result["findings"]} >= {
        "hosts", "ports", "clocks", "transport", "limits", "processors", "memory", "program", "model"}
    # What the check held open is free again.
    assert pair.check().returncode == 0


def test_ranks_over_two_hosts_pass(pair):
    pair.write(f"  - {{role: both, nodes: [{ADDRESSES[0]}, {ADDRESSES[1]}], options: {{data-parallel-size: 2, "
               "enable-expert-parallel: true}}\n")
    pair.start_agent()
    done = pair.check("--verbose")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data-parallel-rpc-port 29550" in done.stdout
    refused = subprocess.run([TANDEM, "up", pair.file], cwd=pair.folders[0], capture_output=True, text=True)
    assert refused.returncode == 1 and "`tandem up` starts processes on this host only" in refused.stderr
    shown = subprocess.run([TANDEM, "up", pair.file, "--dry-run"], cwd=pair.folders[0], capture_output=True, text=True)
    assert shown.returncode == 0 and "--headless" in shown.stdout


def test_a_host_without_an_agent_is_named(pair):
    errors = pair.errors()
    assert [e["where"] for e in errors] == [ADDRESSES[1]]
    assert errors[0]["value"] == f"no agent on {ADDRESSES[1]}: {ADDRESSES[1]}:14500 refused"
    assert f"tandem check-agent --host {ADDRESSES[1]}" in errors[0]["remedy"]


def test_a_wrong_address_is_found(pair):
    pair.write(f"  - {{role: prefill, host: {ADDRESSES[0]}}}\n  - {{role: decode, host: {NOBODY}}}\n")
    errors = pair.errors()
    assert all(NOBODY in e["where"] for e in errors), errors
    agent = [e for e in errors if e["what"] == "agent"]
    assert len(agent) == 1 and agent[0]["value"].startswith(f"no agent on {NOBODY}"), errors
    assert "correct `host` in the cluster file" in agent[0]["remedy"]


def test_a_taken_port_is_found_on_its_host(pair):
    pair.start_agent()
    owner = f"import socket,time;s=socket.socket();s.bind(('{ADDRESSES[1]}',8200));s.listen();print('ready',flush=True);time.sleep(60)"
    pair.start(inside(NAMES[1], "python3", "-c", owner), "ready")
    errors = pair.errors()
    assert [(e["where"], e["what"], e["value"]) for e in errors] == [(ADDRESSES[1], "decode's port 8200", "taken")]
    assert "sport = :8200" in errors[0]["remedy"]


def test_a_blocked_port_is_found(pair):
    # As a firewall that drops: answers from the port find no way out of its host.
    rule = ("ipproto", "tcp", "sport", "14580", "blackhole")
    made = ip("-n", NAMES[1], "rule", "add", *rule, check=False)
    if made.returncode != 0:
        pytest.skip(f"this kernel has no routing rules for ports: {made.stderr.strip()}")
    try:
        pair.start_agent()
        errors = pair.errors()
        assert [(e["where"], e["what"]) for e in errors] == [(f"{ADDRESSES[0]} -> {ADDRESSES[1]}", "decode's kv_port 14580")]
        assert errors[0]["value"].startswith("timed out")
        assert f"a firewall drops it: allow TCP port 14580 from {ADDRESSES[0]}" in errors[0]["remedy"]
    finally:
        ip("-n", NAMES[1], "rule", "del", *rule)


def test_a_differing_model_is_found(pair):
    config = pair.models[1] / "config.json"
    text = config.read_text()
    config.unlink()
    assert '"rope_theta": ' in text
    at = text.index('"rope_theta": ') + len('"rope_theta": ')
    config.write_text(text[:at] + str((int(text[at]) + 1) % 9 + 1) + text[at + 1:])  # one byte
    pair.start_agent()
    errors = pair.errors()
    assert [(e["where"], e["what"]) for e in errors] == [(f"decode on {ADDRESSES[1]}", "config.json")]
    assert "copy the same model folder to every host" in errors[0]["remedy"]


def test_a_differing_program_is_found(pair, tmp_path):
    other = tmp_path / "tandem"
    shutil.copy(TANDEM, other)
    with open(other, "ab") as program:
        program.write(b"x")
    pair.start_agent(other)
    errors = pair.errors()
    assert [(e["where"], e["what"]) for e in errors] == [(ADDRESSES[1], "tandem")]
    assert f"install the same tandem on {ADDRESSES[0]} and {ADDRESSES[1]}" in errors[0]["remedy"]


def test_an_agent_that_stands_still_costs_a_bounded_time(pair):
    pair.start_agent()
    outer = pair.processes[0].pid  # unshare, whose child is the agent
    with open(f"/proc/{outer}/task/{outer}/children") as children:
        os.kill(int(children.read().split()[0]), signal.SIGSTOP)
    begin = time.time()
    errors = pair.errors()
    assert time.time() - begin < 10
    assert [(e["where"], e["what"]) for e in errors] == [(ADDRESSES[1], "agent")], errors


def test_one_host_is_checked_without_an_agent(tmp_path):
    copy_model(tmp_path)
    with socket.socket() as kv:
        kv.bind(("127.0.0.1", 0))
        port = kv.getsockname()[1]
        (tmp_path / "cluster.yaml").write_text(
            f"model: model\noptions: {{threads: 1, kv-cache-memory-bytes: 64M}}\nworkers: [{{role: both, port: {port}}}]\n")
        command = [TANDEM, "check", "cluster.yaml"]
        taken = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert taken.returncode == 1 and "taken" in taken.stdout, taken.stdout
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("options, fault", [
    ("tensor-parallel-size: 3", "num_attention_heads of"),
    ("data-parallel-size: 3, enable-expert-parallel: true, enable-eplb: true, eplb-config: {num_redundant_experts: 3}",
     "16 experts and 3 redundant ones do not divide evenly by 3 ranks"),
    ("data-parallel-size: 17, enable-expert-parallel: true", "17 ranks cannot share 16 experts"),
])
def test_ranks_that_cannot_share_the_model_are_found(tmp_path, options, fault):
    copy_model(tmp_path)
    (tmp_path / "cluster.yaml").write_text(
        f"model: model\noptions: {{threads: 1, kv-cache-memory-bytes: 64M}}\n"
        f"workers: [{{role: both, port: {free_port()}, options: {{{options}}}}}]\n")
    done = subprocess.run([TANDEM, "check", "cluster.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and fault in done.stdout, done.stdout
    assert "instruction set" not in done.stdout  # one fault, one line
