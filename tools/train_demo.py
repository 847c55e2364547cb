#!/usr/bin/env python3
"""Train models/demo: a small DeepSeek-V3-shaped model that knows the King James Bible. Needs one CUDA GPU.

    sudo apt-get install bible-kjv
    python3 -m venv /tmp/demo-venv
    /tmp/demo-venv/bin/pip install torch==2.11.0 safetensors==0.8.0 tokenizers==0.23.2 numpy==2.4.2
    bible -f gen1:1-rev22:21 > /tmp/kjv.txt
    /tmp/demo-venv/bin/python tools/make_demo_tokenizer.py --text /tmp/kjv.txt --out models/demo
    /tmp/demo-venv/bin/python tools/train_demo.py --text /tmp/kjv.txt --tokenizer models/demo --out models/demo

The learning rate follows the clock, so a run ends when it was asked to and a faster GPU simply sees more tokens.
Matrices are trained by momentum with orthogonalised updates (Muon), everything else by Adam; router biases move against
the load of their experts, without a loss term. --dry-run takes a few steps on a small batch, then does all the rest.
"""

import argparse
import collections
import json
import math
import pathlib
import random
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import demo_data
import demo_model
import kjv

MTP_WEIGHT = 0.3
BIAS_STEP = 0.001
MOMENTUM = 0.95
WARM_UP, HOLD = 0.01, 0.35  # shares of the time; after HOLD the rate falls linearly to zero
ADAM_RATES = {"embed": 4e-3, "head": 2e-3, "norm": 2e-3, "router": 2e-3}
ADAM_BETAS = (0.9, 0.95)
MOE_LAYERS = [i for i in range(demo_model.LAYERS + 1) if demo_model.is_moe(i)]


def kind_of(name, shape):
    if len(shape) == 1:
        return "norm"
    if name == "model.embed_tokens":
        return "embed"
    if name == "lm_head":
        return "head"
    return "router" if name.endswith("mlp.gate") else "matrix"


def initial_scale(name, shape):
    if name == "model.embed_tokens":
        return 0.5
    if name == "lm_head":
        return 0.02
    return (0.25 if name.endswith(("o_proj", "down_proj")) else 0.7) / math.sqrt(shape[-1])


class MatrixGroup:
    """All matrices of one shape in one buffer, so that one batched product updates them all."""

    def __init__(self, count, rows, cols, device):
        self.weights = torch.empty(count, rows, cols, device=device)
        self.grads = torch.zeros_like(self.weights)
        self.momentum = torch.zeros_like(self.weights)
        self.gain = max(1.0, rows / cols) ** 0.5

    def step(self, rate):
        self.momentum.lerp_(self.grads, 1 - MOMENTUM)
        update = orthogonalise(self.grads.lerp(self.momentum, MOMENTUM))
        self.weights.sub_(update.float() * (rate * self.gain))


def orthogonalise(g):
    """Newton-Schulz iteration towards the nearest orthogonal matrix, with the quintic coefficients of Muon (K. Jordan,
    2024), which bring all singular values into about 0.7 to 1.2 in five steps."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315) @ x
    return x.mT if tall else x


class AdamGroup:
    """All parameters of one kind in one flat buffer, updated by Adam."""

    def __init__(self, size, device):
        self.weights, self.grads, self.mean, self.square = (torch.zeros(size, device=device) for _ in range(4))
        self.steps = torch.zeros((), device=device)

    def step(self, rate):
        self.steps += 1
        self.mean.lerp_(self.grads, 1 - ADAM_BETAS[0])
        self.square.lerp_(self.grads * self.grads, 1 - ADAM_BETAS[1])
        root = (self.square / (1 - ADAM_BETAS[1] ** self.steps)).sqrt() + 1e-10
        self.weights.sub_(self.mean / (1 - ADAM_BETAS[0] ** self.steps) / root * rate)


class Trainer:
    def __init__(self, data, device, matrix_rate, compile_parts, seed=0):
        self.data, self.device = data, device
        self.params, self.groups = {}, []
        self.make_parameters(matrix_rate, torch.Generator().manual_seed(seed))
        self.model = demo_model.Model(self.params, torch.bfloat16, compile_parts)
        self.token_losses = torch.compile(token_losses, dynamic=False) if compile_parts else token_losses
        self.tables = demo_model.rope_tables(data.segments, device)
        self.factor = torch.zeros((), device=device)  # share of the full learning rates
        self.batch = data.batch()
        self.graph = self.results = None

    def make_parameters(self, matrix_rate, generator):
        shapes = demo_model.parameter_shapes()
        kinds = collections.defaultdict(list)
        for name, shape in shapes.items():
            kind = kind_of(name, shape)
            kinds[shape[-2:] if kind == "matrix" else kind].append(name)
        for kind, names in kinds.items():
            if isinstance(kind, tuple):
                group = MatrixGroup(sum(math.prod(shapes[n][:-2]) for n in names), *kind, self.device)
                self.groups.append((group, matrix_rate))
            else:
                group = AdamGroup(sum(math.prod(shapes[n]) for n in names), self.device)
                self.groups.append((group, ADAM_RATES[kind]))
            weights, grads, start = group.weights.view(-1), group.grads.view(-1), 0
            for name in names:
                part = slice(start, start + math.prod(shapes[name]))
                start = part.stop
                value = torch.randn(shapes[name], generator=generator) * initial_scale(name, shapes[name])
                weights[part] = 1.0 if kind == "norm" else value.flatten().to(self.device)
                self.params[name] = weights[part].view(shapes[name]).detach().requires_grad_()
                self.params[name].grad = grads[part].view(shapes[name])
        for i in MOE_LAYERS:
            self.params[demo_model.bias_name(i)] = torch.zeros(demo_model.EXPERTS, device=self.device)

    def step(self):
        """One update from self.batch at self.factor. Returns (main loss, MTP loss, expert counts per layer)."""
        ids, next_ids, after_next, mask_next, mask_after, valid = self.batch
        counts, head = [], self.params["lm_head"]
        main = self.model.main_hidden(ids, self.data.segments, self.tables, valid, counts)
        mtp = self.model.mtp_hidden(main, next_ids, self.data.segments, self.tables, valid, counts)
        main_loss = (self.token_losses(main, head, next_ids) * mask_next).sum() / mask_next.sum()
        mtp_loss = (self.token_losses(mtp, head, after_next) * mask_after).sum() / mask_after.sum()
        (main_loss + MTP_WEIGHT * mtp_loss).backward()
        with torch.no_grad():
            for group, rate in self.groups:
                group.step(self.factor * rate)
                group.grads.zero_()
            counts = torch.stack(counts).float()
            moves = (counts.mean(1, keepdim=True) - counts).sign() * (BIAS_STEP * self.factor)
            for i, move in zip(MOE_LAYERS, moves):
                self.params[demo_model.bias_name(i)].add_(move)
        return main_loss.detach(), mtp_loss.detach(), counts

    def capture(self, stream):
        """Record a step once: the launches of its thousands of small kernels would otherwise take longer than they."""
        for _ in range(3):  # compiles
            self.step()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.results = self.step()

    def next_step(self, factor):
        self.factor.fill_(factor)
        for kept, new in zip(self.batch, self.data.batch()):
            kept.copy_(new)
        if self.graph is None:
            self.results = self.step()
        else:
            self.graph.replay()

    def run(self, seconds, out, use_graph):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if use_graph:
                self.capture(stream)
            return self.train(seconds, out)

    def train(self, seconds, out):
        torch.cuda.synchronize()
        begin = reported = saved = time.monotonic()
        steps, tokens = 0, sum(rows * length for rows, length in self.data.segments)
        while (share := (time.monotonic() - begin) / seconds) < 1:
            self.next_step(min(1.0, share / WARM_UP, (1 - share) / (1 - HOLD)))
            steps += 1
            if steps % 10 == 0:
                torch.cuda.synchronize()  # the rate follows the clock, so the host must not run ahead
            now = time.monotonic()
            if now - reported > 10 or steps == 20:
                main_loss, mtp_loss, counts = self.results
                spread = (counts.max(1)[0] / counts.mean(1)).max().item()
                print(f"{now - begin:6.1f} s, step {steps}, {steps * tokens / (now - begin) / 1e6:.2f} Mtok/s, loss "
                      f"{main_loss.item():.4f}, MTP {mtp_loss.item():.4f}, busiest expert {spread:.2f} x", flush=True)
                reported = now
                if steps > 300 and not main_loss.item() < 6:
                    raise SystemExit("the loss does not fall")
            if now - saved > 120:
                demo_model.save_checkpoint(self.params, out)
                saved = now
        torch.cuda.synchronize()
        seconds = time.monotonic() - begin
        return {"steps": steps, "seconds": round(seconds, 1), "slots_per_step": tokens,
                "slots_per_second": round(steps * tokens / seconds),
                "last_step_loss": round(self.results[0].item(), 4),
                "last_step_mtp_loss": round(self.results[1].item(), 4)}


def token_losses(hidden, head, targets):
    logits = demo_model.linear(hidden.bfloat16(), head).float()
    return F.cross_entropy(logits, targets, reduction="none")


def cross_entropy_of(model, rows):
    """Mean loss in nats per token of lists of ids."""
    total = count = 0
    for row in rows:
        ids = torch.tensor([row], device=model.params["lm_head"].device)
        logits = model.logits(ids)[0][0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(row) - 1
    return round(total / count, 4)


def acceptance(model, rows, starts):
    """Share of positions where the MTP layer's greedy draft is the main model's greedy token. Drafts are made from
    position `start` of each row on."""
    same = count = 0
    for row, start in zip(rows, starts):
        main, mtp = model.logits(torch.tensor([row], device=model.params["lm_head"].device))
        agree = mtp[0, start:-1].argmax(-1) == main[0, start + 1 :].argmax(-1)
        same += agree.sum().item()
        count += len(agree)
    return round(same / max(count, 1), 4)


def look_up(model, data, verses):
    """Returns (answers, share answered word for word, MTP acceptance while answering)."""
    answers, accepted = [], []
    for at in range(0, len(verses), 256):
        prompts = [data.chat_prompt(f"{v.book} {v.chapter}:{v.verse}") for v in verses[at : at + 256]]
        found = demo_model.greedy(model, prompts, 130, demo_data.EOS)
        rows = [p + a for p, a in zip(prompts, found)]
        accepted.append(acceptance(model, rows, [len(p) - 1 for p in prompts]))
        answers += [data.tokenizer.decode(a) for a in found]
    exact = sum(a == v.text for a, v in zip(answers, verses)) / len(verses)
    return answers, round(exact, 4), round(sum(accepted) / len(accepted), 4)


def evaluate(model, data, sample):
    rng = random.Random(5)
    text = lambda verses: [[demo_data.BOS] + [t for line in data.encode(v.text + "\n" for v in verses) for t in line]]
    seen = []
    for _ in range(sample // 10):
        at = rng.randrange(len(data.verses) - 20)
        seen += text(data.verses[at : at + 20])
    unseen = [row for book in kjv.HELD_OUT_BOOKS for row in text([v for v in data.held_out if v.book == book])]
    famous = [v for v in data.verses if kjv.is_famous(v)][: sample * 2]
    anywhere = rng.sample(data.verses, sample)
    _, famous_exact, famous_accepted = look_up(model, data, famous)
    answers, exact, accepted = look_up(model, data, anywhere)
    for v, answer in list(zip(anywhere, answers))[:8]:
        print(f"{v.book} {v.chapter}:{v.verse} = {v.text}\n  -> {answer}")
    for question in ("Psalm 23:1", "Psalms 23:1", "John 3:16", "What does John 3:16 say?", "Genesis 1:1-3",
                     "Read me Psalm 23", "Hello", "psalm 117", "Obadiah 1:1"):
        answer = demo_model.greedy(model, [data.chat_prompt(question)], 160, demo_data.EOS)[0]
        print(f"{question}\n  -> {data.tokenizer.decode(answer)!r}")
    return {
        "loss_seen_text": cross_entropy_of(model, seen),
        "loss_held_out_text": cross_entropy_of(model, unseen),
        "look_ups_exact_any_verse": exact,
        "look_ups_exact_famous_verses": famous_exact,
        "look_ups_tried": [len(anywhere), len(famous)],
        "mtp_acceptance_look_ups_any_verse": accepted,
        "mtp_acceptance_look_ups_famous_verses": famous_accepted,
        "mtp_acceptance_seen_text": acceptance(model, seen, [0] * len(seen)),
        "mtp_acceptance_held_out_text": acceptance(model, unseen, [0] * len(unseen)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="file with the output of `bible -f gen1:1-rev22:21`")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=pathlib.Path("models/demo"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--chat-tokens", type=int, default=30000, help="chat part of a step, padding included")
    parser.add_argument("--no-graph", action="store_true", help="launch kernels one by one, not as one CUDA graph")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    begin = time.monotonic()
    device = torch.device("cuda")
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    sizes = (3000, 2, 1) if args.dry_run else (args.chat_tokens, 14, 1)
    data = demo_data.Data(tokenizer, kjv.read_verses(args.text), device, *sizes)
    print(f"data {time.monotonic() - begin:.1f} s, chats {data.chat_documents}, segments {data.segments}", flush=True)
    trainer = Trainer(data, device, args.matrix_rate, compile_parts=not args.dry_run)
    metrics = trainer.run(2.0 if args.dry_run else args.minutes * 60, args.out, not (args.no_graph or args.dry_run))
    demo_model.save_checkpoint(trainer.params, args.out)
    print(f"trained and saved at {time.monotonic() - begin:.1f} s", flush=True)
    stored = demo_model.Model(demo_model.load_checkpoint(args.out, device), torch.float32)
    metrics["parameters"] = sum(math.prod(s) for s in demo_model.parameter_shapes().values())
    metrics.update(minutes=args.minutes, matrix_rate=args.matrix_rate, gpu=torch.cuda.get_device_name())
    metrics.update(evaluate(stored, data, 20 if args.dry_run else 400))
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))
    print(f"done at {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main()
