"""A small random model with grouped-query attention and the demo model's tokenizer. Its weights are large enough that what
a token attends to decides what follows it: with KV of another prompt the answers are others."""

import array
import json
import random
import shutil
import struct

from conftest import DEMO

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 4096, "hidden_size": 128,
    "intermediate_size": 256, "moe_intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [0], "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None,
    "max_position_embeddings": 1024, "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16"}


def list_shapes():
    """name -> (shape, size of its numbers)."""
    hidden, heads, dim = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["head_dim"]
    kv_heads, vocab = CONFIG["num_key_value_heads"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens.weight": ((vocab, hidden), 1.0), "model.norm.weight": ((hidden,), 0.0),
              "lm_head.weight": ((vocab, hidden), 0.5)}

    def add_mlp(prefix, width):
        shapes.update({prefix + "gate_proj.weight": ((width, hidden), 0.2),
                       prefix + "up_proj.weight": ((width, hidden), 0.2),
                       prefix + "down_proj.weight": ((hidden, width), 0.2)})

    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        shapes.update({
            prefix + "input_layernorm.weight": ((hidden,), 0.0),
            prefix + "post_attention_layernorm.weight": ((hidden,), 0.0),
            attention + "q_proj.weight": ((heads * dim, hidden), 0.2), attention + "q_norm.weight": ((dim,), 0.5),
            attention + "k_proj.weight": ((kv_heads * dim, hidden), 0.2), attention + "k_norm.weight": ((dim,), 0.5),
            attention + "v_proj.weight": ((kv_heads * dim, hidden), 0.2),
            attention + "o_proj.weight": ((hidden, heads * dim), 0.4)})
        if layer in CONFIG["mlp_only_layers"]:
            add_mlp(prefix + "mlp.", CONFIG["intermediate_size"])
            continue
        shapes[prefix + "mlp.gate.weight"] = ((CONFIG["num_experts"], hidden), 0.2)
        for expert in range(CONFIG["num_experts"]):
            add_mlp(f"{prefix}mlp.experts.{expert}.", CONFIG["moe_intermediate_size"])
    return shapes


def make_gqa_model(folder, seed=7):
    draw = random.Random(seed).random
    header, data = {}, bytearray()
    for name, (shape, size) in list_shapes().items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        middle = 1.0 if name.endswith("norm.weight") else 0.0
        wide = array.array("f", (middle + size * (2 * draw() - 1) for _ in range(count))).tobytes()
        numbers = bytearray(2 * count)  # bf16: the upper half
        numbers[0::2], numbers[1::2] = wide[2::4], wide[3::4]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder
