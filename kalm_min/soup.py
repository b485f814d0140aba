"""Average checkpoints: `python -m kalm_min.soup A B C --weights 0.5 0.3 0.2 --output DIR`.

Every parameter of the output is the weighted mean of the checkpoints'. Fine-tuned checkpoints of one
ancestor lie in one basin, and their mean is often better than each of them (Wortsman et al. 2022;
LM-Cocktail, Xiao et al. 2023; the first versions of the KaLM V2 report, which give neither number
nor weights of the checkpoints). The output is a complete model folder; prompts, maximum length,
template and dtype are those of the first checkpoint. Checkpoints that do not compute the same
function of their weights are refused: other sizes or constants, tokenizer, attention or pooling.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from kalm_min.config import run
from kalm_min.embedder import Embedder
from kalm_min.model import Qwen2

# Carried along in config.json; the vectors do not depend on them. `is_causal` is compared resolved.
_INDIFFERENT = {"initializer_range", "tie_word_embeddings", "is_causal"}
_INDIFFERENT |= {"bos_token_id", "eos_token_id", "pad_token_id"}
_BLOCK = 2**22  # parameters averaged at a time: 32 MiB per model in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class SoupConfig:
    """Average checkpoints of one ancestor into a new model folder."""

    checkpoints: Annotated[tuple[str, ...], "Model folders or hub ids; may come first, unflagged."]
    output: Annotated[Path, "Folder to write."]
    weights: Annotated[tuple[float, ...], "One per checkpoint, adding up to 1; none: equal."] = ()

    def __post_init__(self) -> None:
        count, total = len(self.checkpoints), math.fsum(self.weights)
        if count < 2:
            raise ValueError(f"checkpoints: expected at least 2, found {count}")
        if self.weights and (found := len(self.weights)) != count:
            raise ValueError(
                f"weights: expected one for each of {count} checkpoints, found {found}"
            )
        if self.weights and not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"weights: expected them to add up to 1, found {total:g}")


def comparable(embedder: Embedder) -> Mapping[str, object]:
    """Every setting under which the same weights would compute something else."""
    config = asdict(embedder.model.config)
    mode = "causal" if embedder.causal else "bidirectional"
    settings = {name: value for name, value in config.items() if name not in _INDIFFERENT}
    return settings | {"attention": mode, "pooling": embedder.pooling}


@torch.no_grad()
def average(models: Sequence[Qwen2], weights: Sequence[float]) -> None:
    """Make the first model the weighted mean of all, in place, in its own dtype.

    Sums are taken in float64, block by block: no memory is needed beside the models, and models
    whose weights are views of their files stay on the disk, except the first.
    """
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        assert all(parameter.shape == parameters[0].shape for parameter in parameters)
        for blocks in zip(*(p.view(-1).split(_BLOCK) for p in parameters), strict=True):
            mean = torch.zeros_like(blocks[0], dtype=torch.float64)
            for weight, block in zip(weights, blocks, strict=True):
                mean.add_(block.double(), alpha=weight)
            blocks[0].copy_(mean)


def soup(config: SoupConfig) -> int:
    """Read, compare, average and write; returns 0. Raises ValueError for what cannot be averaged."""
    first, *others = (Embedder.from_pretrained(name, "cpu", "auto") for name in config.checkpoints)
    for name, other in zip(config.checkpoints[1:], others, strict=True):
        values = comparable(other)
        differences = [
            f"{key} is {value} in the first and {values[key]} here"
            for key, value in comparable(first).items()
            if value != values[key]
        ]
        if not first.tokenizer.encodes_like(other.tokenizer):
            differences.append("tokenizer.json is not that of the first")
        if differences:
            where = f"{name}: cannot be averaged with {config.checkpoints[0]}"
            raise ValueError(f"{where}: {'; '.join(differences)}")
    count = len(config.checkpoints)
    models = [embedder.model for embedder in (first, *others)]
    average(models, config.weights or [1 / count] * count)
    first.save_pretrained(config.output)
    sys.stderr.write(f"{count} checkpoints averaged -> {config.output}\n")
    return 0


main = partial(run, SoupConfig, soup, program="kalm_min.soup", positional="checkpoints")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
