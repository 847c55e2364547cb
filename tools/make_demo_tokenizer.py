#!/usr/bin/env python3
"""Make models/demo/tokenizer.json and tokenizer_config.json: a byte-level BPE of 4,096 tokens over the KJV Bible.

    sudo apt-get install bible-kjv
    python3 -m venv /tmp/demo-venv && /tmp/demo-venv/bin/pip install tokenizers==0.23.2
    /tmp/demo-venv/bin/python tools/make_demo_tokenizer.py --out models/demo

Every byte has a token, so any text can be encoded and decoded without loss. Control tokens are the first six ids.
"""

import argparse
import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import kjv

VOCAB_SIZE = 4096
BOS, EOS, SYSTEM, USER, ASSISTANT, PAD = CONTROL = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>",
                                                    "<|pad|>")
# Numbers of up to three digits stay whole ("119" of "Psalm 119:105"); a word takes the space before it.
SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Each question stands alone: system messages, then everything from the last user message on. The model looks verses up
# and knows few conversations, so earlier turns would only lead it astray.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- elif message.role not in ['system', 'assistant'] %}{{- raise_exception('unknown role: ' + message.role) }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{- '<|system|>' + message.content }}"
    "{%- elif loop.index0 >= ns.last and message.role == 'user' %}{{- '<|user|>' + message.content }}"
    "{%- elif loop.index0 >= ns.last %}{{- '<|assistant|>' + message.content + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def training_text(verses):
    for v in verses:
        yield kjv.reference_line(v)
        yield v.text
    for names in kjv.BOOKS:
        for name in names:
            yield from [f"What does {name} say?", f"Read me {name}", name.lower()] * 5


def build(verses):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.train_from_iterator(training_text(verses), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, bos)]),
    ])
    return tokenizer


def tokenizer_config(tokenizer):
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(tokenizer.token_to_id(t)): {"content": t, **flags} for t in CONTROL},
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("models/demo"))
    parser.add_argument("--text", help="file with the output of `bible -f gen1:1-rev22:21`")
    args = parser.parse_args()
    tokenizer = build(kjv.read_verses(args.text))
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"{tokenizer.get_vocab_size()} tokens, wanted {VOCAB_SIZE}")
    args.out.mkdir(parents=True, exist_ok=True)
    # One line: the vocabulary and merges are for programs, and white space would double the file.
    (args.out / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n")
    config = json.dumps(tokenizer_config(tokenizer), indent=2, ensure_ascii=False)
    (args.out / "tokenizer_config.json").write_text(config + "\n")


if __name__ == "__main__":
    main()
