"""One process = several = gradient-cached, and what the step counts."""

from contextlib import nullcontext

import pytest
import torch

from kalm_min import check
from kalm_min.training.step import LossConfig, contrastive_step

PLAIN = {option: check.step(option, check.WAYS["1 chunk"]) for option in check.OPTIONS}


@pytest.mark.slow
def test_two_processes_and_chunks_equal_one_plain_backward():
    """Every loss option, two gloo processes, DDP and FSDP2, 1, 3 and n chunks: loss and gradients to 1e-10, float64."""
    rows = list(check.compare((2,)))
    assert len(rows) == len(check.OPTIONS) * len(check.WAYS)
    assert max(value for *_, value in rows) <= check.LIMIT


@pytest.mark.parametrize("option", check.OPTIONS, ids=lambda option: option.name)
@pytest.mark.parametrize("budget", [150, 60, 1])
def test_chunks_do_not_matter(option, budget):
    """Gradient caching in 2, 5 and n chunks equals plain backward, float64, to 1e-10."""
    assert check.difference(PLAIN[option], check.step(option, check.Way(budget))) <= check.LIMIT


def test_the_check_can_fail():
    """The measure sees what peers get wrong: half the gradient, another option's loss."""
    one = PLAIN[check.OPTIONS[1]]
    halved = one._replace(gradients={k: g / 2 for k, g in one.gradients.items()})
    assert check.difference(one, halved) == pytest.approx(0.5)
    assert check.difference(one, PLAIN[check.OPTIONS[2]]) > 1e-3


def test_the_ledger_counts_every_pair():
    """hard + in-batch + masked + own positive = queries x documents; each reason as made up."""
    batch = check.tokenized(check.examples(), num_negatives=3)
    model = check.decoder()

    def embed(packed):
        return torch.ones(len(packed.cu_seqlens) - 1, 16, dtype=torch.float64) * model.norm.weight

    counts = contrastive_step(
        batch,
        embed,
        LossConfig(temperature=1.0),
        device=torch.device("cpu"),
        tokens_per_batch=10**6,
        no_sync=nullcontext,
    ).counts
    pairs = len(batch.text.queries) * len(batch.text.documents)
    total = sum(value for name, value in counts.items() if name != "tokens")
    assert total == pairs - len(batch.text.queries)
    own = len(batch.text.documents) - len(batch.text.queries)
    assert counts["hard"] == own  # nobody's own negatives are masked here
    assert counts["masked_query"] == 1  # query 7 stands among the negatives of query 6
    assert counts["masked_group"] == 2  # queries 8 and 9 are of one class
    # queries 0 and 1, 2 and 3 share a positive; "positive 1" is also a negative of query 7
    assert counts["masked_positive"] == 4 + 2
    assert counts["tokens"] == sum(map(len, batch.sequences))
