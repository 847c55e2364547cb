#!/usr/bin/env python3
"""How much a long prompt disturbs running streams, on any OpenAI-compatible server.

usage: interfere.py URL STREAMS PROMPT_TOKENS [MODEL]
STREAMS completions run; six seconds later one prompt of PROMPT_TOKENS arrives. Prints the streams' gaps between tokens (seconds)
without it (median) and while it is being read (median, worst), and the long prompt's time to first token.
"""

import json, random, sys, threading, time, urllib.request

url, streams, prompt_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = sys.argv[4] if len(sys.argv) > 4 else "x"


def stream(length, max_tokens, seed, times):
    rng = random.Random(seed)
    body = dict(
        model=model,
        prompt=[rng.randrange(300, 20000) for _ in range(length)],
        stream=True,
        temperature=0,
        max_tokens=max_tokens,
        n_predict=max_tokens,
        ignore_eos=True,
        cache_prompt=False,
    )
    reply = urllib.request.urlopen(
        urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    )
    for line in reply:
        if line.startswith(b"data:") and b"[DONE]" not in line:
            times.append(time.time())


running = [[] for _ in range(streams)]
threads = [threading.Thread(target=stream, args=(16, 150, i, running[i])) for i in range(streams)]
[t.start() for t in threads]
time.sleep(6)
long_times, arrival = [], time.time()
stream(prompt_tokens, 2, 99, long_times)
[t.join() for t in threads]
first = long_times[0]
gaps = [(a, b) for times in running for a, b in zip(times, times[1:])]
quiet = sorted(b - a for a, b in gaps if b <= arrival or a >= first)
during = sorted(b - a for a, b in gaps if b > arrival and a < first)
print(
    json.dumps(
        dict(
            quiet_gap_p50=round(quiet[len(quiet) // 2], 4),
            during_gap_p50=round(during[len(during) // 2], 4),
            during_gap_max=round(during[-1], 4),
            gaps_during=len(during),
            long_ttft=round(first - arrival, 2),
        )
    )
)
