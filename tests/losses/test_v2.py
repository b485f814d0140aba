"""Mixing, distillation and shared dot products against the formulas, one number at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.losses import Mixes, cosines, distillation_rows, info_nce, matryoshka, mixed_cosines

TIGHT = 1e-12


def unit(v):
    norm = math.sqrt(math.fsum(x * x for x in v))
    return [x / norm for x in v]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def case(seed, negatives=(3, 2, 1, 0), width=5):
    """Queries with so many negatives each; documents are positive, negatives, positive, ..."""
    generator = torch.Generator().manual_seed(seed)
    b, n = len(negatives), len(negatives) + sum(negatives)
    q = torch.randn(b, width, generator=generator, dtype=torch.float64)
    d = torch.randn(n, width, generator=generator, dtype=torch.float64)
    labels, own = [], []
    start = 0
    for count in negatives:
        labels.append(start)
        own.append([start + 1 + i if i < count else start for i in range(max(negatives))])
        start += 1 + count
    present = torch.tensor([[i < count for i in range(max(negatives))] for count in negatives])
    pair = torch.tensor([[0, count - 1] if count > 1 else [0, 0] for count in negatives])
    share = torch.rand(b, generator=generator, dtype=torch.float64)
    return q, d, torch.tensor(labels), Mixes(torch.tensor(own), present, pair, share)


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


def own_negatives(d, mixes, i):
    rows = mixes.own[i][mixes.present[i]].tolist()
    return [d[row].tolist() for row in rows]


@given(seed=st.integers(0, 10**6))
def test_mixes_are_the_formula(seed):
    """h and s of the V2 report to 1e-12, and nothing for a query with fewer than two negatives."""
    q, d, _, mixes = case(seed)
    found = mixed_cosines(q, d[mixes.own], mixes)
    for i, query in enumerate(q.tolist()):
        negatives = own_negatives(d, mixes, i)
        expected = mixes_by_hand(query, negatives, mixes.pair[i].tolist(), mixes.share[i].item())
        if expected:
            assert found[i].tolist() == pytest.approx(expected, rel=TIGHT, abs=TIGHT)
        else:
            assert ((found[i] / 0.01).exp() == 0).all()


@given(seed=st.integers(0, 10**6))
def test_mixes_join_the_denominator_of_their_own_query(seed):
    """InfoNCE with two more terms, written out."""
    q, d, labels, mixes = case(seed)
    t, total = 0.1, 0.0
    for i, query in enumerate(q.tolist()):
        negatives = own_negatives(d, mixes, i)
        extra = mixes_by_hand(query, negatives, mixes.pair[i].tolist(), mixes.share[i].item())
        near = [dot(unit(query), unit(document)) for document in d.tolist()]
        terms = [math.exp(s / t) for s in near + extra]
        total -= math.log(math.exp(near[labels[i]] / t) / math.fsum(terms))
    found = info_nce(q, d, labels, temperature=t, mixes=mixes)
    assert found.item() == pytest.approx(total / len(q), rel=1e-11)


@given(seed=st.integers(0, 10**6))
def test_distillation_is_the_formula(seed):
    """KL(P_t || P_s) over each query's own documents at one temperature, to 1e-12."""
    q, d, labels, mixes = case(seed)
    generator = torch.Generator().manual_seed(seed)
    own = torch.cat([labels[:, None], mixes.own], dim=1)
    present = torch.cat([torch.ones(len(q), 1, dtype=torch.bool), mixes.present], dim=1)
    teacher = torch.rand(own.shape, generator=generator, dtype=torch.float64)
    expected = []
    for i, query in enumerate(q.tolist()):
        rows = [labels[i].item(), *mixes.own[i][mixes.present[i]].tolist()]
        s = [math.exp(dot(unit(query), unit(d[row].tolist())) / 0.05) for row in rows]
        z = [math.exp(score / 0.05) for score in teacher[i, : len(rows)].tolist()]
        kl = math.fsum(
            a / math.fsum(z) * (math.log(a / math.fsum(z)) - math.log(b / math.fsum(s)))
            for a, b in zip(z, s, strict=True)
        )
        expected.append(kl)
    (similarity,) = cosines(q, d, (q.shape[1],))
    found = distillation_rows(similarity.gather(1, own), teacher, present, temperature=0.05)
    assert found.tolist() == pytest.approx(expected, rel=1e-10, abs=TIGHT)


def test_a_student_that_agrees_learns_nothing():
    """KL is 0 with zero gradient where the scores differ by a constant only."""
    similarity = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    teacher = (similarity.detach() + 0.3).masked_fill(~present, 7.0)
    loss = distillation_rows(similarity, teacher, present, temperature=0.05)
    loss.sum().backward()
    assert loss.abs().max() < 1e-12
    assert similarity.grad.abs().max() < 1e-10


@given(
    seed=st.integers(0, 10**6),
    dims=st.lists(st.integers(1, 7), min_size=1, max_size=4, unique=True),
)
def test_shared_dot_products_equal_the_slices(seed, dims):
    """Partial sums by block equal normalised slices, value and gradient, in any order of widths."""
    q, d, _, _ = case(seed, width=7)
    q.requires_grad_()
    d.requires_grad_()
    upstream = [torch.randn(len(q), len(d), dtype=torch.float64) for _ in dims]
    naive = [
        torch.nn.functional.normalize(q[:, :k], dim=1)
        @ torch.nn.functional.normalize(d[:, :k], dim=1).T
        for k in dims
    ]
    shared = cosines(q, d, dims)
    for a, b in zip(shared, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    one = torch.autograd.grad(shared, (q, d), upstream)
    two = torch.autograd.grad(naive, (q, d), upstream)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    """Analytic gradients of mixing, distillation and both under Matryoshka, float64."""
    q, d, labels, mixes = case(4)
    own = torch.cat([labels[:, None], mixes.own], dim=1)
    present = torch.cat([torch.ones(len(q), 1, dtype=torch.bool), mixes.present], dim=1)
    teacher = torch.rand(own.shape, dtype=torch.float64)

    def loss(q, d):
        mixed = matryoshka(
            q, d, labels, dims=(5, 2), weights=(1.0, 0.3), temperature=0.2, gamma=0.5, mixes=mixes
        )
        gaps = [
            distillation_rows(c.gather(1, own), teacher, present, temperature=0.3).mean()
            for c in cosines(q, d, (5, 2))
        ]
        return 0.3 * mixed + 0.7 * sum(gaps)

    assert torch.autograd.gradcheck(loss, (q.requires_grad_(), d.requires_grad_()))
