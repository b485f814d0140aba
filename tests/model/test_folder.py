"""Loading accounts for every tensor, in one error; saving and loading change no bit."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from kalm_min.model import Packed, load_config, load_model

FILE = "model.safetensors"


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def change(folder, edit):
    """Rewrite the weights after `edit` of the dict of tensors."""
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)
    return tensors


def edit(folder, **changes):
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def state(folder, dtype=torch.float32):
    return load_model(folder, dtype=dtype).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_spelling_loads_the_same(folder):
    """`model.` prefix, lm_head, shards with an index: the same tensors, bit for bit."""
    plain = state(folder)
    tensors = change(folder, lambda t: t.update({"lm_head.weight": torch.zeros(320, 32)}))
    assert same(state(folder), plain)
    tensors = {f"model.{key}" if key != "lm_head.weight" else key: t for key, t in tensors.items()}
    save_file(tensors, folder / FILE)
    assert same(state(folder), plain)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    (folder / FILE).unlink()
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(state(folder), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_dtypes(folder, dtype):
    """16-bit and 64-bit files load into float32 by plain conversion."""
    plain = state(folder)
    change(folder, lambda t: t.update({key: value.to(dtype) for key, value in t.items()}))
    assert same(state(folder), {key: value.to(dtype).float() for key, value in plain.items()})
    assert next(iter(state(folder, torch.bfloat16).values())).dtype == torch.bfloat16


def test_one_error_lists_everything(folder):
    """Missing, unexpected, wrong-shaped and integer tensors stand together in one sentence."""

    def edit(tensors):
        del tensors["layers.0.mlp.up_proj.weight"], tensors["norm.weight"]
        tensors["rotary.inv_freq"] = torch.zeros(4)
        tensors["layers.1.self_attn.q_proj.bias"] = torch.zeros(5)
        tensors["layers.1.self_attn.k_proj.bias"] = torch.zeros(16, dtype=torch.int64)

    change(folder, edit)
    with pytest.raises(ValueError, match="missing tensors") as error:
        load_model(folder, dtype=torch.float32)
    text = str(error.value)
    assert "missing tensors: layers.0.mlp.up_proj.weight, norm.weight" in text
    assert "unexpected tensors: rotary.inv_freq" in text
    assert "layers.1.self_attn.q_proj.bias: expected shape (32,), found (5,)" in text
    assert "layers.1.self_attn.k_proj.bias: expected a float tensor, found torch.int64" in text


def test_damaged_files_are_named(folder):
    """A truncated file, a false header, a missing shard: the file, not a traceback or a segfault."""
    whole = (folder / FILE).read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"\xff" * 200):
        (folder / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not safetensors"):
            load_model(folder, dtype=torch.float32)
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match=r"expected model\.safetensors or"):
        load_model(folder, dtype=torch.float32)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"expected gone\.safetensors, found none"):
        load_model(folder, dtype=torch.float32)
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../../secret.safetensors"}}))
    with pytest.raises(
        ValueError, match="expected 'weight_map' to be an object of plain file names"
    ):
        load_model(folder, dtype=torch.float32)


def test_names_and_leftovers_of_others_are_known(folder):
    """DDP's, torch.compile's and PEFT's prefixes, rotary tables, output heads: the same tensors."""
    plain = state(folder)
    tensors = load_file(folder / FILE)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.model.", "base_model.model.model."):
        save_file({f"{prefix}{key}": tensor for key, tensor in tensors.items()}, folder / FILE)
        assert same(state(folder), plain)
    left = {"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "score.weight": torch.ones(2)}
    save_file(tensors | left | {"rotary_emb.inv_freq": torch.zeros(4)}, folder / FILE)
    assert same(state(folder), plain)


def test_one_of_two_tied_tensors_is_enough(folder):
    """safetensors.save_model keeps lm_head.weight alone, which is the table if the file says so."""
    plain = state(folder)
    tensors = load_file(folder / FILE)
    tensors["lm_head.weight"] = tensors.pop("embed_tokens.weight")
    save_file({f"model.{key}": tensor for key, tensor in tensors.items()}, folder / FILE)
    assert same(state(folder), plain)
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing tensors: embed_tokens\.weight"):
        state(folder)


@pytest.mark.parametrize(
    "name",
    [
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "head_dim",
    ],
)
def test_sizes_are_bounded_by_the_weights(folder, name):
    """A billion layers in config.json end in a sentence, before anything is built."""
    edit(folder, **{name: 2**30})
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"{name}: 1073741824 is more than the weights hold"):
        state(folder)
    assert time.monotonic() - start < 2


def test_pickles_are_never_opened(folder):
    """A folder with pickled weights alone says what to do."""
    (folder / FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are never opened"):
        load_model(folder, dtype=torch.float32)


def test_loaded_weights_can_train_without_touching_the_file(folder):
    """Parameters may be views of the mapped file; an update stays in memory."""
    before = (folder / FILE).read_bytes()
    model = load_model(folder, dtype=torch.float32)
    model(Packed.from_sequences([[1, 2, 3]]), causal=True).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert (folder / FILE).read_bytes() == before
    assert not same(model.state_dict(), state(folder))


@pytest.mark.slow
def test_memory_is_about_one_model(tmp_path, make_model, tiny_model_dir):
    """Private memory after loading and reading 200 MB of weights: none, or one copy if converted."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 7, "head_dim": 64}
    make_model(tmp_path / "model", **sizes)
    size = (tmp_path / "model" / FILE).stat().st_size
    code = """
import re, sys, torch
from pathlib import Path
from kalm_min.model import load_model
def private(): return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def load(folder):
    model = load_model(Path(folder), dtype=getattr(torch, sys.argv[3]))
    return model, sum(float(p.sum()) for p in model.parameters())
small = load(sys.argv[1])  # what torch allocates on first use is not the model's
start = private()
model = load(sys.argv[2])
print(private() - start)
"""
    for dtype, copy in (("float32", 0), ("bfloat16", size / 2)):
        out = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, tiny_model_dir, tmp_path / "model", dtype],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert int(out.stdout) <= 1.1 * copy + 64 * 2**20, dtype


BASE = {
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config_of(values, folder):
    """What is read from a config.json of these values."""
    (folder / "config.json").write_text(json.dumps(values))
    return load_config(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "expected qwen2 or qwen3, found 'llama'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "found 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "found 'linear'"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding-window",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "'hidden_act' to be \"silu\" "),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads 3"),
        ({"hidden_size": 33}, "must be a multiple of num_attention_heads"),
        ({"hidden_size": "32"}, "'hidden_size' to be a whole number of at least 1, found '32'"),
        ({"is_causal": "no"}, "'is_causal' to be true or false, found 'no'"),
        ({"vocab_size": None}, "'vocab_size' to be a whole number of at least 1, found nothing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config' to be absent"),
        ({"model_type": "qwen3", "attention_bias": True}, "Qwen3 with biases"),
    ],
)
def test_what_is_not_built_is_refused(tmp_path, changes, message):
    """Anything that would change the vectors and is not computed is one sentence."""
    with pytest.raises(ValueError, match=message) as error:
        config_of(BASE | changes, tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json"))


def test_what_is_not_in_use_is_accepted(tmp_path):
    """A sliding window that no layer uses or that is longer than every position, default rope under
    both names, defaults of transformers."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    assert config_of(BASE | window, tmp_path).head_dim == 8
    window |= {"max_window_layers": 0, "sliding_window": 64, "max_position_embeddings": 64}
    assert config_of(BASE | window, tmp_path).head_dim == 8
    plain = BASE | {"rope_theta": 5e5, "rope_scaling": None}
    assert config_of(plain, tmp_path).rope_theta == 5e5
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}
    assert config_of(BASE | rope, tmp_path).rope_theta == 7e5
    assert config_of(BASE, tmp_path).rope_theta == 1e4
    assert config_of({**BASE, "model_type": "qwen3"}, tmp_path).head_dim == 128
    config = BASE.copy()
    del config["vocab_size"]
    with pytest.raises(
        ValueError, match=r"config\.json: expected 'vocab_size' to be .*, found nothing"
    ):
        config_of(config, tmp_path)
