"""The demo model's forward pass in plain torch functions, and its checkpoint in the hub layout.

Written for training: all tokens of a step lie in one flat [tokens, hidden] array made of segments of equal-length
rows, so that everything but attention has one fixed shape and is compiled once. Experts are few and small, so every
expert runs on every token in three wide matrix products and the router's weights (zero for experts not chosen) scale
the activations; the sum is the same as running only the chosen ones.
"""

import json
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_interleave": True,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

LAYERS = CONFIG["num_hidden_layers"]
HIDDEN = CONFIG["hidden_size"]
HEADS = CONFIG["num_attention_heads"]
NOPE, ROPE, VDIM = CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"], CONFIG["v_head_dim"]
Q_RANK, KV_RANK = CONFIG["q_lora_rank"], CONFIG["kv_lora_rank"]
EXPERTS, TOP_K, GROUPS, TOP_GROUPS = (CONFIG[k] for k in ("n_routed_experts", "num_experts_per_tok", "n_group",
                                                          "topk_group"))
WIDTH = CONFIG["moe_intermediate_size"]
ATTENTION = ("input_layernorm", "self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj",
             "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj")
DENSE = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# "experts.gate_proj" here holds all experts, [E, width, hidden]; the file has one tensor per expert.
MOE = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate", "mlp.experts.gate_proj", "mlp.experts.up_proj",
       "mlp.experts.down_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj",
       "mlp.shared_experts.down_proj")


def is_moe(layer):
    return layer >= CONFIG["first_k_dense_replace"]


def layer_shapes(layer):
    h, dense, shared = HIDDEN, CONFIG["intermediate_size"], WIDTH * CONFIG["n_shared_experts"]
    shapes = {
        "input_layernorm": (h,),
        "self_attn.q_a_proj": (Q_RANK, h),
        "self_attn.q_a_layernorm": (Q_RANK,),
        "self_attn.q_b_proj": (HEADS * (NOPE + ROPE), Q_RANK),
        "self_attn.kv_a_proj_with_mqa": (KV_RANK + ROPE, h),
        "self_attn.kv_a_layernorm": (KV_RANK,),
        "self_attn.kv_b_proj": (HEADS * (NOPE + VDIM), KV_RANK),
        "self_attn.o_proj": (h, HEADS * VDIM),
        "post_attention_layernorm": (h,),
    }
    if not is_moe(layer):
        return {**shapes, "mlp.gate_proj": (dense, h), "mlp.up_proj": (dense, h), "mlp.down_proj": (h, dense)}
    return {
        **shapes,
        "mlp.gate": (EXPERTS, h),
        "mlp.experts.gate_proj": (EXPERTS, WIDTH, h),
        "mlp.experts.up_proj": (EXPERTS, WIDTH, h),
        "mlp.experts.down_proj": (EXPERTS, h, WIDTH),
        "mlp.shared_experts.gate_proj": (shared, h),
        "mlp.shared_experts.up_proj": (shared, h),
        "mlp.shared_experts.down_proj": (h, shared),
    }


def parameter_shapes():
    """Name (hub name without '.weight') -> shape. Layer index LAYERS is the MTP layer."""
    shapes = {"model.embed_tokens": (CONFIG["vocab_size"], HIDDEN)}
    for i in range(LAYERS + 1):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer_shapes(i).items()})
    mtp = f"model.layers.{LAYERS}."
    shapes.update({mtp + "enorm": (HIDDEN,), mtp + "hnorm": (HIDDEN,), mtp + "eh_proj": (HIDDEN, 2 * HIDDEN),
                   mtp + "shared_head.norm": (HIDDEN,)})
    shapes.update({"model.norm": (HIDDEN,), "lm_head": (CONFIG["vocab_size"], HIDDEN)})
    return shapes


def bias_name(layer):
    return f"model.layers.{layer}.mlp.gate.e_score_correction_bias"


def rms_norm(x, weight):
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]))


def linear(x, weight):
    return F.linear(x, weight.to(x.dtype))


def rotate(x, cos, sin):
    """x [tokens, heads, ROPE], interleaved pairs; the output's order of dimensions is the same for q and k."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def rope_tables(segments, device):
    """cos and sin [tokens, 1, ROPE / 2] of the flat layout: each row of a segment starts at position 0."""
    frequency = CONFIG["rope_theta"] ** (-torch.arange(0, ROPE, 2, device=device).float() / ROPE)
    position = torch.cat([torch.arange(length, device=device).repeat(rows) for rows, length in segments])
    angle = position[:, None, None].float() * frequency
    return angle.cos(), angle.sin()


def project_qkv(x, cos, sin, norm, q_a, q_a_norm, q_b, kv_a, kv_a_norm, kv_b, dtype):
    n = x.shape[0]
    h = rms_norm(x, norm).to(dtype)
    q = linear(rms_norm(linear(h, q_a), q_a_norm).to(dtype), q_b).view(n, HEADS, NOPE + ROPE)
    latent = linear(h, kv_a)
    kv = linear(rms_norm(latent[:, :KV_RANK], kv_a_norm).to(dtype), kv_b).view(n, HEADS, NOPE + VDIM)
    k_rope = rotate(latent[:, KV_RANK:].view(n, 1, ROPE), cos, sin).expand(n, HEADS, ROPE)
    q = torch.cat([q[..., :NOPE], rotate(q[..., NOPE:], cos, sin)], -1)
    k = torch.cat([kv[..., :NOPE], k_rope], -1)
    # The attention kernel wants q, k and v of one width.
    return q, k, F.pad(kv[..., NOPE:], (0, NOPE + ROPE - VDIM))


def attend(q, k, v, segments):
    outputs = []
    parts = zip(*(t.split([rows * length for rows, length in segments]) for t in (q, k, v)))
    for (rows, length), part in zip(segments, parts):
        part = [t.view(rows, length, HEADS, NOPE + ROPE).transpose(1, 2) for t in part]
        out = F.scaled_dot_product_attention(*part, is_causal=True, scale=(NOPE + ROPE) ** -0.5)
        outputs.append(out.transpose(1, 2)[..., :VDIM].reshape(rows * length, HEADS * VDIM))
    return torch.cat(outputs)


def finish_dense(x, attended, o, norm, gate, up, down, dtype):
    x = x + linear(attended, o)
    h = rms_norm(x, norm).to(dtype)
    return x + linear(F.silu(linear(h, gate)) * linear(h, up), down)


def top_mask(v, k):
    """True for the k largest of the last dimension; of equal values the lower index wins."""
    n = v.shape[-1]
    earlier = torch.ones(n, n, device=v.device, dtype=torch.bool).tril(-1)
    other, mine = v[..., None, :], v[..., :, None]
    return ((other > mine) | ((other == mine) & earlier)).sum(-1) < k


def route(h, router, bias):
    """Returns the experts' weights [tokens, E], zero where not chosen, and the choice."""
    score = F.linear(h.float(), router.float()).sigmoid()
    biased = (score + bias).detach()
    groups = biased.view(-1, GROUPS, EXPERTS // GROUPS)
    group_score = torch.where(top_mask(groups, 2), groups, 0.0).sum(-1)
    kept = top_mask(group_score, TOP_GROUPS).repeat_interleave(EXPERTS // GROUPS, -1)
    chosen = top_mask(torch.where(kept, biased, float("-inf")), TOP_K)
    weight = torch.where(chosen, score, 0.0)
    return weight / (weight.sum(-1, keepdim=True) + 1e-20) * CONFIG["routed_scaling_factor"], chosen


def finish_moe(x, attended, valid, bias, o, norm, router, gate, up, down, shared_gate, shared_up, shared_down, dtype):
    """Also returns how many valid tokens chose each expert."""
    x = x + linear(attended, o)
    h = rms_norm(x, norm).to(dtype)
    weight, chosen = route(h, router, bias)
    gates = torch.cat([gate.reshape(-1, HIDDEN), shared_gate])
    ups = torch.cat([up.reshape(-1, HIDDEN), shared_up])
    downs = torch.cat([down.permute(1, 0, 2).reshape(HIDDEN, -1), shared_down], 1)
    shared = torch.ones(weight.shape[0], shared_gate.shape[0], device=x.device)
    scale = torch.cat([weight.repeat_interleave(WIDTH, 1), shared], 1)
    activation = F.silu(linear(h, gates)) * linear(h, ups) * scale.to(dtype)
    return x + linear(activation, downs), (chosen & valid[:, None]).sum(0)


def mtp_input(hidden, next_embedding, enorm, hnorm, eh_proj, dtype):
    """Embedding first, then the main model's hidden state after its final norm."""
    both = torch.cat([rms_norm(next_embedding, enorm), rms_norm(hidden, hnorm)], -1)
    return linear(both.to(dtype), eh_proj).float()


class Embed(torch.autograd.Function):
    """Rows of a table. The gradient is summed in place, without the sort that torch's own takes, so that a CUDA graph
    can hold it."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        ctx.rows = table.shape
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.rows).index_add_(0, ctx.saved_tensors[0], grad), None


class Model:
    """params: name -> tensor as in parameter_shapes(), plus bias_name(i) for the routers' correction biases."""

    def __init__(self, params, dtype, compile_parts=False):
        self.params, self.dtype = params, dtype
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compile_parts else (lambda f: f)
        self.project_qkv, self.finish_dense, self.finish_moe = wrap(project_qkv), wrap(finish_dense), wrap(finish_moe)
        self.mtp_input, self.norm = wrap(mtp_input), wrap(rms_norm)

    def weights(self, layer, names):
        return [self.params[f"model.layers.{layer}.{name}"] for name in names]

    def layer(self, i, x, cos, sin, segments, valid, counts):
        q, k, v = self.project_qkv(x, cos, sin, *self.weights(i, ATTENTION), self.dtype)
        attended = attend(q, k, v, segments)
        if not is_moe(i):
            return self.finish_dense(x, attended, *self.weights(i, DENSE), self.dtype)
        x, count = self.finish_moe(x, attended, valid, self.params[bias_name(i)], *self.weights(i, MOE), self.dtype)
        counts.append(count)
        return x

    def main_hidden(self, ids, segments, tables, valid, counts):
        """Flat ids -> hidden state after the final norm. Appends each MoE layer's expert counts to `counts`."""
        x = Embed.apply(self.params["model.embed_tokens"], ids)
        for i in range(LAYERS):
            x = self.layer(i, x, *tables, segments, valid, counts)
        return self.norm(x, self.params["model.norm"])

    def mtp_hidden(self, main, next_ids, segments, tables, valid, counts):
        """The main model's hidden state and the ids that follow -> the MTP layer's hidden state for lm_head."""
        x = self.mtp_input(main, Embed.apply(self.params["model.embed_tokens"], next_ids),
                           *self.weights(LAYERS, ("enorm", "hnorm", "eh_proj")), self.dtype)
        x = self.layer(LAYERS, x, *tables, segments, valid, counts)
        return self.norm(x, self.params[f"model.layers.{LAYERS}.shared_head.norm"])

    @torch.no_grad()
    def logits(self, ids):
        """ids [rows, length] -> main logits and MTP logits [rows, length, vocab], fp32. The MTP logits at i use the
        token at i + 1 (token 0 stands in at the last position) and predict the token at i + 2."""
        segments = [tuple(ids.shape)]
        flat, following = ids.reshape(-1), torch.cat([ids[:, 1:], ids.new_zeros(len(ids), 1)], 1).reshape(-1)
        same = segments, rope_tables(segments, ids.device), torch.ones_like(flat, dtype=torch.bool), []
        main = self.main_hidden(flat, *same)
        mtp = self.mtp_hidden(main, following, *same)
        return [linear(h.to(self.dtype), self.params["lm_head"]).float().view(*ids.shape, -1) for h in (main, mtp)]

    @torch.no_grad()
    def next_logits(self, ids, end):
        """ids [rows, length], end [rows] -> main logits [rows, vocab] at position end - 1 of each row."""
        segments = [tuple(ids.shape)]
        flat = ids.reshape(-1)
        main = self.main_hidden(flat, segments, rope_tables(segments, ids.device),
                                torch.ones_like(flat, dtype=torch.bool), [])
        last = main.view(*ids.shape, HIDDEN)[torch.arange(len(ids), device=ids.device), end - 1]
        return linear(last.to(self.dtype), self.params["lm_head"]).float()


@torch.no_grad()
def greedy(model, prompts, steps, stop=None):
    """Greedy tokens for each prompt (lists of ids), by full forward passes over right-padded rows."""
    device = model.params["lm_head"].device
    ids = torch.zeros(len(prompts), max(map(len, prompts)) + steps, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    end = torch.tensor([len(p) for p in prompts], device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompts), device=device)
    for _ in range(steps):
        token = model.next_logits(ids[:, : int(end.max())], end).argmax(-1)
        ids[rows, end] = torch.where(done, 0, token)
        end += ~done
        if stop is not None:
            done |= token == stop
            if done.all():
                break
    return [ids[r, len(p) : int(end[r])].tolist() for r, p in enumerate(prompts)]


def save_checkpoint(params, folder):
    """bf16, hub layout. The embedding and head of the MTP layer are the main model's and are not stored again."""
    tensors = {}
    for name, shape in parameter_shapes().items():
        w = params[name].detach().to(torch.bfloat16).cpu().contiguous()
        if ".experts." not in name:
            tensors[f"{name}.weight"] = w
            continue
        prefix, kind = name.split(".experts.")
        for e in range(shape[0]):
            tensors[f"{prefix}.experts.{e}.{kind}.weight"] = w[e].clone()
    for i in range(LAYERS + 1):
        if is_moe(i):
            # Adding one number to all biases of a router changes no decision; positive scores mean that masking
            # losing groups with 0 or with -inf is the same.
            bias = params[bias_name(i)].detach().float().cpu()
            tensors[bias_name(i)] = bias - bias.min()
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    # A small model wanders at temperature 1, so clients that set nothing get nearly greedy answers.
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 5, "do_sample": True, "temperature": 0.3,
                  "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def load_checkpoint(folder, device):
    """fp32 parameters, exactly the stored values."""
    tensors = {k: v.to(device).float() for k, v in load_file(pathlib.Path(folder) / "model.safetensors").items()}
    params = {}
    for name in parameter_shapes():
        if ".experts." in name:
            prefix, kind = name.split(".experts.")
            params[name] = torch.stack([tensors[f"{prefix}.experts.{e}.{kind}.weight"] for e in range(EXPERTS)])
        else:
            params[name] = tensors[f"{name}.weight"]
    params.update({bias_name(i): tensors[bias_name(i)] for i in range(LAYERS + 1) if is_moe(i)})
    return params
