"""Prefill and decode whose KV blocks differ in size give the tokens and logprobs of one process."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import http_json, wait_until


def make_prompts():
    """Lengths around multiples of 16 and 64; prefixes that end inside blocks of either size; each prompt comes twice."""
    generator = random.Random(5)
    shared = [generator.randrange(300, 4000) for _ in range(300)]
    prompts = []
    for length in (1, 15, 16, 17, 47, 48, 49, 63, 64, 65, 79, 80, 81, 127, 128, 129, 191, 193, 255, 256, 257):
        prompts.append([generator.randrange(300, 4000) for _ in range(length)])
        prompts.append(shared[:length] + [generator.randrange(300, 4000) for _ in range(1 + length % 20)])
    return prompts * 2


PROMPTS = make_prompts()


def ask(url, index, prompt):
    body = {"model": "demo", "prompt": prompt, "max_tokens": 10, "logprobs": 2, "return_token_ids": True, "ignore_eos": True,
            "temperature": index % 2, "seed": 1000 + index % (len(PROMPTS) // 2)}
    status, answer = http_json(url + "/v1/completions", body)
    assert status == 200, answer
    choice = answer["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], \
        choice["finish_reason"]


def ask_all(url, parallel):
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda item: ask(url, *item), enumerate(PROMPTS)))


@pytest.fixture(scope="module")
def expected(launcher):
    alone = launcher.serve("--no-enable-prefix-caching", "--max-num-seqs", 1)
    answers = ask_all(alone.url, 1)
    alone.stop()
    return answers


@pytest.mark.parametrize("transport, name", [("shm", "shared memory"), ("tcp", "tcp/lo x4")])
@pytest.mark.parametrize("prefill_tokens, decode_tokens", [(64, 16), (16, 64)])
def test_answers_do_not_depend_on_block_sizes(launcher, expected, prefill_tokens, decode_tokens, transport, name):
    prefill = launcher.worker("kv_producer", "--block-size", prefill_tokens, "--kv-transport", transport)
    decode = launcher.worker("kv_consumer", "--block-size", decode_tokens, "--kv-transport", transport)
    router = launcher.route([prefill], [decode])
    assert ask_all(router.url, 4) == expected
    assert decode.metric("tandem:kv_transfers_total", outcome="received") == len(PROMPTS)
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 0
    assert decode.metric("vllm:prefix_cache_hits_total") > 3000  # of the second time, and of the shared prefixes
    for worker in (prefill, decode):
        wait_until(lambda: worker.metric("tandem:kv_blocks_pinned") == 0, what="no pinned blocks")
    assert f"over {name}; its blocks have {prefill_tokens} tokens, ours {decode_tokens}" in decode.read_log()
    for process in (router, prefill, decode):
        process.stop()


def test_other_differences_are_refused_with_both_values(launcher):
    prefill = launcher.worker("kv_producer", "--block-size", 64, "--kv-cache-dtype", "fp8")
    decode = launcher.worker("kv_consumer", "--block-size", 16)
    router = launcher.route([prefill], [decode], "--enforce-disagg")
    status, answer = http_json(router.url + "/v1/completions", {"model": "demo", "prompt": PROMPTS[5], "max_tokens": 4})
    assert status >= 400, answer
    log = decode.read_log() + prefill.read_log()
    assert "f8_e4m3 with scales" in log and "bf16" in log
    for process in (router, prefill, decode):
        process.stop()
