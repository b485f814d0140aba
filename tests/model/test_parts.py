"""Attention, rotary, pooling and packing, each against a plain oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.model import Packed, pool, truncate
from kalm_min.model.attention import packed_attention, per_sequence_attention
from kalm_min.model.qwen2 import rotary_tables, rotate

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def pack(lengths):
    return Packed.from_sequences([list(range(n)) for n in lengths])


def test_packed_layout():
    """Boundaries, positions and the longest length of a small case, by hand."""
    packed = Packed.from_sequences([[5, 6, 7], [8, 9]])
    assert packed.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 5]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 3
    packed = Packed.from_sequences([[5, 6, 7], [8, 9]], prefix=[3, 4])
    assert packed.input_ids.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert packed.cu_seqlens.tolist() == [2, 5, 7]
    assert (packed.max_seqlen, packed.prefix) == (3, 2)


@pytest.mark.parametrize("causal", [True, False])
@given(lengths=LENGTHS, heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]), seed=st.integers(0, 99))
def test_attention_is_softmax_within_each_sequence(causal, lengths, heads, seed):
    """Against softmax(QK^T / sqrt(E)) V over the whole pack with a block-diagonal mask, float64."""
    generator = torch.Generator().manual_seed(seed)
    total, (h, k), e = sum(lengths), heads, 8
    q, key, value = (
        torch.randn(total, n, e, generator=generator, dtype=torch.float64) for n in (h, k, k)
    )
    packed = pack(lengths)
    found = packed_attention(q, key, value, packed, causal=causal)
    sequence = torch.repeat_interleave(torch.tensor(lengths))
    allowed = sequence[:, None] == sequence
    if causal:
        allowed &= packed.positions[:, None] >= packed.positions
    key, value = (x.repeat_interleave(h // k, dim=1) for x in (key, value))
    scores = torch.einsum("the,she->hts", q, key) / e**0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(
        found, torch.einsum("hts,she->the", weights, value), atol=1e-12, rtol=0
    )


def written_out(x, lengths, prefix):
    """The rows of every text's tokens, the prefix repeated before each sequence; (T + B * P, ...)."""
    shared, *own = x.split([prefix, *lengths])
    return torch.cat([part for rest in own for part in (shared, rest)])


@given(lengths=LENGTHS, prefix=st.integers(1, 5), seed=st.integers(0, 99))
def test_attention_under_a_shared_prefix_is_that_of_the_whole_texts(lengths, prefix, seed):
    """The prefix and what follows it, as if the prefix were in every text, float64."""
    generator = torch.Generator().manual_seed(seed)
    total, e = prefix + sum(lengths), 8
    tensors = [
        torch.randn(total, n, e, generator=generator, dtype=torch.float64) for n in (4, 2, 2)
    ]
    packed = Packed.from_sequences([[0] * n for n in lengths], prefix=[0] * prefix)
    found = packed_attention(*tensors, packed, causal=True)
    whole = pack([prefix + n for n in lengths])
    written = [written_out(x, lengths, prefix) for x in tensors]
    expected = packed_attention(*written, whole, causal=True)
    torch.testing.assert_close(written_out(found, lengths, prefix), expected, atol=1e-12, rtol=0)


@given(lengths=LENGTHS, prefix=st.integers(1, 5))
def test_rows_of_the_keys(lengths, prefix):
    """The keys of the prefix, then of each text with the prefix before it."""
    packed = Packed.from_sequences([[0] * n for n in lengths], prefix=[0] * prefix)
    tokens = torch.arange(len(packed.input_ids))
    texts = [tokens[:prefix], written_out(tokens, lengths, prefix)]
    assert packed.key_rows.tolist() == torch.cat(texts).tolist()


@pytest.mark.gpu
def test_kernel_under_a_shared_prefix():
    """The packed kernel agrees with plain attention to the rounding of bfloat16."""
    lengths, prefix = [1, 2, 33, 700, 64, 64], 24
    packed = Packed.from_sequences([[0] * n for n in lengths], "cuda", [0] * prefix)
    exact = [torch.randn(len(packed.input_ids), n, 64, device="cuda") for n in (14, 2, 2)]
    expected = packed_attention(*exact, packed, causal=True)  # float32: the plain way
    found = packed_attention(*(x.bfloat16() for x in exact), packed, causal=True)
    assert (found.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("h", "k", "e"), [(14, 2, 64), (28, 4, 128)])
def test_kernel_is_as_good_as_plain_bfloat16(causal, h, k, e):
    """The packed kernel's bf16 error against float32, forward and backward, is at most 1.25 x plain attention's."""
    lengths = [1, 2, 33, 700, 64, 64]
    packed = Packed.from_sequences([[0] * n for n in lengths], "cuda")
    bounds = packed.cu_seqlens
    exact = [torch.randn(sum(lengths), n, e, device="cuda") for n in (h, k, k)]

    def run(function, dtype):
        tensors = [x.to(dtype).requires_grad_() for x in exact]
        out = function(*tensors)
        out.float().square().sum().backward()
        return [out.float(), *(x.grad.float() for x in tensors)]

    def kernel(*x):
        return packed_attention(*x, packed, causal=causal)

    def plain_attention(*x):
        return per_sequence_attention(*x, bounds, bounds, causal=causal)

    reference = run(plain_attention, torch.float32)
    for ours, plain, true in zip(
        run(kernel, torch.bfloat16), run(plain_attention, torch.bfloat16), reference, strict=True
    ):
        assert (ours - true).norm() <= 1.25 * (plain - true).norm() + 1e-6 * true.norm()


def test_rotary_is_relative():
    """Scores of rotated heads depend on the distance of positions alone, and position 0 is unchanged."""
    x = torch.randn(2, 1, 1, 8)
    cos, sin = rotary_tables(torch.arange(40), 8, 10_000.0)

    def score(i, j):
        a, b = (
            rotate(x[0], cos[i : i + 1], sin[i : i + 1]),
            rotate(x[1], cos[j : j + 1], sin[j : j + 1]),
        )
        return (a * b).sum()

    torch.testing.assert_close(score(3, 7), score(30, 34), atol=1e-4, rtol=1e-4)
    assert torch.equal(rotate(x[0], cos[:1], sin[:1]), x[0])


@given(lengths=LENGTHS)
def test_pooling_is_per_sequence(lengths):
    """Mean and last token of each sequence, in float32 for bfloat16 input."""
    hidden = torch.randn(sum(lengths), 5).bfloat16()
    packed = pack(lengths)
    parts = hidden.float().split(lengths)
    mean = pool(hidden, packed.cu_seqlens, "mean")
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.stack([part.mean(0) for part in parts]))
    last = pool(hidden, packed.cu_seqlens, "lasttoken")
    assert torch.equal(last, torch.stack([part[-1] for part in parts]))


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
@given(lengths=LENGTHS, prefix=st.integers(1, 5))
def test_pooling_counts_a_shared_prefix(mode, lengths, prefix):
    """As if the prefix stood in every text."""
    hidden = torch.randn(prefix + sum(lengths), 5, dtype=torch.float64)
    packed = Packed.from_sequences([[0] * n for n in lengths], prefix=[0] * prefix)
    whole = pack([prefix + n for n in lengths])
    found = pool(hidden, packed.cu_seqlens, mode, prefix)
    expected = pool(written_out(hidden, lengths, prefix), whole.cu_seqlens, mode)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_truncate_keeps_zero_vectors():
    """Unit length after the slice; zero stays zero instead of nan."""
    vectors = torch.tensor([[3.0, 4.0, 12.0], [0.0, 0.0, 0.0]])
    assert truncate(vectors, 2).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert truncate(vectors, 2, normalize=False).tolist() == [[3.0, 4.0], [0.0, 0.0]]
