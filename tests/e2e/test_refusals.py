"""What must be refused at start: one line that names file, value and remedy, exit code 1, before any port opens."""

import json
import shutil
import socket
import subprocess

import pytest

from conftest import DEMO, ROOT, TANDEM, free_port, http_json


def run_serve(model, *options, port=None):
    port = port or free_port()
    done = subprocess.run([str(TANDEM), "serve", str(model), "--port", str(port), *map(str, options)],
                          capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.strip().splitlines()


def last_line(result):
    code, lines = result
    assert code == 1, lines
    assert lines
    return lines[-1]


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in DEMO.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def test_missing_model():
    assert "config.json" in last_line(run_serve("/nonexistent/model"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_is_no_model(name):
    line = last_line(run_serve(DEMO / name))
    assert f"{DEMO / name}: is a file" in line and "give the folder" in line


def test_a_filter_that_fits_no_kernel_lists_them():
    done = subprocess.run([str(TANDEM), "bench", "kernels", "--filter", "nosuch", "--cpu-isa", "auto"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "--filter 'nosuch'" in done.stderr and "\n  linear bf16" in done.stderr and "\n  sample greedy" in done.stderr


def test_unknown_architecture(copy):
    edit_config(copy, architectures=["LlamaForCausalLM"])
    line = last_line(run_serve(copy))
    assert "LlamaForCausalLM" in line and "DeepseekV3ForCausalLM" in line and "config.json" in line


def test_config_that_does_not_fit_the_tensors(copy):
    config = json.loads((copy / "config.json").read_text())
    edit_config(copy, hidden_size=config["hidden_size"] * 2)
    line = last_line(run_serve(copy))
    assert "model.safetensors" in line and str(config["hidden_size"]) in line


@pytest.mark.parametrize("damage", ["truncated", "header_length", "not_json"])
def test_damaged_safetensors(copy, damage):
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-1000]
    elif damage == "header_length":
        data[:8] = (2**40).to_bytes(8, "little")
    else:
        data[8:12] = b"!!!!"
    path.write_bytes(bytes(data))
    assert "model.safetensors" in last_line(run_serve(copy))


def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in last_line(run_serve(DEMO, port=port))


@pytest.mark.parametrize("options,word", [
    (["--max-model-len", "1000000"], "max-model-len"),
    (["--num-gpu-blocks-override", "2"], "num-gpu-blocks-override"),
    (["--kv-cache-memory-bytes", "100T"], "too little; lower --kv-cache-memory-bytes to"),
    (["--no-such-option", "1"], "no-such-option"),
    (["--kv-transfer-config", '{"kv_connector":"UcxConnector","kv_role":"kv_dictator"}'], "kv_role"),
    (["--kv-transfer-config", '{"kv_connector":"P2pNcclConnector","kv_role":"kv_both"}'], "UcxConnector"),
    (["--max-num-seqs", "600"], "max-num-batched-tokens"),
])
def test_bad_options(options, word):
    code, lines = run_serve(DEMO, *options)
    assert code != 0 and word in lines[-1], lines


def test_different_models_on_the_two_sides(launcher, copy):
    """Same shapes, other weights: refused at first contact with both fingerprints."""
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    for offset in range(middle, middle + 400000, 2):
        data[offset] ^= 1
    path.write_bytes(bytes(data))
    config = json.dumps({"kv_connector": "UcxConnector", "kv_role": "kv_both", "kv_port": free_port()})
    prefill = launcher.serve("--kv-transfer-config", config, model=copy)
    decode = launcher.worker("kv_both")
    body = {"model": "demo", "prompt": [400] * 40, "max_tokens": 2}
    router = launcher.route([prefill], [decode], "--enforce-disagg", "--rescue-timeout-s", 1)
    status, answer = http_json(router.url + "/v1/completions", body)
    assert status == 503 and "different models" in answer["error"]["message"], answer
    rounded = launcher.worker("kv_both", "--kv-cache-dtype", "fp8")
    router = launcher.route([rounded], [decode], "--enforce-disagg", "--rescue-timeout-s", 1)
    status, answer = http_json(router.url + "/v1/completions", body)
    assert status == 503 and "bf16" in answer["error"]["message"] and "f8" in answer["error"]["message"], answer
    # It is not the client's fault: a worker that fits is tried, here decode itself.
    router = launcher.route([prefill], [decode])
    assert http_json(router.url + "/v1/completions", body)[0] == 200
    assert "do not fit together" in router.read_log()
