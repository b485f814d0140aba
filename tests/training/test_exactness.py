"""One process = several = gradient-cached, and the counts of the step."""

import math
import sys
from contextlib import nullcontext

import pytest
import torch

from kalm_min import check
from kalm_min.losses import info_nce, non_candidates
from kalm_min.training.step import (
    LossConfig,
    contrastive_batch,
    contrastive_loss,
    contrastive_step,
)

PLAIN = {option: check.step(option, *check.WAYS["1 chunk"]) for option in check.OPTIONS}


@pytest.mark.slow
def test_two_processes_and_chunks_equal_one_plain_backward():
    """Every loss option, two gloo processes, DDP and FSDP2, 1, 3 and n chunks: loss and gradients to 1e-10, float64."""
    rows = check.compare(2)
    assert [len(row) for row in rows] == [len(check.WAYS)] * len(check.OPTIONS)
    assert max(map(max, rows)) <= check.LIMIT


@pytest.mark.parametrize("option", check.OPTIONS)
@pytest.mark.parametrize("budget", [150, 60, 1])
def test_chunks_do_not_matter(option, budget):
    """Gradient caching in 2, 5 and n chunks equals plain backward, float64, to 1e-10."""
    assert check.difference(PLAIN[option], check.step(option, budget, budget, "ddp")) <= check.LIMIT


def test_the_check_can_fail():
    """The measure sees what peers get wrong: half the gradient, another option's loss."""
    one = PLAIN["hard negatives"]
    halved = torch.cat([one[:1], one[1:] / 2])
    assert check.difference(one, halved) == pytest.approx(0.5)
    assert check.difference(one, PLAIN["masking"]) > 1e-3


@pytest.mark.parametrize("option", check.OPTIONS)
def test_gradcheck(option):
    """Numerical and analytical gradients of queries and documents agree, float64, every option."""
    text = check.tokenized(check.examples()[:6], num_negatives=2).text
    config = check.OPTIONS[option]

    def loss(vectors):
        batch = contrastive_batch(vectors, text, query_negatives=config.query_negatives)
        return contrastive_loss(batch, config)[0]

    generator = torch.Generator().manual_seed(1)
    count = len(text.queries) + len(text.documents)
    vectors = torch.randn(count, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, vectors)


def test_a_breakpoint_in_info_nce_stops_in_training():
    """The step computes its loss in the public function."""
    entered = set()
    sys.setprofile(lambda frame, event, _: entered.add(frame.f_code) if event == "call" else None)
    try:
        check.step("Matryoshka", *check.WAYS["1 chunk"])
    finally:
        sys.setprofile(None)
    assert info_nce.__code__ in entered


@pytest.mark.parametrize("masked", [True, False])
def test_further_negatives_and_the_margin_are_their_formulas(masked):
    """Other queries, documents against the positive, and the margin: a loop over pairs, to 1e-12."""
    config = LossConfig(
        temperature=0.1,
        mask_false_negatives=masked,
        false_negative_margin=0.05 if masked else None,
        query_negatives=True,
        document_negatives=True,
    )
    text = check.tokenized(check.examples(), num_negatives=3).text
    size, count = len(text.queries), len(text.documents)
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(size + count, 6, generator=generator, dtype=torch.float64)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    q, d = vectors[:size], vectors[size:]
    batch = contrastive_batch(vectors, text, query_negatives=True)
    found, counts = contrastive_loss(batch, config)
    masks = non_candidates(batch)
    reasons = [name for name in masks if masked or name in ("self", "foreign")]
    same, known = sum(masks[name] for name in reasons).split([size, count], dim=1)
    total, margin = 0.0, 0
    for i, label in enumerate(text.labels.tolist()):
        positive = float(q[i] @ d[label])
        terms = [positive]
        for n in range(count):
            too_close = masked and float(q[i] @ d[n]) > positive + 0.05
            margin += bool(not known[i, n] and too_close)
            if not known[i, n] and not too_close:
                terms += [float(q[i] @ d[n]), float(d[label] @ d[n])]
        terms += [float(q[i] @ q[j]) for j in range(size) if not same[i, j]]
        total += math.log(math.fsum(math.exp(t / 0.1) for t in terms)) - positive / 0.1
    assert found.item() == pytest.approx(total / size, rel=1e-12)
    assert counts["masked_margin"] == margin
    assert (margin > 0) == masked


def test_the_counts_cover_every_pair():
    """hard + in-batch + masked + positives = queries x documents; each reason as made up."""
    batch = check.tokenized(check.examples(), num_negatives=3)
    model = check.decoder()

    def embed(packed):
        return torch.ones(len(packed.cu_seqlens) - 1, 16, dtype=torch.float64) * model.norm.weight

    _, counts, _ = contrastive_step(
        batch,
        embed,
        LossConfig(temperature=1.0),
        device=torch.device("cpu"),
        tokens_per_batch=10**6,
        no_sync=nullcontext,
    )
    pairs = len(batch.text.queries) * len(batch.text.documents)
    total = sum(value for name, value in counts.items() if name != "tokens")
    assert total == pairs - len(batch.text.queries)
    negatives = len(batch.text.documents) - len(batch.text.queries)
    assert counts["hard"] == negatives  # no query's own negatives are masked here
    assert counts["masked_query"] == 1  # query 7 is among the negatives of query 6
    assert counts["masked_group"] == 2  # queries 8 and 9 are of one class
    # queries 0 and 1, 2 and 3 share a positive; "positive 1" is also a negative of query 7
    assert counts["masked_positive"] == 4 + 2
    assert counts["tokens"] == sum(map(len, batch.sequences))


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused():
    """Such processes would drop queries, and the table would report a difference."""
    with pytest.raises(ValueError, match=r"processes: expected divisors of 12, found 5"):
        check.CheckConfig(processes=(1, 5))
