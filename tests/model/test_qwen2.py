"""The decoder against transformers, on random weights."""

import pytest
import torch
from transformers import AutoModel, Qwen2Config, Qwen3Config
from transformers import Qwen2Model as HFQwen2
from transformers import Qwen3Model as HFQwen3

from kalm_min.model import ModelConfig, Packed, Qwen2, initialise, load_model, save_model

LENGTHS = (7, 1, 12, 12, 3)
RELATIVE = 1e-5  # fp32, sums of a few hundred products in another order


def tiny(kind="qwen2", **changes):
    """A random transformers model of the given sizes."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "initializer_range": 0.2,
    } | changes
    torch.manual_seed(0)
    if kind == "qwen3":
        model = HFQwen3(Qwen3Config(**{"head_dim": 16, **sizes}))
    else:
        model = HFQwen2(Qwen2Config(**sizes))
    for parameter in model.parameters():  # biases and norms away from 0 and 1
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 0.5, 0.2)
    return model.eval()


def sequences(vocab=97, lengths=LENGTHS):
    """Random token ids of ragged lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def reference(model, ids):
    """Hidden states of one unpadded text at a time."""
    return torch.cat([model(input_ids=torch.tensor([s])).last_hidden_state[0] for s in ids])


CASES = {
    "grouped": {},
    "full heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "explicit head_dim": {"head_dim": 16},
    "qwen3": {"kind": "qwen3"},
    "qwen3 narrow": {"kind": "qwen3", "head_dim": 6, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_equal_transformers(case, causal, tmp_path):
    """Parity: fp32 hidden states of a packed ragged batch within 1e-5 of transformers' (relative)."""
    theirs = tiny(is_causal=causal, **CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=torch.float32)
    ids = sequences()
    with torch.no_grad():
        expected = reference(theirs, ids)
        found = ours(Packed.from_sequences(ids), causal=causal)
    assert ((found - expected).abs().max() / expected.abs().max()) <= RELATIVE


def test_modes_differ(tmp_path):
    """The attention argument reaches the attention: causal and bidirectional give other vectors."""
    tiny().save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    packed = Packed.from_sequences(sequences())
    assert not torch.allclose(model(packed, causal=True), model(packed, causal=False), atol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_packing_is_invisible(causal, tmp_path):
    """A sequence gives the same hidden states alone and in any batch and order, float64."""
    tiny().save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float64)
    ids = sequences(lengths=(5, 9, 9, 1, 9, 2))
    alone = [model(Packed.from_sequences([s]), causal=causal) for s in ids]
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 3, 1, 0, 4]):
        packed = model(Packed.from_sequences([ids[i] for i in order]), causal=causal)
        torch.testing.assert_close(packed, torch.cat([alone[i] for i in order]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["grouped", "qwen3"])
def test_a_shared_prefix_is_invisible(case, tmp_path):
    """Hidden states after the prefix and all gradients are those of the full texts, float64."""
    tiny(**CASES[case]).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float64)
    prefix, *own = sequences(lengths=(4, 5, 9, 9, 1, 2))
    shared = model(Packed.from_sequences(own, prefix=prefix), causal=True)
    whole = model(Packed.from_sequences([prefix + ids for ids in own]), causal=True)
    parts = whole.split([n for ids in own for n in (4, len(ids))])
    torch.testing.assert_close(shared[:4], parts[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(shared[4:], torch.cat(parts[1::2]), rtol=0, atol=1e-12)
    gradients = []
    for found in (shared[4:], torch.cat(parts[1::2])):
        model.zero_grad()
        found.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_forward_pass_without_a_graph_is_the_same(tmp_path):
    """Without gradients the feed-forward works in place and in parts; the values stay the same."""
    tiny().save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    packed = Packed.from_sequences(sequences(lengths=(700, 400, 9)))
    with torch.no_grad():
        found = model(packed, causal=True)
    torch.testing.assert_close(found, model(packed, causal=True), rtol=0, atol=1e-5)


def test_gradients_equal_transformers(tmp_path):
    """Backward, too: every parameter's gradient of a sum of squares, float64."""
    theirs = tiny().double()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=torch.float64)
    ids = sequences()
    reference(theirs, ids).square().sum().backward()
    ours(Packed.from_sequences(ids), causal=True).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = expected[name].grad.abs().max()
        # 1e-6: transformers takes the root mean square in float32 even in a float64 model
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("case", ["grouped", "qwen3"])
def test_autocast_keeps_sixteen_bits_to_the_attention(case, tmp_path, monkeypatch):
    """float32 weights under autocast: no warning, queries and keys in bfloat16, float32's result nearly."""
    from kalm_min.model import qwen2

    tiny(**CASES[case]).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32)
    packed, seen, attention = Packed.from_sequences(sequences()), set(), qwen2.packed_attention

    def spy(query, key, value, *rest, **options):
        seen.update({query.dtype, key.dtype, value.dtype})
        return attention(query, key, value, *rest, **options)

    expected = model(packed, causal=True)
    monkeypatch.setattr(qwen2, "packed_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(packed, causal=True)
    assert seen == {torch.bfloat16}
    assert (found.float() - expected).norm() <= 0.05 * expected.norm()


def test_initialise_is_the_architecture_default():
    """A fresh decoder has std initializer_range, zero biases, unit norms, and depends on the seed alone."""
    config = ModelConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    one, two = Qwen2(config), Qwen2(config)
    initialise(one, 3)
    torch.manual_seed(99)
    initialise(two, 3)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert one.layers[0].self_attn.q_proj.bias.abs().max() == 0
    assert torch.equal(one.norm.weight, torch.ones(64))


def test_folder_opens_in_transformers(tmp_path):
    """What save_model writes, AutoModel opens without remote code, with equal hidden states."""
    tiny(is_causal=False).save_pretrained(tmp_path / "in")
    ours = load_model(tmp_path / "in", dtype=torch.float32)
    (tmp_path / "out").mkdir()
    save_model(ours, tmp_path / "out", causal=False)
    theirs = AutoModel.from_pretrained(tmp_path / "out").eval()
    ids = sequences()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(Packed.from_sequences(ids), causal=False), reference(theirs, ids),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
