"""The losses against the formulas, written out with loops and `math`, and their invariants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.losses import Documents, Queries, candidate_masks, info_nce, matryoshka

TIGHT = 1e-12


def random_case(seed, *, queries=4, documents=9, width=6):
    """Vectors in float64, labels, and a mask that leaves candidates."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, width, generator=generator, dtype=torch.float64)
    d = torch.randn(documents, width, generator=generator, dtype=torch.float64)
    labels = torch.randperm(documents, generator=generator)[:queries]
    mask = torch.rand(queries, documents, generator=generator) < 0.3
    return q, d, labels, mask


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def oracle(q, d, labels, *, temperature, mask=None, gamma=0.0):
    """mean_i -(1 - p_i)^gamma log p_i, one number at a time."""
    total = 0.0
    for i, query in enumerate(q.tolist()):
        own = int(labels[i])
        terms = [
            math.exp(cosine(query, document) / temperature)
            for n, document in enumerate(d.tolist())
            if n == own or mask is None or not mask[i, n]
        ]
        p = math.exp(cosine(query, d[own].tolist()) / temperature) / math.fsum(terms)
        total -= (1 - p) ** gamma * math.log(p)
    return total / len(q)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("masked", [False, True])
@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([0.05, 0.3, 1.0]))
def test_info_nce_is_the_formula(gamma, masked, seed, temperature):
    """Equal to the paper's formula to 1e-12, float64, with and without mask and focal weight."""
    q, d, labels, mask = random_case(seed)
    options = {"temperature": temperature, "mask": mask if masked else None, "gamma": gamma}
    found = info_nce(q, d, labels, **options).item()
    # gamma > 0: (1 - p)^gamma of the oracle cancels where p is near 1, so the bound is absolute
    assert found == pytest.approx(
        oracle(q, d, labels, **options), rel=TIGHT, abs=1e-9 if gamma else TIGHT
    )


def test_matryoshka_is_the_weighted_sum_of_slices():
    """Slices, not means: the oracle on each slice, times its weight; one full width is the loss."""
    q, d, labels, mask = random_case(3)
    dims, weights = (6, 4, 1), (1.0, 0.3, 0.2)
    options = {"temperature": 0.1, "mask": mask, "gamma": 0.5}
    expected = sum(
        w * oracle(q[:, :k], d[:, :k], labels, **options)
        for k, w in zip(dims, weights, strict=True)
    )
    found = matryoshka(q, d, labels, dims=dims, weights=weights, **options)
    assert found.item() == pytest.approx(expected, rel=1e-9)
    assert torch.equal(
        matryoshka(q, d, labels, dims=(6,), weights=(1.0,), temperature=0.1),
        info_nce(q, d, labels, temperature=0.1),
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_gradcheck(gamma):
    """Analytic gradients equal finite differences in float64."""
    q, d, labels, mask = random_case(5)

    def loss(q, d):
        return matryoshka(
            q, d, labels, dims=(6, 3), weights=(1.0, 0.3), temperature=0.2, mask=mask, gamma=gamma
        )

    assert torch.autograd.gradcheck(loss, (q.requires_grad_(), d.requires_grad_()))


def test_masked_documents_have_no_gradient():
    """A document masked for every query moves nothing, whatever its similarity."""
    q, d, labels, _ = random_case(7)
    other = next(n for n in range(len(d)) if n not in labels.tolist())
    mask = torch.zeros(len(q), len(d), dtype=torch.bool)
    mask[:, other] = True
    d.requires_grad_()
    info_nce(q, d, labels, temperature=0.1, mask=mask).backward()
    assert d.grad[other].abs().max() == 0
    assert d.grad[labels[0]].abs().max() > 0


def test_the_positive_cannot_be_masked():
    """A mask that covers everything leaves the positive: loss 0, not nan."""
    q, d, labels, _ = random_case(8)
    mask = torch.ones(len(q), len(d), dtype=torch.bool)
    for gamma in (0.0, 0.5):
        q.requires_grad_()
        loss = info_nce(q, d, labels, temperature=0.01, mask=mask, gamma=gamma)
        loss.backward()
        assert abs(loss.item()) < 1e-100
        assert torch.isfinite(q.grad).all()


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10))
def test_lengths_and_order_of_candidates_do_not_matter(seed, scale):
    """Cosine: scaling changes nothing; documents may come in any order."""
    q, d, labels, _ = random_case(seed)
    order = torch.randperm(len(d), generator=torch.Generator().manual_seed(seed))
    moved = order.argsort()[labels]
    one = info_nce(q, d, labels, temperature=0.1)
    two = info_nce(q * scale, d[order], moved, temperature=0.1)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_wrong_dimensions_are_named():
    """A slice wider than the vectors would silently be the full width."""
    q, d, labels, _ = random_case(1)
    with pytest.raises(ValueError, match="from 1 to 6, found 7"):
        matryoshka(q, d, labels, dims=(7,), weights=(1.0,), temperature=0.1)
    with pytest.raises(ValueError, match="a weight a dimension"):
        matryoshka(q, d, labels, dims=(6, 3), weights=(1.0,), temperature=0.1)


def test_masks_find_each_kind_of_false_negative_and_nothing_else():
    """A hand-made batch: shared positive, other known positive, the query itself, group, foreign."""
    t = torch.tensor
    queries = Queries(
        hashes=t([1, 2, 3]),
        positives=t([[10, 11], [20, 20], [30, 30]]),
        groups=t([7, 0, 7]),
        numbers=t([5, 6, 7]),
        in_batch=t([True, True, False]),
    )
    documents = Documents(
        hashes=t([10, 11, 20, 1, 30, 40]),
        groups=t([7, 0, 0, 0, 7, 0]),
        owners=t([5, 6, 6, 6, 7, 7]),
    )
    masks = candidate_masks(queries, documents, t([0, 2, 4]))
    found = {reason: mask.nonzero().tolist() for reason, mask in masks.items()}
    assert found == {
        "foreign": [[2, 0], [2, 1], [2, 2], [2, 3]],  # query 2 sees documents 4 and 5 only
        "positive": [[0, 1]],  # 11 is another positive of query 0
        "query": [[0, 3]],  # the text of query 0 as somebody's document
        "group": [[0, 4]],  # documents 0 and 4 are of class 7
    }


@given(st.data())
def test_masks_equal_a_loop(data):
    """Property: against a loop over pairs, for random small hashes full of collisions."""
    small = st.integers(1, 4)
    b, n = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 7))
    row = st.lists(small, min_size=2, max_size=2)
    t = torch.tensor
    queries = Queries(
        t(data.draw(st.lists(small, min_size=b, max_size=b))),
        t(data.draw(st.lists(row, min_size=b, max_size=b))),
        t(data.draw(st.lists(st.integers(0, 2), min_size=b, max_size=b))),
        torch.arange(b),
        t(data.draw(st.lists(st.booleans(), min_size=b, max_size=b))),
    )
    documents = Documents(
        t(data.draw(st.lists(small, min_size=n, max_size=n))),
        t(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))),
        t(data.draw(st.lists(st.integers(0, b - 1), min_size=n, max_size=n))),
    )
    labels = torch.arange(b)
    masks = candidate_masks(queries, documents, labels)
    union = torch.stack(list(masks.values())).sum(0)
    for i in range(b):
        for j in range(n):
            expected = j != labels[i] and (
                bool(documents.hashes[j] in queries.positives[i])
                or documents.hashes[j] == queries.hashes[i]
                or (documents.groups[j] != 0 and documents.groups[j] == queries.groups[i])
                or (not queries.in_batch[i] and documents.owners[j] != i)
            )
            assert union[i, j] == int(expected)  # 0 or 1: never two reasons
