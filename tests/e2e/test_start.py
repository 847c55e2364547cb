"""How soon a server answers."""

import http.client
import json
import socket
import time

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
