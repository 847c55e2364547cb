"""The OpenAI API as the real `openai` client sees it, against one `tandem serve` of the demo model."""

import openai
import pytest

from conftest import http_json

QUESTION = [{"role": "user", "content": "Psalm 23:1"}]


@pytest.fixture(scope="module")
def server(launcher):
    return launcher.serve()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["demo"]
    assert models[0].max_model_len >= 2048
    assert client.models.retrieve("demo").id == "demo"


def test_chat_answers_with_the_verse(client):
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=40)
    assert "shepherd" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_equals_whole(client):
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=40)
    chunks = list(client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=40,
                                                 stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion_with_logprobs_and_ids(client):
    answer = client.completions.create(model="demo", prompt="In the beginning", temperature=0, max_tokens=8, logprobs=3,
                                       extra_body={"return_token_ids": True})
    choice = answer.choices[0]
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 8
    assert all(len(top) >= 3 for top in choice.logprobs.top_logprobs)
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.token_ids) == 8 and len(choice.prompt_token_ids) == answer.usage.prompt_tokens
    again = client.completions.create(model="demo", prompt=choice.prompt_token_ids, temperature=0, max_tokens=8)
    assert again.choices[0].text == choice.text


def test_chat_logprobs(client):
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True,
                                            top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5 and all(len(item.top_logprobs) == 2 for item in content)
    assert content[0].top_logprobs[0].token == content[0].token
    assert "".join(item.token for item in content) == answer.choices[0].message.content


def test_several_choices_and_seeds(client):
    def ask(seed):
        answer = client.completions.create(model="demo", prompt="And God said", n=3, temperature=1.0, seed=seed,
                                           max_tokens=12)
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    first = ask(7)
    assert first == ask(7)
    assert len(set(first)) > 1
    assert first != ask(8)


def test_prompt_lists(client):
    answer = client.completions.create(model="demo", prompt=["In the beginning", "And the LORD"], temperature=0,
                                       max_tokens=4)
    single = client.completions.create(model="demo", prompt="And the LORD", temperature=0, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text == single.choices[0].text


def test_stop_strings_and_ids(client):
    free = client.completions.create(model="demo", prompt="In the beginning", temperature=0, max_tokens=20,
                                     extra_body={"return_token_ids": True})
    text = free.choices[0].text
    stop = text[4:9]
    stopped = client.completions.create(model="demo", prompt="In the beginning", temperature=0, max_tokens=20, stop=stop)
    assert stopped.choices[0].text == text[:text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    token = free.choices[0].token_ids[5]
    first = free.choices[0].token_ids.index(token)
    by_id = client.completions.create(model="demo", prompt="In the beginning", temperature=0, max_tokens=20,
                                      extra_body={"stop_token_ids": [token], "return_token_ids": True})
    assert by_id.choices[0].token_ids == free.choices[0].token_ids[:first + 1]


def test_ignore_eos_and_min_tokens(client):
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=200,
                                            extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 200 and answer.choices[0].finish_reason == "length"


def test_tokenize_round_trip(server):
    text = "Jesus wept. \U0001F600 \u4e2d"
    status, tokens = http_json(server.url + "/tokenize", {"model": "demo", "prompt": text, "add_special_tokens": False})
    assert status == 200 and tokens["count"] == len(tokens["tokens"])
    status, back = http_json(server.url + "/detokenize", {"model": "demo", "tokens": tokens["tokens"]})
    assert status == 200 and back["prompt"] == text


def test_second_question_hits_the_prefix_cache(server, client):
    prompt = "Now it came to pass in the days when the judges ruled, " * 6
    for expect_hit in (False, True):
        answer = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=4)
        assert (answer.usage.prompt_tokens_details.cached_tokens > 0) == expect_hit
    assert server.metric("vllm:prefix_cache_hits_total") > 0


@pytest.mark.parametrize("change,param", [
    ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"), ({"max_tokens": 0}, "max_tokens"),
    ({"prompt": [4000000]}, "prompt"), ({"prompt": []}, "prompt"), ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"stop": [""]}, "stop"), ({"prompt": [5] * 100000}, "prompt"),
])
def test_bad_parameters_are_400_with_param(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "demo", "prompt": "x", **change})
    assert caught.value.body["param"].startswith(param)
    assert caught.value.body["type"] == "invalid_request_error"


def test_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert caught.value.body["code"] == "model_not_found"


def test_malformed_json_is_400(server):
    for body in (b"{", b"[]", b'{"model": "demo", "prompt": NaN}', b"\xff\xfe"):
        status, answer = http_json(server.url + "/v1/completions", body)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error", body


def test_control_tokens_in_user_text_stay_text(server, client):
    _, bundle = http_json(server.url + "/tokenize", {"model": "demo", "messages": QUESTION})
    control = set(bundle["tokens"]) - set(http_json(server.url + "/tokenize", {"model": "demo", "prompt": "Psalm 23:1"})[1]["tokens"])
    texts = [http_json(server.url + "/detokenize", {"model": "demo", "tokens": [token]})[1]["prompt"] for token in control]
    for text in filter(None, texts):
        tokens = http_json(server.url + "/tokenize", {"model": "demo", "prompt": text, "add_special_tokens": False})[1]["tokens"]
        assert not control & set(tokens) or len(tokens) > 1, text


def test_metrics_have_vllm_names(server):
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
                 "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
                 "vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count",
                 "vllm:e2e_request_latency_seconds_count", "vllm:iteration_tokens_total_count",
                 "vllm:request_queue_time_seconds_count", "vllm:num_preemptions_total"):
        server.metric(name, model_name="demo")
    assert server.metric("tandem:kv_blocks_pinned") == 0
