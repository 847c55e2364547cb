"""Makes the tokenizer fixtures of src/text and rust/textcore, and golden.json with what transformers answers for them.

Needs: transformers 5.23, tokenizers 0.23, jinja2 3.1. Run it in this folder; it prints what it wrote. The training text is
small and fixed, so that the files stay the same from run to run.
"""
import json
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "A small river ran through the valley, and the people of the valley knew its name.",
    "They said: it's ours, we've kept it, and we'll keep it; you'd do the same, they're sure, I'm sure!",
    "In the year 1234 the water rose 56 feet; in 1999 it fell again, 7 feet at a time.",
    "def answer(x):\n    if x > 41:\n        return x + 1\n    return None\n\n\n",
    "for (int i = 0; i < 10; ++i) {\n\tprintf(\"%d\\n\", i);\n}\r\n",
    "Die Straße war naß; Äpfel, Öl und Übermut. L'été, où êtes-vous? Señor, ¿qué pasa? Łódź.",
    "Река течёт через долину. Вода холодная, и люди знают её имя.",
    "小さな川が谷を流れていた。人々はその名前を知っていた。",
    "一条小河流过山谷，人们知道它的名字。水很冷。",
    "작은 강이 골짜기를 흐른다. नदी घाटी से बहती है। النهر يجري في الوادي",
    "😀 😃 👍🏽 👩‍👩‍👧 🇩🇪 ✨ — “quoted” … ½ ² ∑ €",
    "system user assistant tool think name arguments role content <tools> </tools> {\"name\": \"x\", \"arguments\": {}}",
]
CORPUS = TEXT * 3 + [" ".join(TEXT)]

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_SPLITS = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def train(tokenizer, specials=(), size=700, alphabet=True):
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def qwen_like():
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([split(QWEN_SPLIT), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    train(tok)
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    plain = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    tok.add_tokens([AddedToken(text, normalized=False) for text in plain])
    config = {
        "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "chat_template": open("chatml.jinja", encoding="utf-8").read(),
    }
    return tok, config


def deepseek_like():
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Sequence([])
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [split(p) for p in DEEPSEEK_SPLITS] + [pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    train(tok, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
    marks = ["<｜User｜>", "<｜Assistant｜>", "<｜call▁begin｜>", "<｜call▁end｜>", "<｜output▁begin｜>", "<｜output▁end｜>"]
    tok.add_tokens([AddedToken(text, normalized=True) for text in marks])
    tok.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])

    def as_object(content):
        return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False,
                "single_word": False}

    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": as_object("<｜begin▁of▁sentence｜>"),
        "eos_token": as_object("<｜end▁of▁sentence｜>"), "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "chat_template": [
            {"name": "default", "template": open("barred.jinja", encoding="utf-8").read()},
            {"name": "tool_use", "template": "{{ bos_token }}{{ tools | tojson(indent=2) }}{{ messages | length }}"},
        ],
    }
    return tok, config


def gpt2_like():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    train(tok, size=600)
    tok.add_special_tokens(["<|endoftext|>"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return tok, config


def llama_like():
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.pre_tokenizer = split(r"▁[^▁]*")  # for training only: without any split BPE would learn whole sentences
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=pieces, show_progress=False, limit_alphabet=60)
    tok.train_from_iterator(CORPUS, trainer)
    raw = json.loads(tok.to_str())
    raw["pre_tokenizer"] = None
    raw["added_tokens"] = raw["added_tokens"][:3]
    tok = Tokenizer.from_str(json.dumps(raw))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "chat_template": "{% for m in messages %}{{ '[INST] ' ~ m.content | trim ~ ' [/INST]' if m.role == 'user' else "
                         "m.content ~ eos_token }}{% endfor %}",
    }
    return tok, config


def unigram_like():
    # The control tokens are ordinary entries of the model's own vocabulary here: plain text reaches them by itself.
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False)
    tok.train_from_iterator(CORPUS, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tok, config


PROBES = TEXT + [
    "", " ", "  ", "\n", " \n \n", "a", " a", "a ", "   leading and trailing   ", "tab\there\t\tthere", "\r\n\r\nx",
    "it'S IT'LL we'Ve", "x" * 70, "12345678901", "  12 345  ", "e\u0301te\u0301 \u1100\u1161\u11a8", "\u0000\u0001\u007f",
    "<think>ok</think> <tool_call>{}</tool_call>", "a\u00a0b\u2003c\u3000d", "\ufeffbom", "🏴\U000e0067\U000e0062\U000e007f",
    "中文English混合123數字", "…!!!???---", "\U0001f469\u200d\U0001f680 e\u0328\u0301 ﬁ ſ K", "}\n\n  {\n", "a\n \n  b",
]
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Says <what> it's like & \"how\" – ünïcode \\ \n", "parameters": {
        "type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer", "default": 3}, "f": {"x": 1.5e-7, "y": 1e22, "z": 2.0, "n": None, "t": True}},
        "required": ["place"], "empty": {}, "none": []}}}]


def chats():
    say = lambda role, content, **more: {"role": role, "content": content, **more}
    call = {"function": {"name": "weather", "arguments": {"place": "Łódź", "days": 2}}}
    text_call = {"function": {"name": "weather", "arguments": '{"place": "Łódź"}'}, "type": "function"}
    long = [say("system", "Be brief."), say("user", "Hello"), say("assistant", "<think>\nhm\n</think>\n\nHi!"),
            say("user", "  More, 请  ")]
    yield "chatml", dict(messages=[say("user", "Hi")])
    yield "chatml", dict(messages=[say("user", "Hi")], add_generation_prompt=True)
    yield "chatml", dict(messages=long, add_generation_prompt=True, enable_thinking=False)
    yield "chatml", dict(messages=long, tools=TOOLS, add_generation_prompt=True)
    yield "chatml", dict(messages=[say("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])])
    yield "chatml", dict(messages=long[:2] + [say("assistant", "", tool_calls=[call, text_call]), say("tool", "cold"),
                                              say("tool", "dry")], tools=TOOLS, add_generation_prompt=True)
    yield "chatml", dict(messages=long[:2] + [say("assistant", "So", reasoning="because")])
    yield "chatml", dict(messages=long[:2] + [say("assistant", "The answer is ")], continue_final_message=True)
    yield "barred", dict(messages=long, add_generation_prompt=True, thinking=True)
    yield "barred", dict(messages=long + [say("tool", "{}"), say("assistant", "done", tool_calls=None)])
    yield "barred", dict(messages=long, tools=TOOLS)
    yield "plain", dict(messages=[say("user", " q "), say("assistant", "a")])


def golden(name, tok, config, folder):
    json.dump(config, open(f"{name}.config.json", "w", encoding="utf-8"), ensure_ascii=False, indent=1)
    tok.save(f"{name}.json", pretty=False)
    hf = PreTrainedTokenizerFast(tokenizer_file=f"{name}.json", **{
        key: (AddedToken(value["content"]) if isinstance(value, dict) else value)
        for key, value in config.items() if key not in ("tokenizer_class", "chat_template")})
    if isinstance(config.get("chat_template"), list):
        hf.chat_template = {entry["name"]: entry["template"] for entry in config["chat_template"]}
    else:
        hf.chat_template = config.get("chat_template")
    result = {"encode": [], "decode": [], "chat": []}
    for text in PROBES:
        for special in (False, True):
            result["encode"].append({"text": text, "special": special, "ids": hf.encode(text, add_special_tokens=special)})
    rng = random.Random(7)
    size = len(hf)
    for _ in range(60):
        ids = [rng.randrange(size) for _ in range(rng.randrange(1, 40))]
        if name in ("llama_like",) and rng.random() < 0.7:
            ids = [rng.randrange(3, 259) if rng.random() < 0.6 else i for i in ids]
        skip = rng.random() < 0.5
        result["decode"].append({"ids": ids, "skip": skip, "text": hf.decode(ids, skip_special_tokens=skip)})
    template = {"qwen_like": "chatml", "deepseek_like": "barred", "llama_like": "plain"}.get(name)
    for kind, arguments in chats():
        if kind == template:
            text = hf.apply_chat_template(arguments["messages"], tokenize=False, **{
                k: v for k, v in arguments.items() if k != "messages"})
            ids = hf.encode(text, add_special_tokens=False)
            result["chat"].append({"arguments": arguments, "text": text, "ids": ids})
    return result


def main():
    everything = {}
    for make in (qwen_like, deepseek_like, gpt2_like, llama_like, unigram_like):
        tok, config = make()
        everything[make.__name__] = golden(make.__name__, tok, config, ".")
        print(make.__name__, tok.get_vocab_size())
    json.dump(everything, open("golden.json", "w", encoding="utf-8"), ensure_ascii=False, separators=(",", ":"))


if __name__ == "__main__":
    main()
