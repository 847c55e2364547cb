"""Prefill and decode on two hosts, here two sets of namespaces joined by a veth pair: KV travels over TCP."""

import json
import subprocess

import pytest

from conftest import DEMO, TANDEM, http_json, wait_until
from namespaces import ADDRESSES, NAMES, inside, two_namespaces


@pytest.fixture(scope="module")
def hosts():
    with two_namespaces():
        yield


def get(name, url, body=None):
    """An HTTP request made from inside a namespace."""
    script = ("import json,sys,urllib.request as u\n"
              "body=sys.argv[2].encode() or None\n"
              "r=u.urlopen(u.Request(sys.argv[1],body,{'Content-Type':'application/json'}),timeout=30)\n"
              "sys.stdout.write(r.read().decode())")
    done = subprocess.run(inside(name, "python3", "-c", script, url, json.dumps(body) if body else ""),
                          capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def test_answers_are_the_same_over_tcp(hosts, launcher, tmp_path):
    alone = launcher.serve()
    workers = []
    try:
        for name, address, role in zip(NAMES, ADDRESSES, ("kv_producer", "kv_consumer")):
            config = {"kv_connector": "NixlConnector", "kv_role": role, "kv_ip": address, "kv_port": 14579}
            command = [TANDEM, "serve", DEMO, "--host", address, "--port", 8100, "--served-model-name", "demo",
                       "--kv-transfer-config", json.dumps(config)]
            log = open(tmp_path / f"{role}.log", "w")
            # Namespaces of processes and shared memory too, or the two would find each other on one host.
            apart = ("unshare", "--pid", "--ipc", "--uts", "--mount-proc", "--fork", "--kill-child")
            workers.append(subprocess.Popen(inside(name, *apart, *command), stdout=log, stderr=log))
        command = [TANDEM, "route", "--port", 8000, "--prefill", f"http://{ADDRESSES[0]}:8100", "--decode",
                   f"http://{ADDRESSES[1]}:8100"]
        log = open(tmp_path / "router.log", "w")
        workers.append(subprocess.Popen(inside(NAMES[0], *command), stdout=log, stderr=log))
        wait_until(lambda: get(NAMES[0], "http://127.0.0.1:8000/health"), 30, "the router is ready")
        for length in (1, 16, 17, 200, 1500):
            body = {"model": "demo", "prompt": [300 + 7 * i % 3000 for i in range(length)], "max_tokens": 10,
                    "temperature": 0, "ignore_eos": True, "return_token_ids": True, "logprobs": 1}
            answer = json.loads(get(NAMES[0], "http://127.0.0.1:8000/v1/completions", body))["choices"][0]
            expected = http_json(alone.url + "/v1/completions", body)[1]["choices"][0]
            assert answer["token_ids"] == expected["token_ids"]
            assert answer["logprobs"]["token_logprobs"] == expected["logprobs"]["token_logprobs"]
        log = (tmp_path / "kv_consumer.log").read_text()
        assert "tcp" in log, log
        assert "NixlConnector" in log, log
    finally:
        for worker in workers:  # unshare passes no signal on but ends its child with itself
            worker.kill()
            worker.wait()
