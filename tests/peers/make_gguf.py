"""Write a random-weight Qwen3-MoE-shaped GGUF, for timing only."""

import struct, sys, numpy as np

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
rng = np.random.default_rng(1)


class W:
    def __init__(s, path, arch):
        s.kv = []
        s.t = []
        s.path = path
        s.arch = arch

    def s_(s, x):
        b = x.encode()
        return struct.pack("<Q", len(b)) + b

    def u32(s, k, v):
        s.kv.append(s.s_(k) + struct.pack("<II", 4, v))

    def f32(s, k, v):
        s.kv.append(s.s_(k) + struct.pack("<If", 6, v))

    def st(s, k, v):
        s.kv.append(s.s_(k) + struct.pack("<I", 8) + s.s_(v))

    def arr_s(s, k, v):
        s.kv.append(s.s_(k) + struct.pack("<IIQ", 9, 8, len(v)) + b"".join(s.s_(x) for x in v))

    def arr_i(s, k, v):
        s.kv.append(s.s_(k) + struct.pack("<IIQ", 9, 5, len(v)) + np.array(v, "<i4").tobytes())

    def add(s, name, dims, typ):
        s.t.append((name, dims, typ))


def nbytes(dims, typ):
    n = int(np.prod(dims))
    return {F32: 4 * n, F16: 2 * n, Q8_0: n // 32 * 34, Q4_0: n // 32 * 18}[typ]


def data(dims, typ):
    n = int(np.prod(dims))
    K = dims[0]
    sc = 1.0 / np.sqrt(K)
    if typ == F32:
        return np.ones(n, "<f4").tobytes()
    if typ == F16:
        return (rng.standard_normal(n, dtype=np.float32) * sc).astype("<f2").tobytes()
    b = n // 32
    if typ == Q8_0:
        a = np.empty((b, 34), np.uint8)
        a[:, :2] = np.frombuffer(np.float16(sc / 60).tobytes(), np.uint8)
        a[:, 2:] = rng.integers(0, 256, (b, 32), dtype=np.uint8)
        return a.tobytes()
    a = np.empty((b, 18), np.uint8)
    a[:, :2] = np.frombuffer(np.float16(sc / 4).tobytes(), np.uint8)
    a[:, 2:] = rng.integers(0, 256, (b, 16), dtype=np.uint8)
    return a.tobytes()


def main(path, L, H, nh, nkv, hd, E, topk, ff, V, typ):
    w = W(path, "qwen3moe")
    a = "qwen3moe"
    w.st("general.architecture", a)
    w.st("general.name", "synthetic")
    w.u32("general.file_type", {F16: 1, Q4_0: 2, Q8_0: 7}[typ])
    w.u32(a + ".block_count", L)
    w.u32(a + ".context_length", 32768)
    w.u32(a + ".embedding_length", H)
    w.u32(a + ".feed_forward_length", ff)
    w.u32(a + ".attention.head_count", nh)
    w.u32(a + ".attention.head_count_kv", nkv)
    w.f32(a + ".rope.freq_base", 1e6)
    w.f32(a + ".attention.layer_norm_rms_epsilon", 1e-6)
    w.u32(a + ".attention.key_length", hd)
    w.u32(a + ".attention.value_length", hd)
    w.u32(a + ".expert_count", E)
    w.u32(a + ".expert_used_count", topk)
    w.u32(a + ".expert_feed_forward_length", ff)
    w.st("tokenizer.ggml.model", "gpt2")
    w.st("tokenizer.ggml.pre", "qwen2")
    toks = [chr(256 + i) if i < 256 else f"t{i}" for i in range(V)]
    w.arr_s("tokenizer.ggml.tokens", toks)
    w.arr_i("tokenizer.ggml.token_type", [1] * V)
    w.arr_s("tokenizer.ggml.merges", ["a b"])
    w.u32("tokenizer.ggml.eos_token_id", V - 1)
    w.u32("tokenizer.ggml.bos_token_id", V - 2)
    w.add("token_embd.weight", (H, V), typ)
    w.add("output_norm.weight", (H,), F32)
    w.add("output.weight", (H, V), typ)
    for i in range(L):
        b = f"blk.{i}."
        w.add(b + "attn_norm.weight", (H,), F32)
        w.add(b + "ffn_norm.weight", (H,), F32)
        w.add(b + "attn_q.weight", (H, nh * hd), typ)
        w.add(b + "attn_k.weight", (H, nkv * hd), typ)
        w.add(b + "attn_v.weight", (H, nkv * hd), typ)
        w.add(b + "attn_output.weight", (nh * hd, H), typ)
        w.add(b + "attn_q_norm.weight", (hd,), F32)
        w.add(b + "attn_k_norm.weight", (hd,), F32)
        w.add(b + "ffn_gate_inp.weight", (H, E), F32 if False else F16)
        w.add(b + "ffn_gate_exps.weight", (H, ff, E), typ)
        w.add(b + "ffn_up_exps.weight", (H, ff, E), typ)
        w.add(b + "ffn_down_exps.weight", (ff, H, E), typ)
    with open(path, "wb") as f:
        h = struct.pack("<IIQQ", 0x46554747, 3, len(w.t), len(w.kv)) + b"".join(w.kv)
        off = 0
        inf = b""
        for n, d, t in w.t:
            inf += (
                w.s_(n)
                + struct.pack("<I", len(d))
                + b"".join(struct.pack("<Q", x) for x in d)
                + struct.pack("<IQ", t, off)
            )
            off += (nbytes(d, t) + 31) // 32 * 32
        h += inf
        h += b"\0" * ((-len(h)) % 32)
        f.write(h)
        for n, d, t in w.t:
            if n.endswith("ffn_gate_inp.weight"):
                x = (rng.standard_normal(int(np.prod(d)), dtype=np.float32) / np.sqrt(d[0])).astype("<f2").tobytes()
            else:
                x = data(d, t)
            assert len(x) == nbytes(d, t)
            f.write(x)
            f.write(b"\0" * ((-len(x)) % 32))


if __name__ == "__main__":
    p, L, q = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    main(
        p,
        L,
        2048,
        32,
        4,
        128,
        128,
        8,
        768,
        32000 if len(sys.argv) < 5 else int(sys.argv[4]),
        {"q8_0": Q8_0, "q4_0": Q4_0, "f16": F16}[q],
    )
