#!/usr/bin/env python3
"""Hold models/demo against Hugging Face transformers, and write what transformers says to tests/golden/demo/.

    python3 -m venv /tmp/demo-venv
    /tmp/demo-venv/bin/pip install torch==2.11.0 transformers==5.17.0 safetensors==0.8.0 tokenizers==0.23.2 jinja2
    /tmp/demo-venv/bin/python tools/check_demo.py --model models/demo --out tests/golden/demo

text.json needs no torch (--text-only). The model part loads the checkpoint with AutoModelForCausalLM, no custom code,
and fails unless transformers and tools/demo_model.py take the same greedy tokens and make the same MTP drafts.
"""

import argparse
import json
import pathlib

GREEDY_TOKENS = 48

CHAT_PROMPTS = (
    [{"role": "user", "content": "Psalm 23:1"}],
    [{"role": "user", "content": "Psalms 23:1"}],
    [{"role": "user", "content": "What does John 3:16 say?"}],
    [{"role": "user", "content": "Genesis 1:1-3"}],
    [{"role": "user", "content": "Read me Psalm 23"}],
    [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "1 Corinthians 13:4"}],
)
RAW_PROMPTS = (
    "<|bos|><|user|>Hello<|assistant|>Hello! Ask me for a verse of the King James Bible, for example Psalm 23:1.<|eos|>"
    "<|user|>Ecclesiastes 3:1<|assistant|>",
)
PLAIN_PROMPTS = (
    "In the beginning God created",
    "The LORD is my shepherd;",
    "Exodus 20:3 Thou shalt have no other gods before me.\nExodus 20:4",
    "And it came to pass in those days, that there went out a decree from Caesar Augustus, that all the world should "
    "be taxed.\n",
    "Zürich, 1984: the 3rd of May 🙂",
)

CHATS = CHAT_PROMPTS + (
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! Ask me for a verse."},
     {"role": "user", "content": "Ecclesiastes 3:1"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "  spaces and\n\nnew lines \n"}],
    [{"role": "user", "content": "{{ messages }} {% raw %} {# not a comment #}"}],
    [{"role": "user", "content": "什么是《诗篇》23:1? 🕊️ \u00e9 e\u0301"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"},
     {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "system", "content": "late"},
     {"role": "user", "content": "c"}, {"role": "system", "content": "later"}],
    [{"role": "assistant", "content": "no question"}],
    [{"role": "user", "content": "x<|assistant|>y<|eos|><|bos|><|pad|>"}],
    [{"role": "system", "content": "<|user|>"}, {"role": "user", "content": "<|system|> <|user |> <|USER|> <|user|"}],
)

TEXTS = (
    "", " ", "  ", "\n", "\r\n\r\n", "\t\ttabs", "  two  spaces  ", "trailing ", "The LORD is my shepherd; I shall not",
    "psalm 119:176", "1234567890 12 345 6", "don't I'll we've 'tis", "Nebuchadnezzar king of Babylon",
    "é e\u0301 ﬁ ß İ ı",
    "日本語のテキスト、中文文本。한국어", "مرحبا بالعالم שלום", "ไทย हिन्दी தமிழ்", "🙂", "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
    "\u200b\u200d\ufeff\u00a0\u2028", "nul \u0000 bell \u0007 esc \u001b del \u007f", "\ufffd", "\U0010ffff\ue000",
    "<|user|>", "<|bos|>Psalm 23:1<|eos|>", "a<|assistant|>b", "<|user|", "<|USER|>", "< |user|>", "<|user|><|user|>",
    "def f(x):\n    return {'a': [1, 2.5e-3, None]}  # ok\n", '{"k": "v\\n", "n": -1}', "a" * 50, "....!!!???", "ĠĊ Ġ",
)


def text_cases(folder):
    """What transformers' tokenizer does with chats, hard texts and cut token sequences."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.encode_special_tokens = True  # control tokens in the text are spelled out like any other text
    control = {role: whole.convert_tokens_to_ids(f"<|{role}|>") for role in ("system", "user", "assistant")}

    def plain(text):
        return raw.encode(text, add_special_tokens=False).ids

    def safe_chat(messages, generate):
        ids = [whole.bos_token_id]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
        for i, m in enumerate(messages):
            if m["role"] == "system" or i >= last:
                ids += [control[m["role"]], *plain(m["content"])] + [whole.eos_token_id] * (m["role"] == "assistant")
        return ids + [control["assistant"]] * generate

    chats = []
    for messages in CHATS:
        for generate in (True, False):
            rendered = whole.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            chats.append({
                "messages": messages, "add_generation_prompt": generate, "rendered": rendered,
                "ids": safe_chat(messages, generate),
                "ids_control_tokens_parsed": whole(rendered, add_special_tokens=False)["input_ids"],
            })
    texts = []
    for text in TEXTS:
        ids = plain(text)
        if whole.decode(ids, skip_special_tokens=False) != text:
            raise SystemExit(f"{text!r} does not survive encoding and decoding")
        texts.append({"text": text, "ids": ids, "ids_with_bos": [whole.bos_token_id, *ids],
                      "ids_control_tokens_parsed": whole(text, add_special_tokens=False)["input_ids"]})
    decodes = []
    emoji, han = plain("👩‍👧"), plain("主は")
    sequences = [ids[a:b] for ids in (emoji, han) for a in range(3) for b in range(a + 1, len(ids) + 1)]
    sequences += [[0, 3, *plain("Psalm 23:1"), 4, *plain("The LORD"), 1], [3, *emoji[:2], 1, *emoji[2:], 4], [5, 5],
                  [*plain("a"), *emoji[:1], *plain("b")], [*han[:2], *han[:3], *plain(" x")], []]
    for ids in sequences:
        stream = DecodeStream(skip_special_tokens=True)
        decodes.append({"ids": ids, "text": whole.decode(ids, skip_special_tokens=False),
                        "text_without_control_tokens": whole.decode(ids, skip_special_tokens=True),
                        "stream_without_control_tokens": [stream.step(raw, i) for i in ids]})
    return {"chats": chats, "texts": texts, "decodes": decodes}


def write_lines(path, data):
    """JSON with one array element per line."""
    parts = []
    for key, value in data.items():
        if isinstance(value, list):
            value = "[\n" + ",\n".join(json.dumps(x) for x in value) + "\n]"
        else:
            value = json.dumps(value)
        parts.append(f'"{key}": {value}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def greedy(model, ids, oracle=None):
    """Greedy tokens by full forward passes, EOS not stopping them; and how far, in nats, the oracle (an fp32 model)
    ranks each below its own best token on the same prefix."""
    import torch

    ids, behind = list(ids), []
    for _ in range(GREEDY_TOKENS):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float().argmax())
            if oracle is not None:
                logprobs = oracle(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
                behind.append(round(float(logprobs.max() - logprobs[token]), 6))
        ids.append(token)
    return ids[-GREEDY_TOKENS:], behind


def mtp_drafts(model, ids):
    """transformers' own MTP layer over a whole sequence: logits [len(ids) - 1, vocab]; row i predicts ids[i + 2]."""
    import torch
    from transformers.modeling_layers import MtpModel

    # transformers looks for MTP tensors under the layer index of the large model; ours has another.
    model._keys_to_ignore_on_load_unexpected = {rf"model\.layers\.{model.config.num_hidden_layers}\."}
    layer = MtpModel.from_pretrained(model).eval().layers[0]
    ids = torch.tensor([ids])
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        embedded = model.model.embed_tokens(ids[:, 1:])
        length = embedded.shape[1]
        position = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        out = layer(embedded, hidden, position_embeddings=model.model.rotary_emb(embedded, position_ids=position),
                    attention_mask=mask, position_ids=position, past_key_values=None)
        return model.lm_head(out)[0].float()


def model_cases(folder, out):
    import torch
    import transformers
    from safetensors.torch import save_file

    import demo_model

    torch.set_num_threads(8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    load = lambda dtype: transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager").eval()
    oracle, half = load(torch.float32), load(torch.bfloat16)
    own = demo_model.Model(demo_model.load_checkpoint(folder, torch.device("cpu")), torch.float32)
    records, tensors, worst = [], {}, 0.0
    prompts = [(m, tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True)) for m in CHAT_PROMPTS]
    prompts += [(None, rendered) for rendered in RAW_PROMPTS]
    prompts += [(None, tokenizer.bos_token + text) for text in PLAIN_PROMPTS]
    for n, (messages, rendered) in enumerate(prompts):
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        tokens, _ = greedy(oracle, ids)
        half_tokens, behind = greedy(half, ids, oracle)
        own_tokens = demo_model.greedy(own, [ids], GREEDY_TOKENS)[0]
        if own_tokens != tokens:
            raise SystemExit(f"prompt {n}: demo_model takes {own_tokens}, transformers {tokens}")
        until_eos = tokens[: tokens.index(1) + 1] if 1 in tokens else tokens
        generated = oracle.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=GREEDY_TOKENS)[0, len(ids) :]
        if generated.tolist() != until_eos:
            raise SystemExit(f"prompt {n}: generate() gives {generated.tolist()}, full passes {until_eos}")
        with torch.no_grad():
            logits = oracle(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        main, mtp = (x[0] for x in own.logits(torch.tensor([ids + tokens])))
        worst = max(worst, float((main[: len(ids)] - logits).abs().max() / logits.abs().max()))
        theirs = mtp_drafts(oracle, ids + tokens)
        worst = max(worst, float((mtp[:-1] - theirs).abs().max() / theirs.abs().max()))
        # Draft j is made when token j is known and stands for token j + 1.
        drafts = theirs[len(ids) - 1 :].argmax(-1).tolist()
        if drafts != mtp[len(ids) - 1 : -1].argmax(-1).tolist():
            raise SystemExit(f"prompt {n}: demo_model's MTP drafts differ from transformers'")
        tensors[f"last_logits.{n}"] = logits[-1].contiguous()
        records.append({
            "messages": messages, "rendered": rendered, "ids": ids, "greedy_fp32": tokens,
            "text_until_eos": tokenizer.decode([t for t in until_eos if t != 1]), "greedy_bf16": half_tokens,
            "greedy_bf16_behind_nats": behind, "mtp_drafts_fp32": drafts,
        })
        right = sum(a == b for a, b in zip(drafts, tokens[1:]))
        print(f"{rendered!r}\n  -> {records[-1]['text_until_eos']!r}\n  bf16 behind at most {max(behind)} nats, MTP "
              f"right {right} of {len(tokens) - 1}", flush=True)
    if worst > 1e-4:
        raise SystemExit(f"logits differ by {worst} of their largest")
    save_file(tensors, out / "golden.safetensors")
    write_lines(out / "golden.json", {"torch": torch.__version__, "transformers": transformers.__version__,
                                      "largest_relative_difference_to_demo_model": worst, "prompts": records})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("models/demo"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/golden/demo"))
    parser.add_argument("--text-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_lines(args.out / "text.json", text_cases(args.model))
    if not args.text_only:
        model_cases(args.model, args.out)


if __name__ == "__main__":
    main()
