"""--api-server-count: several front ends behind one port, which together say what one would."""

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

from conftest import http_json, wait_until
from test_ranks import PROMPTS, Stream, health, rank_pids, start_ranks
from test_topologies import ask, body_of, expected, read_answer  # noqa: F401 (a fixture)

COUNT = 3


def worker_requests(server):
    """Requests in flight, by front end."""
    status, text = http_json(server.url + "/metrics")
    assert status == 200
    found = {}
    for labels, value in re.findall(r"^tandem:router_worker_requests\{(.*)\} (\S+)$", text, re.MULTILINE):
        name = re.search(r'api_server="(\d+)"', labels).group(1)
        found[name] = found.get(name, 0) + float(value)
    return found


def test_several_front_ends_answer_as_one(launcher, expected):  # noqa: F811
    server = start_ranks(launcher, 3, "--api-server-count", COUNT)
    assert f"{COUNT} front ends" in server.read_log()
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda item: ask(server.url, *item), enumerate(PROMPTS))) == expected[:len(PROMPTS)]
    assert server.metric("vllm:request_success_total") == len(PROMPTS), "of all front ends together"
    assert server.metric("tandem:router_requests_total", outcome="ok") == len(PROMPTS)

    streams = [Stream(server.url, i % 8, 300) for i in range(24)]
    seen = set()

    def is_spread():
        shown = worker_requests(server)
        assert set(shown) == {str(i) for i in range(COUNT)}
        seen.update(name for name, requests in shown.items() if requests > 0)
        return len(seen) > 1

    wait_until(is_spread, 20, "more than one front end has requests")
    loads = [http_json(server.url + "/load")[1]["server_load"] for _ in range(6)]
    assert max(loads) > max(worker_requests(server).values()) or max(loads) == 24, "whoever is asked counts all"
    for stream in streams:
        stream.join()
        assert stream.answer[0] == 200
    wait_until(lambda: http_json(server.url + "/load")[1]["server_load"] == 0, 5, "nothing runs")
    server.stop()
    assert server.popen.returncode == 0


def test_all_front_ends_know_of_a_lost_rank(launcher):
    server = start_ranks(launcher, 3, "--rank-timeout", 2, "--api-server-count", COUNT)
    streams = [Stream(server.url, i, 150) for i in range(8)]
    wait_until(lambda: sum(worker_requests(server).values()) == 8, 10, "all run")
    os.kill(rank_pids(server)[1], signal.SIGKILL)

    def say(status):
        return all(health(server)[0] == status for _ in range(20))  # each asks over a connection of its own

    wait_until(lambda: say(503), 10, "every front end tells the loss")
    assert "rank 1 " in json.dumps(health(server)[1])
    wait_until(lambda: say(200), 30, "every front end serves again")
    alone = launcher.serve()
    for index, stream in enumerate(streams):
        stream.join()
        wanted = http_json(alone.url + "/v1/completions", body_of(index, PROMPTS[index]) | {"max_tokens": 150})
        assert stream.answer[0] == 200, stream.answer
        assert read_answer(stream.answer[1]) == read_answer(wanted[1])
    server.stop()
