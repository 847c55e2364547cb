"""The same request gives the same tokens and logprobs in one process, through push and through pull."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import http_json, wait_until
from prompts import make_prompts

PROMPTS = make_prompts()
MAX_TOKENS = 12


def body_of(index, prompt):
    body = {"model": "demo", "prompt": prompt, "max_tokens": MAX_TOKENS, "logprobs": 2, "return_token_ids": True,
            "ignore_eos": True}
    if index % 2:
        body.update(temperature=0.9, top_p=0.9, seed=1000 + index, repetition_penalty=1.1, presence_penalty=0.3)
    else:
        body.update(temperature=0)
    return body


def read_answer(answer):
    choice = answer["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], \
        choice["finish_reason"]


def ask(url, index, prompt):
    status, answer = http_json(url + "/v1/completions", body_of(index, prompt))
    assert status == 200, answer
    return read_answer(answer)


def ask_all(url, parallel):
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda item: ask(url, *item), enumerate(PROMPTS)))


@pytest.fixture(scope="module")
def expected(launcher):
    alone = launcher.serve("--no-enable-prefix-caching", "--max-num-seqs", 1)
    answers = ask_all(alone.url, 1)
    alone.stop()
    return answers


@pytest.fixture(scope="module")
def workers(launcher):
    return launcher.worker("kv_producer"), launcher.worker("kv_consumer")


def test_answers_differ_at_all(expected):
    assert len({tuple(answer[0]) for answer in expected}) > 90


def test_batched_in_one_process(launcher, expected):
    server = launcher.serve("--max-num-batched-tokens", 64)
    assert ask_all(server.url, 16) == expected
    server.stop()


def test_push_through_the_router(launcher, workers, expected):
    prefill, decode = workers
    router = launcher.route([prefill], [decode])
    before = decode.metric("tandem:kv_transfers_total", outcome="received")
    assert ask_all(router.url, 8) == expected
    assert decode.metric("tandem:kv_transfers_total", outcome="received") - before == len(PROMPTS)
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 0
    for worker in workers:
        wait_until(lambda: worker.metric("tandem:kv_blocks_pinned") == 0, what="no pinned blocks")
        assert "over shared memory" in worker.read_log()  # what auto means within a host


def pull(prefill, decode, index, prompt, **more):
    request_id = {"X-Request-Id": str(uuid.uuid4())}
    body = {**body_of(index, prompt), **more}
    params = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
              "remote_host": None, "remote_port": None}
    status, first = http_json(prefill.url + "/v1/completions",
                              {**body, "max_tokens": 1, "kv_transfer_params": params}, request_id)
    assert status == 200, first
    status, answer = http_json(decode.url + "/v1/completions",
                               {**body, "prompt": "ignored", "kv_transfer_params": first["kv_transfer_params"]}, request_id)
    assert status == 200, answer
    return read_answer(answer)


def test_pull_with_kv_transfer_params(workers, expected):
    prefill, decode = workers
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda item: pull(prefill, decode, *item), enumerate(PROMPTS)))
    assert answers == expected
    for worker in workers:
        wait_until(lambda: worker.metric("tandem:kv_blocks_pinned") == 0, what="no pinned blocks")


def test_openai_client_drives_the_pull_protocol(workers):
    """The two calls a client makes who orchestrates prefill and decode without a router."""
    prefill, decode = workers
    prompt = "The book of the generation of Jesus Christ, the son of David, the son of Abraham."
    model = prefill.client().models.list().data[0].id
    headers = {"X-Request-Id": str(uuid.uuid4())}
    first = prefill.client().completions.create(
        model=model, prompt=prompt, max_tokens=1, temperature=0, extra_headers=headers,
        extra_body={"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
                                           "remote_block_ids": None, "remote_host": None, "remote_port": None}})
    assert first.kv_transfer_params["do_remote_prefill"] is True
    answer = decode.client().completions.create(
        model=model, prompt="This prompt is not used", max_tokens=30, temperature=0, extra_headers=headers,
        extra_body={"kv_transfer_params": first.kv_transfer_params})
    plain = decode.client().completions.create(model=model, prompt=prompt, max_tokens=30, temperature=0)
    assert answer.choices[0].text == plain.choices[0].text
    assert answer.choices[0].text.startswith(first.choices[0].text)


def test_a_handle_works_once(workers):
    prefill, decode = workers
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    status, first = http_json(prefill.url + "/v1/completions", {"model": "demo", "prompt": [400] * 40, "max_tokens": 1,
                                                                "kv_transfer_params": params})
    assert status == 200
    body = {"model": "demo", "prompt": [400] * 40, "max_tokens": 3, "kv_transfer_params": first["kv_transfer_params"],
            "cache_salt": "no local prefix"}
    assert http_json(decode.url + "/v1/completions", body)[0] == 200
    status, answer = http_json(decode.url + "/v1/completions", {**body, "cache_salt": "another"})
    assert status >= 400 and answer["error"]["message"], answer


def test_kv_of_another_prompt_is_refused(workers):
    """KV must not be filed under tokens it was not computed from: a later honest request would find it."""
    prefill, decode = workers
    computed, claimed = [1100 + i for i in range(161)], [1700 + 3 * i for i in range(161)]
    body = {"model": "demo", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    status, first = http_json(prefill.url + "/v1/completions", {**body, "prompt": computed, "max_tokens": 1,
                                                                "kv_transfer_params": {"do_remote_decode": True}})
    assert status == 200
    params = {**first["kv_transfer_params"], "prompt_token_ids": claimed}
    status, answer = http_json(decode.url + "/v1/completions", {**body, "prompt": claimed, "kv_transfer_params": params})
    assert status == 400 and "another prompt" in answer["error"]["message"], answer
    honest = http_json(decode.url + "/v1/completions", {**body, "prompt": claimed})[1]
    fresh = http_json(decode.url + "/v1/completions", {**body, "prompt": claimed, "cache_salt": "nothing shared"})[1]
    assert honest["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert honest["choices"][0]["token_ids"] == fresh["choices"][0]["token_ids"]


def test_push_needs_a_stream(workers):
    """Without one the decode leg could tell nobody where to send."""
    status, answer = http_json(workers[1].url + "/v1/completions",
                               {"model": "demo", "prompt": [400] * 5, "max_tokens": 2,
                                "kv_transfer_params": {"do_remote_prefill": True, "transfer_mode": "push"}}, timeout=10)
    assert status == 400 and "stream" in answer["error"]["message"]


def test_roles_are_kept(workers):
    prefill, decode = workers
    for worker, params in ((prefill, {"do_remote_prefill": True, "transfer_mode": "push"}),
                           (decode, {"do_remote_decode": True})):
        status, answer = http_json(worker.url + "/v1/completions",
                                   {"model": "demo", "prompt": [400] * 5, "max_tokens": 1, "stream": "push" in str(params),
                                    "kv_transfer_params": params})
        assert status == 400 and "kv_role" in answer["error"]["message"]


def test_first_token_limits(launcher, workers, expected):
    """max_tokens 1, and a stop on the very first token, both decided by what prefill sampled."""
    router = launcher.route([workers[0]], [workers[1]])
    tokens = expected[0][0]
    body = {"model": "demo", "prompt": PROMPTS[0], "temperature": 0, "return_token_ids": True}
    status, answer = http_json(router.url + "/v1/completions", {**body, "max_tokens": 1})
    assert status == 200 and answer["choices"][0]["token_ids"] == tokens[:1]
    assert answer["choices"][0]["finish_reason"] == "length"
    status, answer = http_json(router.url + "/v1/completions", {**body, "max_tokens": 9, "stop_token_ids": tokens[:1]})
    assert status == 200 and answer["choices"][0]["token_ids"] == tokens[:1]
    assert answer["choices"][0]["finish_reason"] == "stop"
    router.stop()
