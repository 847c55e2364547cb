"""How soon a server answers."""

import http.client
import json
import resource
import socket
import time

from conftest import DEMO, free_port

# It takes a tenth of a second on two cores; the promise is one second, and a busy test machine gets some more.
MOST_SECONDS = 3.0


def test_demo_serves_its_first_token_soon_after_exec(launcher):
    begin = time.monotonic()
    server = launcher.serve(wait=False)
    host, port = server.url.removeprefix("http://").split(":")
    while True:  # the port opens before the weights are loaded, and answers 503 until they are
        assert time.monotonic() - begin < 60, server.read_log()
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            body = {"model": "demo", "prompt": "In the beginning", "max_tokens": 4, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status == 200:
                assert response.readline().startswith(b"data: {")
                break
            assert response.status == 503, response.read()
        except OSError:
            pass
        time.sleep(0.005)
    seconds = time.monotonic() - begin
    print(f"first token {seconds:.3f} s after exec")
    assert seconds < MOST_SECONDS


def test_the_limit_of_open_files_is_raised_and_said_if_it_is_too_low(launcher):
    def run_with(soft, hard, arguments):
        port = free_port()
        server = launcher.start([*arguments, "--port", port], f"http://127.0.0.1:{port}",
                                lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))).wait_ready()
        now = resource.prlimit(server.popen.pid, resource.RLIMIT_NOFILE)
        log = server.read_log()
        server.stop()
        assert now == (hard, hard)
        return log

    serve = ["serve", DEMO, "--served-model-name", "demo"]
    low = run_with(128, 500, serve)
    assert low.count("RLIMIT_NOFILE") == 1 and "may have 500 files" in low and "4096 requests" in low, low
    assert "RLIMIT_NOFILE" not in run_with(128, 6000, serve)
    worker = launcher.serve()
    low = run_with(128, 500, ["route", "--decode", worker.url, "--max-concurrent-requests", 100, "--queue-size", 30])
    assert "100 requests (--max-concurrent-requests) and 30 that wait (--queue-size) take up to 586" in low, low
    assert "RLIMIT_NOFILE" not in run_with(128, 500, ["route", "--decode", worker.url, "--max-concurrent-requests", 50,
                                                      "--queue-size", 10])
