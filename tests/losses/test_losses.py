"""The losses against the formulas, written out with loops and `math`, and their invariants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.losses import ContrastiveBatch, count_pairs, info_nce, matryoshka, non_candidates

TIGHT = 1e-12


def random_case(seed, *, queries=4, documents=9, dimension=6):
    """Vectors in float64, labels, and a mask that leaves candidates."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, dimension, generator=generator, dtype=torch.float64)
    d = torch.randn(documents, dimension, generator=generator, dtype=torch.float64)
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
@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([0.05, 0.3, 1.0, 500.0, 1e9]))
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
    """Slices, not means: the oracle on each slice, times its weight; one full dimension is the loss."""
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


@given(
    seed=st.integers(0, 10**6),
    dims=st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True),
    memory_gib=st.sampled_from([1.0, 1e-6, 1e-9]),
)
def test_shared_products_and_tiles_equal_a_wrapped_loss(seed, dims, memory_gib):
    """One pass for all slices in any order, in tiles: value and gradient of a loss per slice."""
    q, d, labels, mask = random_case(seed)
    weights = [1.0 / (1 + i) for i in range(len(dims))]
    options = {"dims": dims, "weights": weights, "temperature": 0.2, "mask": mask, "gamma": 0.5}

    def own_loss(*vectors, **options):
        return info_nce(*vectors, **options)

    vectors = q.requires_grad_(), d.requires_grad_()
    one = matryoshka(q, d, labels, memory_gib=memory_gib, **options)
    two = matryoshka(q, d, labels, loss=own_loss, **options)
    torch.testing.assert_close(one, two, rtol=TIGHT, atol=TIGHT)
    gradients = torch.autograd.grad(one, vectors), torch.autograd.grad(two, vectors)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory_gib", [1.0, 1e-7])
def test_a_mask_function_sees_every_tile(memory_gib):
    """It has the effect of a mask, and receives the cosines of the tile and of the positives."""
    q, d, labels, mask = random_case(11)
    seen = torch.zeros_like(mask)

    def of_tile(rows, columns, cosines, positives):
        assert not cosines.requires_grad
        seen[rows, columns] = True
        for i, query in enumerate(q[rows].tolist()):
            expected = [cosine(query, document) for document in d[columns].tolist()]
            assert cosines[i].tolist() == pytest.approx(expected, rel=1e-9)
            own = cosine(query, d[labels[rows][i]].tolist())
            assert positives[i].item() == pytest.approx(own, rel=1e-9)
        return mask[rows, columns]

    options = {"temperature": 0.1, "memory_gib": memory_gib}
    found = info_nce(q, d, labels, mask=of_tile, **options)
    assert found.item() == pytest.approx(info_nce(q, d, labels, mask=mask, **options).item())
    assert seen.all()


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
    """A document that is masked for every query has no effect, whatever its similarity."""
    q, d, labels, _ = random_case(7)
    other = next(n for n in range(len(d)) if n not in labels.tolist())
    mask = torch.zeros(len(q), len(d), dtype=torch.bool)
    mask[:, other] = True
    d.requires_grad_()
    info_nce(q, d, labels, temperature=0.1, mask=mask).backward()
    assert d.grad[other].abs().max() == 0
    assert d.grad[labels[0]].abs().max() > 0


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 500.0, 1e9])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_a_masked_document_might_as_well_be_absent(gamma, temperature):
    """Loss and gradients without it, at any temperature and exponent, even where all are masked."""
    q, d, labels, mask = random_case(9)
    mask[1] = True
    q.requires_grad_()
    d.requires_grad_()
    options = {"temperature": temperature, "gamma": gamma}
    found = info_nce(q, d, labels, mask=mask, **options)
    rest = []
    for i, label in enumerate(labels.tolist()):
        left = [n for n in range(len(d)) if n == label or not mask[i, n]]
        label = torch.tensor([left.index(label)])
        rest.append(info_nce(q[i : i + 1], d[left], label, **options))
    expected = torch.stack(rest).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    pairs = [torch.autograd.grad(loss, (q, d)) for loss in (found, expected)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-300)


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
    """A slice longer than the vectors would silently be the full dimension."""
    q, d, labels, _ = random_case(1)
    with pytest.raises(ValueError, match="from 1 to 6, found 7"):
        matryoshka(q, d, labels, dims=(7,), weights=(1.0,), temperature=0.1)
    with pytest.raises(ValueError, match="one weight per dimension"):
        matryoshka(q, d, labels, dims=(6, 3), weights=(1.0,), temperature=0.1)


def batch_of(query_meta, document_meta, positives, in_batch, labels):
    """A batch without vectors, and without what mixing and distillation need."""
    t, none = torch.tensor, torch.zeros(0)
    return ContrastiveBatch(
        queries=none,
        documents=none,
        rows=t(labels)[:, None],
        query_meta=t(query_meta),
        document_meta=t(document_meta),
        positives=t(positives),
        in_batch=t(in_batch),
        teacher=none,
        mix_pair=none,
        mix_share=none,
    )


def test_masks_find_each_kind_of_false_negative_and_nothing_else():
    """A hand-made batch: shared positive, other known positive, the query itself, group, foreign."""
    batch = batch_of(
        query_meta=[[1, 2, 3], [7, 0, 7], [5, 6, 7]],
        document_meta=[
            [10, 11, 20, 1, 30, 40, 1, 2, 3],  # the last three are the queries themselves
            [7, 0, 0, 0, 7, 0, 7, 0, 7],
            [5, 6, 6, 6, 7, 7, 5, 6, 7],
            [0, 0, 0, 0, 0, 0, 1, 1, 1],
        ],
        positives=[[10, 11], [20, 20], [30, 30]],
        in_batch=[True, True, False],
        labels=[0, 2, 4],
    )
    too_similar = torch.zeros(3, 9, dtype=torch.bool)
    too_similar[1, [1, 2, 8]] = True  # a document, its positive, a query
    masks = non_candidates(batch, too_similar=too_similar)
    found = {reason: mask.nonzero().tolist() for reason, mask in masks.items()}
    assert found == {
        "self": [[0, 0], [0, 6], [1, 2], [1, 7], [2, 4], [2, 8]],  # positives and queries
        "foreign": [[2, n] for n in (0, 1, 2, 3, 6, 7)],  # query 2 sees documents 4 and 5 only
        "positive": [[0, 1]],  # 11 is another positive of query 0
        "query": [[0, 3]],  # the text of query 0 as another query's document
        "group": [[0, 4], [0, 8]],  # documents 0 and 4, queries 0 and 2 are of class 7
        "margin": [[1, 1]],  # the query is not looked at
    }
    everything = slice(None), slice(None)
    counts = {name: int(n) for name, n in count_pairs(batch, masks, *everything).items()}
    assert counts == {
        "hard": 2,  # documents 3 of query 1 and 5 of query 2
        "in_batch": 5,  # documents 2 and 5 of query 0; 0, 4 and 5 of query 1
        "cross_device": 0,
        "query_query": 3,  # query 1 of query 0; 0 and 2 of query 1
        "masked_foreign": 4,
        "masked_positive": 1,
        "masked_query": 1,
        "masked_group": 1,
        "masked_margin": 1,
    }
    one_process = batch._replace(query_meta=batch.query_meta[:, 1:2], rows=batch.rows[1:2])
    one_process = one_process._replace(positives=batch.positives[1:2], in_batch=batch.in_batch[1:2])
    counts = count_pairs(one_process, non_candidates(one_process), *everything)
    assert [int(counts[name]) for name in ("hard", "in_batch", "cross_device")] == [2, 0, 3]


@given(st.data())
def test_masks_equal_a_loop(data):
    """Property: against a loop over pairs, for random small hashes full of collisions."""
    b, n = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 7))

    def numbers(size, low, high):
        return data.draw(st.lists(st.integers(low, high), min_size=size, max_size=size))

    hashes, groups, owners = numbers(n, 1, 4), numbers(n, 0, 2), numbers(n, 0, b - 1)
    query_hashes, query_groups = numbers(b, 1, 4), numbers(b, 0, 2)
    positives = [numbers(2, 1, 4) for _ in range(b)]
    in_batch = data.draw(st.lists(st.booleans(), min_size=b, max_size=b))
    labels = list(range(b))
    meta = [hashes, groups, owners, [0] * n]
    batch = batch_of([query_hashes, query_groups, labels], meta, positives, in_batch, labels)
    rows = slice(data.draw(st.integers(0, b - 1)), b)
    columns = slice(data.draw(st.integers(0, n - 1)), n)
    masks = non_candidates(batch, rows, columns)
    union = torch.zeros(b, n, dtype=torch.int64)
    union[rows, columns] = torch.stack(list(masks.values())).sum(0)
    for i in range(rows.start, b):
        for j in range(columns.start, n):
            expected = (
                j == labels[i]
                or hashes[j] in positives[i]
                or hashes[j] == query_hashes[i]
                or (groups[j] != 0 and groups[j] == query_groups[i])
                or (not in_batch[i] and owners[j] != i)
            )
            assert union[i, j] == int(expected)  # 0 or 1: never two reasons
