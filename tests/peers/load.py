#!/usr/bin/env python3
"""Closed-loop load on any OpenAI-compatible server: CLIENTS workers stream REQUESTS completions of random token ids.

usage: load.py URL CLIENTS REQUESTS PROMPT_TOKENS OUTPUT_TOKENS [MODEL]
Prints one JSON line: output and total tokens per second, TTFT and inter-token latency in seconds.
"""

import json, random, sys, threading, time, urllib.request

url, clients, requests, prompt_tokens, output_tokens = sys.argv[1], *map(int, sys.argv[2:6])
model = sys.argv[6] if len(sys.argv) > 6 else "x"
lock, todo, done = threading.Lock(), iter(range(requests)), []


def completion(seed):
    rng = random.Random(seed)
    body = dict(
        model=model,
        prompt=[rng.randrange(300, 20000) for _ in range(prompt_tokens)],
        stream=True,
        temperature=0,
        max_tokens=output_tokens,
        n_predict=output_tokens,
        ignore_eos=True,
        cache_prompt=False,
    )
    start = time.time()
    reply = urllib.request.urlopen(
        urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    )
    return start, [time.time() for line in reply if line.startswith(b"data:") and b"[DONE]" not in line]


def client():
    while True:
        with lock:
            seed = next(todo, None)
        if seed is None:
            return
        result = completion(seed)
        with lock:
            done.append(result)


begin = time.time()
threads = [threading.Thread(target=client) for _ in range(clients)]
[t.start() for t in threads]
[t.join() for t in threads]
elapsed = time.time() - begin
tokens = sum(len(times) for _, times in done)
ttft = sorted(times[0] - start for start, times in done)
itl = sorted(b - a for _, times in done for a, b in zip(times, times[1:]))
print(
    json.dumps(
        dict(
            clients=clients,
            requests=requests,
            seconds=round(elapsed, 2),
            output_tok_s=round(tokens / elapsed, 2),
            total_tok_s=round((tokens + requests * prompt_tokens) / elapsed, 1),
            ttft_p50=round(ttft[len(ttft) // 2], 3),
            itl_p50=round(itl[len(itl) // 2], 4),
            itl_p99=round(itl[int(len(itl) * 0.99)], 4),
        )
    )
)
