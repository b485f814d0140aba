"""A full-size random Qwen2 against transformers and sentence-transformers, on real texts.

    python benchmarks/parity.py --texts texts.txt --tokenizer DIR [--layers 24] [--causal true]

Prints the largest difference of hidden states relative to the largest value (fp32), the smallest
cosine of vectors against sentence-transformers on the saved folder (fp32), and the difference
between a bfloat16 vector encoded alone and in a batch, beside the cost of bfloat16 itself.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from random_model import build
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from kalm_min import Embedder
from kalm_min.config import parse
from kalm_min.encode import read_texts
from kalm_min.model import Packed


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the comparison; the default shape is that of Qwen2-0.5B."""

    texts: Annotated[Path, "One text per line."]
    tokenizer: Annotated[Path, "Folder of the Qwen2 tokenizer."]
    layers: Annotated[int, "Layers of the model."] = 24
    limit: Annotated[int, "Texts used."] = 64
    causal: Annotated[bool, "Attention mode."] = True
    max_length: Annotated[int, "Tokens kept per text."] = 512


def main(argv: list[str]) -> None:
    """Build a model, save it, compare, and print."""
    options = parse(Options, argv, program="parity.py", description="Parity at full size.")
    texts = read_texts(options.texts)[: options.limit]
    embedder = build(
        options.tokenizer,
        layers=options.layers,
        causal=options.causal,
        max_length=options.max_length,
    )
    with tempfile.TemporaryDirectory() as folder:
        embedder.save_pretrained(folder)
        compare(embedder, folder, texts)


@torch.no_grad()
def compare(embedder: Embedder, folder: str, texts: list[str]) -> None:
    """Print the three comparisons."""
    sequences = embedder.tokenizer.encode(texts, max_length=embedder.max_length)
    sizes = sorted(map(len, sequences))
    print(f"{len(texts)} texts, {sum(sizes)} tokens, {sizes[0]} to {sizes[-1]} a text")
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(sequences[i]))
    worst = top = 0.0
    for start in range(0, len(order), 8):
        part = [sequences[i] for i in order[start : start + 8]]
        found = embedder.model(Packed.from_sequences(part), causal=embedder.causal)
        expected = torch.cat(
            [theirs(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in part]
        )
        worst = max(worst, (found - expected).abs().max().item())
        top = max(top, expected.abs().max().item())
    print(f"hidden states, fp32: max |difference| / max |value| = {worst / top:.1e}")
    del theirs
    ours = embedder.encode(texts)
    peer = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    cosines = (ours * peer.encode(texts, normalize_embeddings=True)).sum(1)
    print(f"vectors against sentence-transformers, fp32: smallest cosine {cosines.min():.7f}")
    del peer
    alone = np.concatenate([embedder.encode([text]) for text in texts])
    print(f"alone against in a batch, fp32: max |difference| {np.abs(alone - ours).max():.1e}")
    embedder.model.bfloat16()
    company = embedder.encode(texts)
    alone = np.concatenate([embedder.encode([text]) for text in texts])
    print(
        f"alone against in a batch, bf16: max |difference| {np.abs(alone - company).max():.1e}, "
        f"smallest cosine {(alone * company).sum(1).min():.6f}; "
        f"bf16 against fp32: smallest cosine {(company * ours).sum(1).min():.6f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
