"""LoRA: nothing at the start, the base untouched, merged = base + update, and PEFT's files both ways."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kalm_min import Embedder
from kalm_min.files import atomic_directory
from kalm_min.model import ModelConfig, Packed, Qwen2, initialise
from kalm_min.model.lora import (
    Adapter,
    LoRAConfig,
    LoRALinear,
    add_adapter,
    load_adapter,
    merge,
    merged_state,
)

# peft 0.21 asks transformers 5.23 for a name that it renames.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TEXTS = ["the cat", "one dog ran far from its house", "blue"]
PACKED = Packed.from_sequences([[1, 2, 3], [4, 5]])
SETTINGS = LoRAConfig(rank=3, alpha=6.0, target_modules=("q_proj", "mlp.down_proj"))


def decoder(dtype=torch.float32, model_type="qwen2"):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = ModelConfig(
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        model_type=model_type,
        **sizes,
    )
    model = Qwen2(config)
    initialise(model, 0)
    return model.to(dtype)


def stir(model):
    """Give every B random values, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator).mul_(0.1)


def test_zero_at_the_start_and_base_frozen():
    """The adapted model computes what the base does; only A and B train, under PEFT's names."""
    model = decoder()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(PACKED, causal=True)
    add_adapter(model, SETTINGS)
    assert torch.equal(model(PACKED, causal=True), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"layers.{i}.{name}.lora_{part}.weight"
        for i in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
        for part in "AB"
    }
    assert trainable | base.keys() == model.state_dict().keys()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # A has a gradient once B is not zero
        model(PACKED, causal=True).square().sum().backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        if name in base:
            assert torch.equal(tensor, base[name])
        else:
            assert tensor.grad is None
            assert tensor.any()


def test_the_seed_alone_decides():
    """The global random state is neither read nor moved; A is uniform within 1 / sqrt(I)."""
    states = []
    for number in (1, 2):
        torch.manual_seed(number)
        model = decoder()
        state = torch.get_rng_state()
        add_adapter(model, SETTINGS, seed=7)
        assert torch.equal(torch.get_rng_state(), state)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    a = states[0]["layers.0.mlp.down_proj.lora_A.weight"]
    assert a.shape == (3, 48)
    assert 0.8 * 48**-0.5 < a.abs().max() <= 48**-0.5


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_merged_is_base_plus_update(model_type):
    """In float64 to 1e-12, against the formula; of a model or of its state dict."""
    model = decoder(torch.float64, model_type)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapter(model, SETTINGS)
    stir(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apart = model(PACKED, causal=False)
    model = merge(model, SETTINGS)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.allclose(model(PACKED, causal=False), apart, rtol=0, atol=1e-12)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert once.keys() == base.keys()
    for name, tensor in once.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in state:
            a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
            update = 2.0 * torch.einsum("or,ri->oi", b, a)  # alpha / rank = 6 / 3
            assert torch.allclose(tensor, base[name] + update, rtol=0, atol=1e-12)
            assert update.abs().max() > 0.01
        else:
            assert torch.equal(tensor, base[name])
    by_state = merged_state(state, SETTINGS)
    assert by_state.keys() == once.keys()
    assert all(torch.equal(by_state[name], once[name]) for name in once)


def adapted(folder):
    """The embedder of a folder with a stirred adapter on it."""
    embedder = Embedder.from_pretrained(folder, dtype="float32")
    embedder.adapter = Adapter(SETTINGS, str(folder))
    add_adapter(embedder.model, SETTINGS)
    stir(embedder.model)
    return embedder


def write(embedder, path):
    """The adapter by itself."""
    with atomic_directory(path) as folder:
        embedder.write_files(folder, merged=False)
    return path


def hugging_face(model, tokenizer):
    """Unit vectors of TEXTS by a transformers or peft model, mean pooling."""
    rows = []
    for ids in tokenizer.encode(TEXTS, max_length=32):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(hidden.mean(0), dim=0))
    return torch.stack(rows).numpy()


def test_peft_opens_ours(tiny_model_dir, tmp_path):
    """Our adapter's folder in peft, on the base in transformers: equal vectors, nothing left over."""
    from peft import AutoPeftModelForFeatureExtraction, PeftModel
    from transformers import AutoModel

    ours = adapted(tiny_model_dir)
    plain = Embedder.from_pretrained(tiny_model_dir, dtype="float32").encode(TEXTS)
    folder = write(ours, tmp_path / "adapter")
    assert sorted(load_file(folder / "adapter_model.safetensors"))[0] == (
        "base_model.model.layers.0.mlp.down_proj.lora_A.weight"
    )
    vectors = ours.encode(TEXTS)
    assert np.abs(vectors - plain).max() > 0.01
    base = AutoModel.from_pretrained(tiny_model_dir, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    assert np.abs(hugging_face(theirs, ours.tokenizer) - vectors).max() < 1e-5
    assert not theirs.active_peft_config.use_rslora
    found = AutoPeftModelForFeatureExtraction.from_pretrained(str(folder)).eval()
    assert np.abs(hugging_face(found, ours.tokenizer) - vectors).max() < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_sentence_transformers_opens_both_forms(tiny_model_dir, tmp_path, causal):
    """The adapter's folder and the merged one, also in another attention mode than the base's."""
    from sentence_transformers import SentenceTransformer

    ours = adapted(tiny_model_dir)
    ours.causal = causal
    ours.save_pretrained(tmp_path / "merged")
    for folder in (write(ours, tmp_path / "adapter"), tmp_path / "merged"):
        theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
        assert np.abs(theirs - ours.encode(TEXTS)).max() < 1e-5
        again = Embedder.from_pretrained(folder, dtype="float32")
        assert again.causal is causal
        assert np.abs(again.encode(TEXTS) - ours.encode(TEXTS)).max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["layers.1.mlp.up_proj", "self_attn.o_proj"], "use_rslora": True},
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        {"target_modules": r".*\.(q|up)_proj", "task_type": "FEATURE_EXTRACTION"},
        {"target_modules": r"model\.layers\.1\..*_proj", "task_type": "CAUSAL_LM"},
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"up_proj": 7, r"^layers\.0\.self_attn\.q_proj": 2},
            "alpha_pattern": {r"layers\.1\.self_attn\.[qk]_proj": 3, "q_proj": 40},
        },
        {
            "target_modules": ["q_proj", "k_proj"],
            "task_type": "CAUSAL_LM",
            "use_rslora": True,
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 9, "layers.1.*": 3},
            "alpha_pattern": {"k_proj": 5.5},
        },
    ],
    ids=["list", "rslora", "language-model", "regex", "its-regex", "patterns", "rslora-patterns"],
)
def test_we_open_theirs(tiny_model_dir, tmp_path, options):
    """We open what peft saves, however the projections, ranks and scales were chosen and whatever
    it was trained for, without any file of ours."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    is_lm = options.get("task_type") == "CAUSAL_LM"
    base = (AutoModelForCausalLM if is_lm else AutoModel).from_pretrained(tiny_model_dir)
    settings = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "init_lora_weights": False}
    theirs = get_peft_model(base.float(), LoraConfig(**settings, **options)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    plain = Embedder.from_pretrained(tiny_model_dir, dtype="float32")
    decoder = theirs.base_model.model.model if is_lm else theirs
    expected = hugging_face(decoder, plain.tokenizer)
    assert np.abs(plain.encode(TEXTS) - expected).max() > 0.01
    ours = Embedder.from_pretrained(tmp_path / "theirs", dtype="float32")
    assert np.abs(ours.encode(TEXTS) - expected).max() < 1e-5
    assert (ours.max_length, ours.pooling) == (plain.max_length, plain.pooling)


def test_the_base_may_be_beside_the_adapter(tiny_model_dir, tmp_path, monkeypatch):
    """A relative path that does not exist here is taken from the adapter's folder."""
    ours = adapted(tiny_model_dir)
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    ours.adapter = Adapter(SETTINGS, "../base")
    folder = write(ours, tmp_path / "adapter")
    monkeypatch.chdir("/")
    again = Embedder.from_pretrained(folder, dtype="float32")
    assert np.abs(again.encode(TEXTS) - ours.encode(TEXTS)).max() < 1e-5


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_sixteen_bits_are_rounded_once(tiny_model_dir, tmp_path, stored):
    """A float32 adapter on a base of either dtype: the sum is taken in float32, then rounded."""
    base = tmp_path / "base"
    Embedder.from_pretrained(tiny_model_dir, dtype=stored).save_pretrained(base, dtype=stored)
    ours = adapted(base)
    folder = write(ours, tmp_path / "adapter")
    found = Embedder.from_pretrained(folder, dtype="bfloat16").model.state_dict()
    for name, tensor in merge(ours.model, SETTINGS).state_dict().items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name


def test_the_files_say_the_same(tiny_model_dir, tmp_path):
    """What is written is what is read: settings, base, and every tensor bit for bit."""
    ours = adapted(tiny_model_dir)
    folder = write(ours, tmp_path / "adapter")
    model = Embedder.from_pretrained(tiny_model_dir, dtype="float32").model
    assert load_adapter(model, folder) == Adapter(SETTINGS, str(tiny_model_dir))
    state = ours.model.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    assert grads == {name: p.requires_grad for name, p in ours.model.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora: True is not built"),
        ({"use_rslora": "yes"}, "expected 'use_rslora' to be true or false"),
        ({"bias": "lora_only"}, "bias: 'lora_only' is not built"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj.lora_A.weight: expected shape \(8, 32\)"),
        ({"rank_pattern": {"q_proj": 0}}, "expected 'rank_pattern' to be ranks by name"),
        ({"rank_pattern": {"(": 8}}, "missing \\), unterminated subpattern"),
        ({"alpha_pattern": [8]}, "expected 'alpha_pattern' to be numbers above 0 by name"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"an_option_of_tomorrow": {"x": 1}}, "an_option_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "may have changed the base"),
        ({"peft_type": "IA3"}, "expected 'peft_type' to be LORA, found 'IA3'"),
        (
            {"target_modules": ".*_projection"},
            r"expected some of q_proj, .*, found '\.\*_projection'",
        ),
        ({"target_modules": ".*_proj"}, "missing tensors: layers.0.mlp.gate_proj.lora_A"),
        ({"target_modules": "(" * 9}, "adapter_config.json: missing"),
        ({"target_modules": "(" * 9999}, "adapter_config.json: maximum recursion"),
        ({"target_modules": ["q_proj", 3]}, "expected 'target_modules' to be names"),
        ({"target_modules": ["c_attn"]}, "found 'c_attn'"),
        ({"r": 0}, "expected 'r' to be a whole number of at least 1"),
        ({"r": True}, "expected 'r' to be a whole number of at least 1"),
        ({"r": 10**9}, "rank: expected 0 to 131,072, found 1000000000"),
        ({"r": 10**5}, r"expected shape \(100000, 48\), found \(3, 48\)"),
        (
            {"rank_pattern": {"q_proj": 10**9}},
            r"expected shape \(1000000000, 32\), found \(3, 32\)",
        ),
        ({"r": 4}, "expected shape"),
        ({"lora_alpha": None}, "adapter_config.json"),
        (
            {"base_model_name_or_path": None},
            "base_model_name_or_path: None: expected a model folder",
        ),
        ({"base_model_name_or_path": "x" * 999}, "base_model_name_or_path: .*File name too long"),
        (
            {"base_model_name_or_path": "./gone"},
            r"base_model_name_or_path: ./gone: expected a model",
        ),
    ],
)
def test_what_is_not_built_is_refused(tiny_model_dir, tmp_path, changes, message):
    """One sentence that names the option; none is ignored that would change the vectors."""
    folder = write(adapted(tiny_model_dir), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message) as error:
        Embedder.from_pretrained(folder, dtype="float32")
    assert str(folder) in str(error.value)


def test_every_tensor_is_accounted_for(tiny_model_dir, tmp_path):
    """Missing and unexpected ones in one sentence; a missing, torn or pickled file by name."""
    folder = write(adapted(tiny_model_dir), tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    moved = tensors.pop("base_model.model.layers.1.self_attn.q_proj.lora_B.weight")
    tensors["base_model.model.layers.1.self_attn.k_proj.lora_B.weight"] = moved
    save_file(tensors, file)
    with pytest.raises(ValueError, match="missing tensors") as error:
        Embedder.from_pretrained(folder)
    assert "missing tensors: layers.1.self_attn.q_proj.lora_B.weight" in str(error.value)
    assert "unexpected tensors: layers.1.self_attn.k_proj.lora_B.weight" in str(error.value)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        Embedder.from_pretrained(folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled ones are not opened"):
        Embedder.from_pretrained(folder)
