"""The router with real workers: traces, workers that come and go, and the modes of benchmarks."""

import http.server
import json
import signal
import threading
import time
import urllib.error
import urllib.request

import pytest
from conftest import free_port, http_json, wait_until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Takes OTLP over HTTP and keeps the spans by (service, name)."""

    def __init__(self):
        self.spans = {}
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/traces"
                for resource in body["resourceSpans"]:
                    service = resource["resource"]["attributes"][0]["value"]["stringValue"]
                    for span in resource["scopeSpans"][0]["spans"]:
                        collector.spans[service, span["name"]] = span
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def ask(url, headers=None, **fields):
    body = {"model": "demo", "prompt": "The LORD is my", "max_tokens": 8, "temperature": 0, **fields}
    return http_json(url + "/v1/completions", body, headers)


@pytest.fixture(scope="module")
def cluster(launcher):
    collector = Collector()
    otlp = ["--otlp-endpoint", collector.url]
    prefill = launcher.worker("kv_producer", "--log-name", "prefill", *otlp)
    decode = launcher.worker("kv_consumer", "--log-name", "decode", "--first-token-from", "decode", *otlp)
    router = launcher.route([prefill], [decode], "--log-name", "router", "--admin-api-key", "secret", *otlp)
    return collector, prefill, decode, router


def test_one_trace_through_all_legs_and_stages(cluster):
    collector, _, _, router = cluster
    status, answer = ask(router.url, {"traceparent": PARENT})
    assert status == 200
    expected = {
        ("router", "llm_request"),
        ("router", "decode"),
        ("router", "prefill"),
        ("decode", "llm_request"),
        ("decode", "queue"),
        ("decode", "receive"),
        ("decode", "decode"),
        ("prefill", "llm_request"),
        ("prefill", "queue"),
        ("prefill", "prefill"),
        ("prefill", "send"),
    }
    wait_until(lambda: expected <= set(collector.spans), what="every span")
    spans = collector.spans
    assert {span["traceId"] for span in spans.values()} == {PARENT.split("-")[1]}
    parent_of = {
        ("router", "llm_request"): PARENT.split("-")[2],
        ("router", "decode"): spans["router", "llm_request"]["spanId"],
        ("router", "prefill"): spans["router", "llm_request"]["spanId"],
        ("decode", "llm_request"): spans["router", "decode"]["spanId"],
        ("prefill", "llm_request"): spans["router", "prefill"]["spanId"],
        ("decode", "receive"): spans["decode", "llm_request"]["spanId"],
        ("prefill", "send"): spans["prefill", "llm_request"]["spanId"],
    }
    assert {key: spans[key]["parentSpanId"] for key in parent_of} == parent_of
    for span in spans.values():
        assert int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"])


def test_first_token_of_decode_is_that_of_prefill(cluster, launcher):
    _, _, decode, router = cluster
    alone = launcher.serve()
    # Through the split decode computes the prompt's last token again; alone it computes all.
    assert ask(router.url)[1]["choices"] == ask(alone.url)[1]["choices"]


def admin(router, method, path="/workers", body=None, key="secret"):
    request = urllib.request.Request(
        router.url + path,
        data=None if body is None else json.dumps(body).encode(),
        method=method,
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_workers_come_and_go(cluster, launcher):
    _, _, decode, router = cluster
    assert admin(router, "GET", key="wrong")[0] == 401
    other = launcher.serve()
    status, added = admin(router, "POST", body={"url": other.url, "role": "decode", "weight": 2})
    assert status == 201 and added["state"] == "serving" and added["weight"] == 2
    assert admin(router, "POST", body={"url": other.url, "role": "decode"})[0] == 400
    assert admin(router, "POST", body={"url": "nonsense://", "role": "decode"})[0] == 400
    assert admin(router, "POST", body={"url": other.url})[1]["error"]["param"] == "role"

    def state(url):
        listed = admin(router, "GET")[1]["workers"]
        return next(worker for worker in listed if worker["url"] == url)

    wait_until(lambda: state(other.url)["health"] == "up", what="the new worker")
    assert admin(router, "DELETE", f"/workers/{state(decode.url)['id']}")[0] == 202
    before = other.metric("vllm:generation_tokens_total")
    assert ask(router.url, max_tokens=1)[0] == 200  # one token: decode alone, and only the new one is left
    assert other.metric("vllm:generation_tokens_total") == before + 1
    assert state(decode.url)["state"] == "removed"
    assert admin(router, "POST", body={"url": decode.url, "role": "decode"})[1]["id"] == state(decode.url)["id"]
    assert admin(router, "DELETE", f"/workers/{added['id']}")[0] == 202
    assert admin(router, "DELETE", "/workers/99")[0] == 404
    wait_until(lambda: state(decode.url)["health"] == "up", what="the first worker")
    assert ask(router.url)[0] == 200


def test_without_a_key_there_is_no_admin_route(launcher):
    worker = launcher.serve()
    router = launcher.route([], [worker])
    assert admin(router, "GET")[0] == 404


def test_decode_alone_with_made_up_kv(launcher):
    config = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}
    worker = launcher.serve("--kv-transfer-config", json.dumps(config))
    status, answer = ask(worker.url, prompt=[5] * 1000, max_tokens=20, ignore_eos=True)
    assert status == 200 and answer["usage"]["completion_tokens"] == 20, answer
    # One row of the prompt and the rows of 19 tokens: nothing else was computed.
    assert worker.metric("vllm:iteration_tokens_total_sum") == 20
    assert "answers mean nothing" in worker.read_log()


def test_the_client_may_name_a_known_prefill_worker(launcher):
    first, second, third = (launcher.worker("kv_producer") for _ in range(3))
    decode = launcher.worker("kv_consumer")
    router = launcher.route([first, second], [decode], "--allowed-prefillers", third.url + "/",
                            "--admin-api-key", "secret")

    def computed(worker):
        return worker.metric("vllm:prompt_tokens_by_source_total", source="local_compute")

    expected = ask(router.url)[1]["choices"][0]["text"]
    wait_until(lambda: router.metric("tandem:router_worker_up") == 4, what="all workers")
    for chosen in (second, third, first, third):
        before = {worker: computed(worker) for worker in (first, second, third)}
        named = {"x-prefiller-host-port": chosen.url.removeprefix("http://")}
        prompt = f"{time.monotonic_ns()} verily"
        status, answer = ask(router.url, named, prompt=prompt)
        assert status == 200, answer
        changed = [worker for worker in before if computed(worker) > before[worker]]
        assert changed == [chosen]
    only_named = {worker["url"]: worker["only_named"] for worker in admin(router, "GET")[1]["workers"]}
    assert only_named == {first.url: False, second.url: False, third.url: True, decode.url: False}
    status, answer = ask(router.url, {"x-prefiller-host-port": decode.url.removeprefix("http://")})
    assert status == 400 and answer["error"]["param"] == "x-prefiller-host-port"
    assert decode.url.removeprefix("http://") in answer["error"]["message"]
    assert "--allowed-prefillers" in answer["error"]["message"]
    # Nobody is sent to a worker that only takes those who name it.
    before = computed(third)
    for i in range(6):
        assert ask(router.url, prompt=f"{i} and {time.monotonic_ns()}")[0] == 200
    assert computed(third) == before
    assert ask(router.url)[1]["choices"][0]["text"] == expected
    third.stop()
    wait_until(lambda: ask(router.url, named)[0] == 503, what="the refusal of a worker that is gone")
    assert ask(router.url)[0] == 200
    # A worker alone is no router.
    assert ask(decode.url, {"x-prefiller-host-port": "127.0.0.1:1"})[0] == 400


def test_one_prefill_is_handed_to_many_decodes(launcher):
    copies = 6
    prefill = launcher.worker("kv_producer")
    decodes = [launcher.worker("kv_consumer", "--no-enable-prefix-caching") for _ in range(2)]
    router = launcher.route([prefill], decodes, "--repeat-d-times", copies)
    prompt = list(range(300, 364))
    status, answer = ask(router.url, prompt=prompt, max_tokens=20, ignore_eos=True)
    assert status == 200 and answer["usage"]["completion_tokens"] == 20
    wait_until(lambda: router.metric("tandem:router_copies_total") == copies, 30, "all copies")
    assert router.metric("tandem:router_copies_total", outcome="same") == copies
    assert sum(d.metric("tandem:kv_transfers_total", outcome="received") for d in decodes) == 1 + copies
    assert sum(d.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") for d in decodes) > 0
    # The prompt once, and its last block for each copy.
    assert prefill.metric("vllm:prompt_tokens_by_source_total", source="local_compute") <= len(prompt) + copies * 16
    assert router.metric("tandem:router_requests_total", outcome="ok") == 1 + copies
    assert "benchmark mode" in router.read_log() and f"{copies} like the answer" in router.read_log()


def stream_in_background(url, max_tokens):
    """Asks for a long stream; gives the list of its lines, which grows, and the thread."""
    lines = []

    def run():
        body = {"model": "demo", "prompt": [5] * 20, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                "stream": True}
        request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            for line in response:
                if line.strip():
                    lines.append(line.decode().strip())

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: len(lines) >= 2, what="the first tokens")
    return lines, thread


@pytest.mark.parametrize("kind", ["serve", "route"])
def test_a_server_drains_when_it_is_told_to_end(launcher, kind):
    def start(timeout_s):
        worker = launcher.serve("--shutdown-timeout", timeout_s)
        return worker if kind == "serve" else launcher.route([], [worker], "--shutdown-timeout", timeout_s)

    server = start(30)
    lines, thread = stream_in_background(server.url, 1500)
    server.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: http_json(server.url + "/health") == (503, {"status": "draining"}), what="draining")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(server.url + "/v1/completions", b"{}",
                                                      {"Content-Type": "application/json"}), timeout=10)
    assert refused.value.code == 503 and int(refused.value.headers["Retry-After"]) >= 1
    assert json.loads(refused.value.read())["error"]["code"] == "draining"
    thread.join(30)
    assert lines[-1] == "data: [DONE]" and not any('"error"' in line for line in lines)
    assert server.popen.wait(5) == 0

    server = start(0.3)
    lines, thread = stream_in_background(server.url, 4000)
    begin = time.time()
    server.popen.send_signal(signal.SIGTERM)
    thread.join(10)
    assert any("shut down before the answer was complete" in line for line in lines[-2:]), lines[-2:]
    assert server.popen.wait(5) == 0 and time.time() - begin < 3

    server = start(60)
    lines, thread = stream_in_background(server.url, 4000)
    begin = time.time()
    server.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: http_json(server.url + "/health")[0] == 503, what="draining")
    server.popen.send_signal(signal.SIGTERM)
    thread.join(10)
    assert server.popen.wait(5) == 0 and time.time() - begin < 5
    assert any('"error"' in line for line in lines[-2:])
