#!/usr/bin/env python3
"""Make the golden fixtures of tests/golden/: tiny random checkpoints and what transformers computes from them.

Every case is a complete checkpoint folder (config.json and safetensors in the hub layout, one tensor per expert) and
the oracle's output: transformers' own DeepseekV3ForCausalLM and Qwen3MoeForCausalLM on the CPU, fp32, eager attention.
tests/golden/README.md describes the files.

    python3 -m venv /tmp/golden-venv
    /tmp/golden-venv/bin/pip install torch==2.11.0 transformers==5.17.0 safetensors==0.8.0 numpy==2.4.2
    /tmp/golden-venv/bin/python tools/make_golden.py --out tests/golden [--case ds_base ...]

The weights a fixture stores are the weights the oracle uses: bf16 tensors are upcast exactly, FP8 tensors are
dequantised as float(w) * weight_scale_inv in fp32. So an fp32 path over the same file can agree to rounding error.
"""

import argparse
import json
import math
import pathlib
import tempfile

import torch
import transformers
from safetensors.torch import save_file

GREEDY_TOKENS = 24
PROMPT_LENGTHS = (1, 5, 17, 40)
# Routers pick experts by comparison: two correct programs that differ by rounding may pick differently when scores are
# this close, and then their logits differ by far more than rounding. Seeds are tried until no position is that close.
MIN_ROUTER_MARGIN = 5e-5
# The same for the greedy token: the gap between the two best logits, in nats.
MIN_GREEDY_GAP = 1e-3
# A case is of no use to a bf16 test if transformers' own bf16 model is far from its fp32 model on it.
MAX_BF16_BEHIND_NATS = 0.1
FP8_MAX = 448.0
BLOCK = 128


def deepseek_config(**changes):
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_interleave": True,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    config.update(changes)
    return config


def qwen_config(**changes):
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    config.update(changes)
    return config


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


# name -> (config, options). Options: prompts (lengths), shards (files), fp8 (dtype of the scales), keep_bf16 (modules
# that stay bf16 in an FP8 checkpoint although they could be quantised; they are listed in modules_to_not_convert).
CASES = {
    "ds_base": (deepseek_config(vocab_size=144, moe_intermediate_size=24), {}),
    "ds_no_q_lora": (deepseek_config(q_lora_rank=None, qk_rope_head_dim=16, v_head_dim=24, num_hidden_layers=2), {}),
    # Positions run past original_max_position_embeddings, and the scaled frequencies apply below it too.
    "ds_yarn": (
        deepseek_config(
            vocab_size=128,
            qk_rope_head_dim=16,
            num_hidden_layers=2,
            max_position_embeddings=2560,
            rope_scaling={
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 64,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        ),
        {"prompts": (1, 5, 40, 130)},
    ),
    # Carries the tensors of one MTP layer under index num_hidden_layers; the main model does not use them.
    "ds_group1_mtp": (
        deepseek_config(vocab_size=72, n_routed_experts=5, n_group=1, topk_group=1, num_hidden_layers=2,
                        norm_topk_prob=False, routed_scaling_factor=1.5, n_shared_experts=2,
                        num_nextn_predict_layers=1),
        {},
    ),
    # No dimension that is quantised is a multiple of 128, so every weight has ragged last blocks.
    "ds_fp8": (
        deepseek_config(vocab_size=96, hidden_size=144, intermediate_size=136, moe_intermediate_size=40,
                        num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
                        q_lora_rank=40, kv_lora_rank=136, v_head_dim=24),
        {"fp8": torch.float32},
    ),
    "qwen_base": (qwen_config(vocab_size=104, moe_intermediate_size=24), {}),
    "qwen_dense_layers": (
        qwen_config(vocab_size=112, intermediate_size=64, num_hidden_layers=5, num_experts=6, decoder_sparse_step=2,
                    mlp_only_layers=[3], norm_topk_prob=False, moe_intermediate_size=24),
        {},
    ),
    # norm_topk_prob and decoder_sparse_step are absent: transformers' defaults are false and 1.
    "qwen_tied": (without(qwen_config(num_hidden_layers=2, tie_word_embeddings=True), "norm_topk_prob",
                          "decoder_sparse_step", "mlp_only_layers"), {}),
    # The newer spelling of the rope settings.
    "qwen_yarn": (
        {
            **without(qwen_config(vocab_size=120, num_hidden_layers=2, max_position_embeddings=256), "rope_theta",
                      "rope_scaling", "torch_dtype"),
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                "original_max_position_embeddings": 64},
            "dtype": "bfloat16",
        },
        {"prompts": (1, 5, 40, 130)},
    ),
    "qwen_fp8": (
        qwen_config(vocab_size=96, hidden_size=160, num_attention_heads=6, head_dim=24, num_hidden_layers=2,
                    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        {"fp8": torch.bfloat16, "keep_bf16": ["model.layers.1.self_attn.o_proj"]},
    ),
    "qwen_sharded": (qwen_config(num_hidden_layers=2, num_key_value_heads=3), {"shards": 2}),
}


def attention_shapes(c):
    if c["model_type"] == "qwen3_moe":
        d = c["head_dim"]
        q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
        h = c["hidden_size"]
        return {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q), "q_norm": (d,),
                "k_norm": (d,)}
    h, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, v, rank = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]
    shapes = {}
    if c["q_lora_rank"] is None:
        shapes["q_proj"] = (heads * (nope + rope), h)
    else:
        shapes["q_a_proj"] = (c["q_lora_rank"], h)
        shapes["q_a_layernorm"] = (c["q_lora_rank"],)
        shapes["q_b_proj"] = (heads * (nope + rope), c["q_lora_rank"])
    shapes["kv_a_proj_with_mqa"] = (rank + rope, h)
    shapes["kv_a_layernorm"] = (rank,)
    shapes["kv_b_proj"] = (heads * (nope + v), rank)
    shapes["o_proj"] = (h, heads * v)
    return shapes


def is_moe_layer(c, i):
    if c["model_type"] == "qwen3_moe":
        return i not in c.get("mlp_only_layers", []) and (i + 1) % c.get("decoder_sparse_step", 1) == 0
    return i >= c["first_k_dense_replace"]


def mlp_shapes(prefix, h, width):
    return {f"{prefix}gate_proj": (width, h), f"{prefix}up_proj": (width, h), f"{prefix}down_proj": (h, width)}


def layer_shapes(c, moe):
    h = c["hidden_size"]
    shapes = {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
    shapes.update({f"self_attn.{name}": shape for name, shape in attention_shapes(c).items()})
    if not moe:
        shapes.update(mlp_shapes("mlp.", h, c["intermediate_size"]))
        return shapes
    experts = c.get("n_routed_experts") or c["num_experts"]
    shapes["mlp.gate"] = (experts, h)
    for e in range(experts):
        shapes.update(mlp_shapes(f"mlp.experts.{e}.", h, c["moe_intermediate_size"]))
    if c.get("n_shared_experts"):
        shapes.update(mlp_shapes("mlp.shared_experts.", h, c["moe_intermediate_size"] * c["n_shared_experts"]))
    return shapes


def tensor_shapes(c):
    """Hub names without the '.weight' ending -> shape, in file order."""
    h, vocab, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    shapes = {"model.embed_tokens": (vocab, h)}
    for i in range(layers):
        shapes.update({f"model.layers.{i}.{n}": s for n, s in layer_shapes(c, is_moe_layer(c, i)).items()})
    for i in range(layers, layers + c.get("num_nextn_predict_layers", 0)):
        extra = {"embed_tokens": (vocab, h), "enorm": (h,), "hnorm": (h,), "eh_proj": (h, 2 * h),
                 "shared_head.norm": (h,), "shared_head.head": (vocab, h), **layer_shapes(c, True)}
        shapes.update({f"model.layers.{i}.{n}": s for n, s in extra.items()})
    shapes["model.norm"] = (h,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head"] = (vocab, h)
    return shapes


def random_weights(c, seed):
    """bf16 weights, scaled so that attention scores, router scores and logits all spread (std 1 to 3)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(c).items():
        x = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            x = 1 + 0.2 * x
        elif name == "model.embed_tokens":
            x = x * (0.25 if c["tie_word_embeddings"] else 1.0)
        elif name == "lm_head":
            x = x * (2.0 / math.sqrt(shape[1]))
        else:
            # In bf16 a close router decision may fall the other way. That is not an error, so it must not swing the
            # logits: what the experts add to the residual stream is kept small.
            gain = 0.35 if name.endswith("down_proj") else 1.4
            x = x * (gain / math.sqrt(shape[1]))
            # Neighbouring 128 x 128 blocks get clearly different magnitudes, so that a wrong scale index is seen.
            x[BLOCK:, :] *= 1.7
            x[:, BLOCK:] *= 0.6
        weights[f"{name}.weight"] = x.to(torch.bfloat16)
        if name.endswith("mlp.gate") and c["model_type"] == "deepseek_v3":
            # Positive, so that sigmoid + bias > 0 and masking losing groups with 0 or with -inf selects alike
            # (transformers has done both in different releases). Kept in fp32, as the hub checkpoints keep it.
            weights[f"{name}.e_score_correction_bias"] = 0.4 * torch.rand(shape[0], generator=generator)
    for name in list(weights):
        if name.endswith(".shared_head.head.weight"):
            weights[name] = weights["lm_head.weight"].clone()
        elif name.endswith(".embed_tokens.weight"):
            weights[name] = weights["model.embed_tokens.weight"].clone()
    return weights


def expand_blocks(scale, shape):
    return scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def quantise(w, scale_dtype):
    rows, cols = math.ceil(w.shape[0] / BLOCK), math.ceil(w.shape[1] / BLOCK)
    padded = torch.zeros(rows * BLOCK, cols * BLOCK)
    padded[: w.shape[0], : w.shape[1]] = w.float().abs()
    amax = padded.view(rows, BLOCK, cols, BLOCK).amax(dim=(1, 3))
    scale = (amax / FP8_MAX).to(scale_dtype)
    q = (w.float() / expand_blocks(scale.float(), w.shape)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q, scale


def unquantised_modules(c, keep_bf16):
    modules = ["lm_head"]
    for i in range(c["num_hidden_layers"]):
        modules += [f"model.layers.{i}.input_layernorm", f"model.layers.{i}.post_attention_layernorm"]
        if is_moe_layer(c, i):
            modules.append(f"model.layers.{i}.mlp.gate")
    return modules + keep_bf16


def to_fp8(c, weights, scale_dtype, keep_bf16):
    """Returns (stored tensors, dequantised fp32 tensors, quantization_config)."""
    skipped = unquantised_modules(c, keep_bf16)
    stored, dequantised = {}, {}
    for name, w in weights.items():
        module = name.removesuffix(".weight")
        if w.dim() != 2 or module in skipped or module == "model.embed_tokens":
            stored[name], dequantised[name] = w, w.float()
            continue
        q, scale = quantise(w, scale_dtype)
        stored[name], stored[f"{name}_scale_inv"] = q, scale
        dequantised[name] = q.float() * expand_blocks(scale.float(), q.shape)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
              "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": skipped}
    return stored, dequantised, config


def save_checkpoint(folder, config, tensors, shards):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: w.contiguous() for name, w in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        # Dealt out in turn, so that one layer's tensors and one layer's experts lie in both files.
        part = {name: tensors[name] for i, name in enumerate(tensors) if i % shards == k}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(w.numel() * w.element_size() for w in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def load_oracle(folder, dtype):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{folder}: transformers misses {info['missing_keys']} / {info['mismatched_keys']}")
    unexpected = [k for k in info["unexpected_keys"] if f"layers.{model.config.num_hidden_layers}." not in k]
    if unexpected:
        raise SystemExit(f"{folder}: transformers does not know {unexpected}")
    return model.eval()


class RouterMargins:
    """Smallest distance, over all routed positions seen, between a chosen and a rejected expert (or group)."""

    def __init__(self, model):
        self.smallest = math.inf
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self.observe)

    def observe(self, gate, inputs, outputs):
        logits = torch.nn.functional.linear(inputs[0].reshape(-1, gate.hidden_dim).float(), gate.weight.float())
        if not hasattr(gate, "e_score_correction_bias"):
            self.record(logits.softmax(-1), gate.top_k)
            return
        scores = logits.sigmoid() + gate.e_score_correction_bias
        if (scores <= 0).any():
            raise SystemExit("a biased router score is not positive")
        groups = scores.view(scores.shape[0], gate.num_group, -1)
        group_scores = groups.topk(2, -1)[0].sum(-1)
        self.record(group_scores, gate.topk_group)
        best = group_scores.topk(gate.topk_group, -1)[1]
        keep = torch.zeros_like(group_scores).scatter_(1, best, 1).bool()
        self.record(groups.masked_fill(~keep[:, :, None], -math.inf).flatten(1), gate.top_k)

    def record(self, scores, k):
        if k < scores.shape[1]:
            ordered = scores.sort(-1, descending=True)[0]
            self.smallest = min(self.smallest, (ordered[:, k - 1] - ordered[:, k]).min().item())


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def greedy(model, ids):
    """Greedy tokens, each from a fresh full forward pass; EOS does not stop it. Also, per step, the lead in nats of the
    best token over the second best."""
    ids, lead = list(ids), []
    for _ in range(GREEDY_TOKENS):
        best = logits_of(model, ids)[-1].log_softmax(-1).topk(2)
        lead.append(round(float(best.values[0] - best.values[1]), 6))
        ids.append(int(best.indices[0]))
    return ids[-GREEDY_TOKENS:], lead


def behind_oracle(oracle, ids, tokens):
    """Per step: the oracle's logprob of its best token minus its logprob of the token taken, on that prefix."""
    logprobs = logits_of(oracle, ids + tokens[:-1])[len(ids) - 1 :].log_softmax(-1)
    taken = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return [round(x, 6) for x in (logprobs.amax(-1) - taken).tolist()]


@torch.no_grad()
def hidden_states(model, ids):
    """[num_hidden_layers + 2, len(ids), hidden]: the embedding, each layer's output, the final norm's output."""
    seen = []
    modules = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    hooks = [m.register_forward_hook(lambda _m, _i, out: seen.append(out if torch.is_tensor(out) else out[0]))
             for m in modules]
    logits_of(model, ids)
    for hook in hooks:
        hook.remove()
    return torch.stack([x[0] for x in seen]).float()


def run_oracle(name, oracle, half, seed, lengths):
    """Returns (golden.json object, golden.safetensors tensors), or None when the seed gives a near tie."""
    margins = RouterMargins(oracle)
    generator = torch.Generator().manual_seed(seed + 1)
    prompts = [torch.randint(2, oracle.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    tensors = {f"logits.{i}": logits_of(oracle, ids) for i, ids in enumerate(prompts)}
    tensors["hidden.1"] = hidden_states(oracle, prompts[1])
    if margins.smallest < MIN_ROUTER_MARGIN:
        return None
    records = []
    for ids in prompts:
        tokens, lead = greedy(oracle, ids)
        if min(lead) < MIN_GREEDY_GAP or margins.smallest < MIN_ROUTER_MARGIN:
            return None
        records.append({"ids": ids, "greedy_fp32": tokens, "greedy_fp32_lead_nats": lead})
    smallest_margin = margins.smallest
    for record in records:
        tokens, _ = greedy(half, record["ids"])
        record["greedy_bf16"] = tokens
        record["greedy_bf16_behind_nats"] = behind_oracle(oracle, record["ids"], tokens)
        if max(record["greedy_bf16_behind_nats"]) > MAX_BF16_BEHIND_NATS:
            return None
    bf16_error = max((logits_of(half, ids) - tensors[f"logits.{i}"]).abs().max().item()
                     for i, ids in enumerate(prompts))
    every = torch.cat([x.flatten() for key, x in tensors.items() if key.startswith("logits")])
    golden = {
        "case": name,
        "seed": seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "logits_max_abs": round(every.abs().max().item(), 6),
        "logits_std": round(every.std().item(), 4),
        "bf16_logits_max_error": round(bf16_error, 4),
        "smallest_router_margin": smallest_margin,
        "prompts": records,
    }
    return golden, tensors


def make_case(name, out):
    config, options = CASES[name]
    lengths = options.get("prompts", PROMPT_LENGTHS)
    for seed in range(1, 200):
        weights = random_weights(config, seed)
        stored, dequantised, file_config = weights, None, dict(config)
        if "fp8" in options:
            stored, dequantised, quantization = to_fp8(config, weights, options["fp8"], options.get("keep_bf16", []))
            file_config["quantization_config"] = quantization
        with tempfile.TemporaryDirectory() as scratch:
            # transformers would run FP8 weights through GPU kernels that also quantise activations, so the oracle
            # reads the dequantised weights from an unquantised copy.
            plain = pathlib.Path(scratch)
            save_checkpoint(plain, config, dequantised or weights, 1)
            oracle, half = load_oracle(plain, torch.float32), load_oracle(plain, torch.bfloat16)
            result = run_oracle(name, oracle, half, seed, lengths)
        if result is not None:
            break
    else:
        raise SystemExit(f"{name}: every seed gives a near tie")
    golden, tensors = result
    folder = out / name
    save_checkpoint(folder, file_config, stored, options.get("shards", 1))
    save_file(tensors, folder / "golden.safetensors")
    (folder / "golden.json").write_text(compact_json(golden))
    behind = [max(p["greedy_bf16_behind_nats"]) for p in golden["prompts"]]
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: seed {seed}, {size} bytes, logits std {golden['logits_std']} max {golden['logits_max_abs']}, "
          f"router margin {golden['smallest_router_margin']:.2e}, bf16 error {golden['bf16_logits_max_error']} and "
          f"{max(behind)} nats behind", flush=True)


def compact_json(golden):
    """One line per list: readable diffs without one line per token."""
    text = json.dumps({**golden, "prompts": None}, indent=1)
    prompts = ",\n".join("  {\n" + ",\n".join(f'   "{k}": {json.dumps(v)}' for k, v in p.items()) + "\n  }"
                         for p in golden["prompts"])
    return text.replace('"prompts": null', '"prompts": [\n' + prompts + "\n ]") + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/golden"))
    parser.add_argument("--case", nargs="*", choices=sorted(CASES), default=list(CASES))
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in args.case:
        make_case(name, args.out)


if __name__ == "__main__":
    main()
