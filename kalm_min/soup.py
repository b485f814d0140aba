"""Average checkpoints: `python -m kalm_min.soup A B C --weights 0.5 0.3 0.2 --output DIR`.

Every parameter of the output is the weighted mean over the checkpoints. Fine-tuned checkpoints of
one ancestor lie in one basin, and their mean is often better than each of them (Wortsman et al.
2022; LM-Cocktail, Xiao et al. 2023; the first versions of the KaLM V2 report, which give no
weights). Prompts, maximum length, template and dtype are those of the first checkpoint. Checkpoints
that do not compute the same function of their weights are refused.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from kalm_min import program
from kalm_min.config import check_output, run

if TYPE_CHECKING:
    from kalm_min.model import Qwen2

# Keys of config.json that do not change the vectors.
_INDIFFERENT = {"initializer_range", "tie_word_embeddings"}
_INDIFFERENT |= {"bos_token_id", "eos_token_id", "pad_token_id"}
_BLOCK = 2**22  # parameters averaged at a time: 32 MiB per model in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class SoupConfig:
    """Average checkpoints of one ancestor into a new model folder."""

    checkpoints: Annotated[tuple[str, ...], "Model folders or hub ids; if first, no flag needed."]
    output: Annotated[Path, "Folder to write."]
    weights: Annotated[tuple[float, ...], "One per checkpoint, with sum 1; default equal."] = ()

    def __post_init__(self) -> None:
        count, given, total = len(self.checkpoints), len(self.weights), math.fsum(self.weights)
        if count < 2:
            raise ValueError(f"checkpoints: expected at least 2, found {count}")
        if given not in {0, count}:
            expected = f"weights: expected one for each of {count} checkpoints"
            raise ValueError(f"{expected}, found {given}")
        if given and not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"weights: expected them to add up to 1, found {total:g}")


def average(models: "Sequence[Qwen2]", weights: Sequence[float]) -> None:
    """Make the first model the weighted mean of all, in place, in its own dtype.

    Sums are taken in float64, block by block: no memory is needed besides the models, and models
    whose weights are views of their files stay on disk, except the first.
    """
    import torch

    for parameters in zip(*(model.parameters() for model in models), strict=True):
        for blocks in zip(*(p.detach().view(-1).split(_BLOCK) for p in parameters), strict=True):
            mean = torch.zeros_like(blocks[0], dtype=torch.float64)
            for weight, block in zip(weights, blocks, strict=True):
                mean.add_(block.double(), alpha=weight)
            blocks[0].copy_(mean)


def soup(config: SoupConfig) -> int:
    """Read, compare, average and write. Raises ValueError for what cannot be averaged."""
    from kalm_min.embedder import Embedder

    check_output(config.output, *config.checkpoints)
    embedders = [Embedder.from_pretrained(name, "cpu", "auto") for name in config.checkpoints]
    first, count = embedders[0], len(embedders)
    settings = [
        {key: value for key, value in asdict(one.model.config).items() if key not in _INDIFFERENT}
        | {"attention": "causal" if one.causal else "bidirectional", "pooling": one.pooling}
        for one in embedders
    ]  # if these differ, the same weights compute something else
    for name, embedder, values in zip(config.checkpoints, embedders, settings, strict=True):
        found = [
            f"{key} is {value} in the first and {values[key]} here"
            for key, value in settings[0].items()
            if value != values[key]
        ]
        if not first.tokenizer.encodes_like(embedder.tokenizer):
            found.append("tokenizer.json is not that of the first")
        if found:
            refused = f"{name}: cannot be averaged with {config.checkpoints[0]}"
            raise ValueError(f"{refused}: {'; '.join(found)}")
    average([one.model for one in embedders], config.weights or (1 / count,) * count)
    first.save_pretrained(config.output)
    sys.stderr.write(f"{count} checkpoints averaged -> {config.output}\n")
    return 0


main = partial(run, SoupConfig, soup, loads="kalm_min.embedder", positional="checkpoints")

if __name__ == "__main__":
    program.start("soup")
