#!/usr/bin/env python3
"""Asks a server for completions from several threads and prints one JSON list: index, status (0: no HTTP answer), answer,
begin and end in seconds of the monotonic clock. The work comes on standard input: url, bodies, parallel, timeout_s."""

import json
import queue
import sys
import threading
import time
import urllib.error
import urllib.request


def ask(url, body, timeout_s):
    headers = {"Content-Type": "application/json", "X-Request-Timeout-Ms": str(int(timeout_s * 1000))}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s + 5) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except OSError as error:
        return 0, str(error)


def main():
    work = json.load(sys.stdin)
    todo = queue.SimpleQueue()
    for index, body in enumerate(work["bodies"]):
        todo.put((index, body))
    results = []

    def run():
        while True:
            try:
                index, body = todo.get_nowait()
            except queue.Empty:
                return
            begin = time.monotonic()
            status, answer = ask(work["url"], body, work["timeout_s"])
            results.append([index, status, answer, begin, time.monotonic()])

    threads = [threading.Thread(target=run) for _ in range(work["parallel"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
