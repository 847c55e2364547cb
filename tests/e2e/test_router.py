"""The router with real workers: traces, workers that come and go, and the modes of benchmarks."""

import http.server
import json
import threading
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
