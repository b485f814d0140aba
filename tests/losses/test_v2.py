"""Mixing and distillation against the formulas, one number at a time."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.losses import distillation, info_nce, matryoshka, mixed_cosines

TIGHT = 1e-12


def unit(v):
    norm = math.sqrt(math.fsum(x * x for x in v))
    return [x / norm for x in v]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def case(seed, negatives=(3, 2, 1, 0), dimension=5):
    """Queries with so many negatives each; documents are positive, negatives, positive, ..."""
    generator = torch.Generator().manual_seed(seed)
    b, n = len(negatives), len(negatives) + sum(negatives)
    q = torch.randn(b, dimension, generator=generator, dtype=torch.float64)
    d = torch.randn(n, dimension, generator=generator, dtype=torch.float64)
    counts = 1 + torch.tensor(negatives)  # documents of each query
    labels = counts.cumsum(0) - counts
    offsets = torch.arange(1 + max(negatives))
    present = offsets < counts[:, None]
    mixes = {
        "rows": torch.where(present, labels[:, None] + offsets, -1),
        "pair": torch.tensor([[0, count - 1] if count > 1 else [0, 0] for count in negatives]),
        "share": torch.rand(b, generator=generator, dtype=torch.float64),
    }
    return q, d, labels, mixes


def mixes_by_hand(query, negatives, pair, share):
    """[pair-wise, list-wise] cosines of one query; none with fewer than two negatives."""
    if len(negatives) < 2:
        return []
    query, negatives = unit(query), [unit(v) for v in negatives]
    j, k = pair
    pairwise = [
        share * x + (1 - share) * y for x, y in zip(negatives[j], negatives[k], strict=True)
    ]
    weights = [math.exp(dot(query, v) / 0.05) for v in negatives]
    total = math.fsum(weights)
    listwise = [
        math.fsum(w / total * v[i] for w, v in zip(weights, negatives, strict=True))
        for i in range(len(query))
    ]
    return [dot(query, unit(pairwise)), dot(query, unit(listwise))]


def documents_of(d, mixes, i):
    """The positive and the negatives of query i."""
    rows = mixes["rows"][i]
    return d[rows[rows >= 0]].tolist()


def mixes_of(q, d, mixes, i):
    pair, share = mixes["pair"][i].tolist(), mixes["share"][i].item()
    return mixes_by_hand(q[i].tolist(), documents_of(d, mixes, i)[1:], pair, share)


@given(seed=st.integers(0, 10**6))
def test_mixes_are_the_formula(seed):
    """h and s of the V2 report to 1e-12, and no mix for a query with fewer than two negatives."""
    q, d, _, mixes = case(seed)
    found = mixed_cosines(q, d, **mixes)
    for i in range(len(q)):
        if expected := mixes_of(q, d, mixes, i):
            assert found[i].tolist() == pytest.approx(expected, rel=TIGHT, abs=TIGHT)
        else:
            assert ((found[i] / 0.01).exp() == 0).all()


@given(seed=st.integers(0, 10**6), t=st.sampled_from([0.1, 1e4, 1e9]))
def test_mixes_join_the_denominator_of_their_own_query(seed, t):
    """InfoNCE with two more terms, written out."""
    q, d, labels, mixes = case(seed)
    total = 0.0
    for i, query in enumerate(q.tolist()):
        near = [dot(unit(query), unit(document)) for document in d.tolist()]
        terms = [math.exp(s / t) for s in near + mixes_of(q, d, mixes, i)]
        total -= math.log(math.exp(near[labels[i]] / t) / math.fsum(terms))
    extra = partial(mixed_cosines, **mixes)
    found = info_nce(q, d, labels, temperature=t, extra_negatives=extra)
    assert found.item() == pytest.approx(total / len(q), rel=1e-11)


@given(seed=st.integers(0, 10**6))
def test_distillation_is_the_formula(seed):
    """Mean KL(P_t || P_s) over each query's own documents at one temperature, to 1e-10."""
    q, d, _, mixes = case(seed)
    rows = mixes["rows"]
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.rand(rows.shape, generator=generator, dtype=torch.float64)
    expected = 0.0
    for i, query in enumerate(q.tolist()):
        own = documents_of(d, mixes, i)
        s = [math.exp(dot(unit(query), unit(document)) / 0.05) for document in own]
        z = [math.exp(score / 0.05) for score in teacher[i, : len(own)].tolist()]
        expected += math.fsum(
            a / math.fsum(z) * (math.log(a / math.fsum(z)) - math.log(b / math.fsum(s)))
            for a, b in zip(z, s, strict=True)
        ) / len(q)
    found = distillation(q, d, rows, teacher=teacher, temperature=0.05)
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=TIGHT)


def test_a_student_that_agrees_learns_nothing():
    """KL is 0 with zero gradient if scores differ only by a constant, or there is one document."""
    q, d, _, mixes = case(2)
    rows = mixes["rows"]
    similarity = torch.cosine_similarity(q[:, None], d[rows], dim=2)
    teacher = (similarity + 0.3).masked_fill(rows < 0, 7.0)
    q.requires_grad_()
    loss = distillation(q, d, rows, teacher=teacher, temperature=0.05)
    loss.backward()
    assert loss.abs() < 1e-12
    assert q.grad.abs().max() < 1e-10


def test_gradcheck():
    """Analytic gradients of mixing, distillation and both under Matryoshka, float64."""
    q, d, labels, mixes = case(4)
    teacher = torch.rand(mixes["rows"].shape, dtype=torch.float64)
    options = {"teacher": teacher, "temperature": 0.3}

    def loss(q, d):
        slices = partial(matryoshka, q, d, dims=(5, 2), weights=(1.0, 0.3))
        extra = partial(mixed_cosines, **mixes)
        mixed = slices(labels, temperature=0.2, gamma=0.5, extra_negatives=extra)
        return 0.3 * mixed + 0.7 * slices(mixes["rows"], loss=distillation, **options)

    assert torch.autograd.gradcheck(loss, (q.requires_grad_(), d.requires_grad_()))
