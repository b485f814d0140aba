"""Average checkpoints: `python -m kalm_min.soup A B C --weights 0.5 0.3 0.2 --output DIR`.

The output is a complete model folder; what stands beside the weights (prompts, maximum length,
template) is that of the first checkpoint, and so is the dtype. Checkpoints that do not compute the
same function of their weights are refused: other sizes or constants, tokenizer, attention or pooling.
"""

import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from kalm_min.config import parse
from kalm_min.embedder import Embedder
from kalm_min.model import ModelConfig
from kalm_min.model.soup import average

# Carried along in config.json; the vectors do not depend on them. `is_causal` is compared resolved.
_INDIFFERENT = {"initializer_range", "tie_word_embeddings", "token_ids", "is_causal"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SoupConfig:
    """Average checkpoints of one ancestor."""

    checkpoints: tuple[str, ...]
    """Model folders or hub ids; may also stand first, without a flag."""
    output: Path
    """Folder to write."""
    weights: tuple[float, ...] = ()
    """One a checkpoint, adding up to 1; none weighs all alike."""

    def __post_init__(self) -> None:
        """Refuse what is no average."""
        count = len(self.checkpoints)
        if count < 2:
            raise ValueError(f"checkpoints: expected at least 2, found {count}")
        if not self.weights:
            return
        if len(self.weights) != count:
            raise ValueError(
                f"weights: expected one for each of the {count} checkpoints, found {len(self.weights)}"
            )
        if not math.isclose(math.fsum(self.weights), 1, abs_tol=1e-6):
            raise ValueError(
                f"weights: expected them to add up to 1, found {math.fsum(self.weights):g}"
            )


def difference(first: Embedder, other: Embedder) -> str | None:
    """The first thing for which two models are not to be averaged, or None."""
    for field in fields(ModelConfig):
        ours, theirs = (getattr(model.model.config, field.name) for model in (first, other))
        if field.name not in _INDIFFERENT and ours != theirs:
            return f"{field.name} is {ours} in the first and {theirs} here"
    if first.causal != other.causal:
        words = ["causal" if model.causal else "bidirectional" for model in (first, other)]
        return f"attention is {words[0]} in the first and {words[1]} here"
    if first.pooling != other.pooling:
        return f"pooling is {first.pooling} in the first and {other.pooling} here"
    if not first.tokenizer.encodes_like(other.tokenizer):
        return "tokenizer.json is not that of the first"
    return None


def soup(config: SoupConfig) -> None:
    """Read, compare, average and write. Raises ValueError with one sentence for what cannot be."""
    models: list[Embedder] = []
    for name in config.checkpoints:
        models.append(Embedder.from_pretrained(name, "cpu", "auto"))
        if found := difference(models[0], models[-1]):
            raise ValueError(f"{name}: cannot be averaged with {config.checkpoints[0]}: {found}")
    weights = config.weights or (1 / len(models),) * len(models)
    average([embedder.model for embedder in models], weights)
    models[0].save_pretrained(config.output)


def main(argv: list[str]) -> int:
    """Average; 0 when the folder is written, 2 for what the user can mend."""
    if argv and not argv[0].startswith("-") and not argv[0].endswith(".toml"):
        argv = ["--checkpoints", *argv]
    description = "Average checkpoints of one ancestor into a new model folder."
    config = parse(SoupConfig, argv, program="kalm_min.soup", description=description)
    try:
        soup(config)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"kalm_min.soup: {error}\n")
        return 2
    sys.stderr.write(f"{len(config.checkpoints)} checkpoints averaged -> {config.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
