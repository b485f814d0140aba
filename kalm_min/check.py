"""What is promised, shown on your own machine: `python -m kalm_min.check [MODEL]`.

With a model: what its files were understood to say and which of them said it, how a text is read,
and its vectors beside those of sentence-transformers and, with `--texts`, of the dtype that would
serve here: single short texts may fall to a cosine of .965 in bfloat16 (pretrained hidden states
reach 1,700). Without a model: for every loss option, the loss and all gradients of one plain
backward pass beside those of several gloo processes and of gradient caching, in float64. They must
agree to 1e-10, as sums of the same numbers in different orders.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path  # noqa: TC003 -- config.run reads the type
from typing import TYPE_CHECKING, Annotated, Literal

from kalm_min import program
from kalm_min.config import run
from kalm_min.console import table
from kalm_min.files import read_lines, write_text
from kalm_min.options import LossConfig, ParallelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kalm_min.data import Example
    from kalm_min.model import Packed, Qwen2
    from kalm_min.training.step import TokenBatch

_SAMPLE = ["The cat sat on a mat.", "What is the capital of China?", "北京是中国的首都。", "a"]
LIMIT = 1e-10
_QUERIES = 12  # divides by 1, 2 and 3 processes
_LOSS = LossConfig(temperature=0.05)
_MATRYOSHKA = replace(_LOSS, matryoshka_dims=(16, 8, 4), matryoshka_weights=(1.0, 0.3, 0.2))
_V2 = replace(_MATRYOSHKA, gamma=0.5, mixing=True, distillation_weight=0.7)
_MORE = {"query_negatives": True, "document_negatives": True}
_ALL = replace(_V2, false_negative_margin=0.1, **_MORE)
OPTIONS = {
    "in-batch negatives": replace(_LOSS, mask_false_negatives=False),  # without hard negatives
    "hard negatives": replace(_LOSS, mask_false_negatives=False),
    "masking": _LOSS,
    "Matryoshka": _MATRYOSHKA,
    "focal": replace(_LOSS, gamma=0.5),
    "mixing": replace(_LOSS, mixing=True),
    "margin": replace(_LOSS, false_negative_margin=0.1),
    "query and document negatives": replace(_LOSS, **_MORE),
    "distillation": replace(_LOSS, distillation_weight=0.7),
    "all of them": _ALL,
    "all of them, in blocks": replace(_ALL, memory_gib=1e-5),
}
WAYS: dict[str, tuple[int, int, Literal["ddp", "fsdp"]]] = {
    # Tokens per chunk on the first process, on the others, and how the model is distributed.
    "1 chunk": (10**6, 10**6, "ddp"),
    "3 chunks": (110, 110, "ddp"),
    "n chunks": (1, 1, "ddp"),
    "3 chunks, sharded": (110, 110, "fsdp"),
    "1 or n chunks": (10**6, 1, "ddp"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """Show what a model's files say and compare its vectors, or check training's exactness."""

    model: Annotated[str | None, "Model folder or hub id; if first, no flag needed."] = None
    texts: Annotated[Path | None, "With a model: one text per line, to compare dtypes on."] = None
    dtype: Annotated[str | None, "Compared with float32; none: what would serve here."] = None
    output: Annotated[Path | None, "Markdown file that the table is written to as well."] = None
    processes: Annotated[tuple[int, ...], "Numbers of processes; each must divide 12."] = (1, 2, 3)

    def __post_init__(self) -> None:
        if wrong := [count for count in self.processes if count < 1 or _QUERIES % count]:
            raise ValueError(f"processes: expected divisors of {_QUERIES}, found {wrong[0]}")
        if self.texts is not None and self.model is None:
            raise ValueError("texts: expected a model to encode them with, found none")


def examples() -> list[Example]:
    """Examples in which every kind of false negative occurs."""
    from kalm_min.data import Example

    made: list[Example] = []
    for i in range(_QUERIES):
        positives = (f"positive {i // 2}",) if i < 4 else (f"positive {i}", f"other {i}")
        # A negative of query 7 is another query's positive, one of query 6 another query's text.
        first = {7: "positive 1", 6: "query 7"}.get(i, f"negative {i} 0")
        negatives = (first, *(f"negative {i} {j}" for j in (1, 2, 3)))[: i % 5]
        example = Example(
            query=f"query {i}",
            positives=positives,
            negatives=negatives,
            positive_scores=(0.9, 0.8)[: len(positives)],
            negative_scores=(0.0, 0.1, 0.2, 0.3)[: len(negatives)],
            task=0,
            index=i,
            group="class" if i in {8, 9} else None,
            in_batch_negatives=i != 10,
        )
        made.append(example)
    return made


def tokenized(some: list[Example], num_negatives: int) -> TokenBatch:
    """A batch whose token ids are drawn with each text as the seed: 2 to 13 tokens per text."""
    import numpy as np
    import torch

    from kalm_min.data import collate
    from kalm_min.training.step import TokenBatch

    text = collate(some, num_negatives=num_negatives, template="{instruction}", epoch=0, seed=0)
    texts = [*text.queries, *text.documents]
    unique = {t: i for i, t in enumerate(dict.fromkeys(texts))}
    draws = [(np.random.default_rng([*t.encode()]), 2 + sum(t.encode()) % 12) for t in unique]
    sequences = [rng.integers(64, size=size).tolist() for rng, size in draws]
    return TokenBatch(sequences, torch.tensor([unique[t] for t in texts]), text)


def decoder() -> Qwen2:
    """A small random decoder in float64."""
    from kalm_min.model import ModelConfig, Qwen2, initialise

    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = Qwen2(config)
    initialise(model, seed=1)
    return model.double()


def step(option: str, first: int, others: int, strategy: Literal["ddp", "fsdp"]) -> Tensor:
    """The loss of one step under data parallelism, then the gradients of all parameters, (1 + n,).

    The step is taken twice, since DDP rebuilds its buckets after the first one.
    """
    import torch

    from kalm_min.model import pool
    from kalm_min.training import distributed, parallel
    from kalm_min.training.step import contrastive_step

    rank, share = distributed.rank(), _QUERIES // distributed.world_size()
    num_negatives = 0 if option == "in-batch negatives" else 3
    batch = tokenized(examples()[rank * share : (rank + 1) * share], num_negatives)
    model = decoder()
    wrapped = parallel.wrap(model, ParallelConfig(strategy=strategy))

    def embed(packed: Packed) -> Tensor:
        return pool(wrapped(packed, causal=False), packed.cu_seqlens, "mean")

    loss = torch.zeros(())
    for _ in range(2):
        model.zero_grad()
        loss, *_ = contrastive_step(
            batch,
            embed,
            OPTIONS[option],
            device=torch.device("cpu"),
            tokens_per_batch=others if rank else first,
            no_sync=partial(parallel.no_sync, wrapped),
            sharded=parallel.is_sharded(model),
        )
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [distributed.mean(loss.detach()), *map(parallel.full_tensor, gradients)]
    return torch.cat([part.flatten() for part in parts])


def difference(one: Tensor, other: Tensor) -> float:
    """The larger of the relative differences of the loss and of all gradients together."""
    loss, gradients = abs(other[0] / one[0] - 1), (one - other)[1:].norm() / one[1:].norm()
    return max(float(loss), float(gradients))


def compare(count: int) -> list[list[float]]:
    """For every option and way, the difference between `count` processes and the plain step."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # a free one
    # Ctrl-C ends this process alone, and the pool's end that of the others. All find the same, so
    # the first one that is done (behind a barrier) or fails decides.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with get_context("spawn").Pool(count, signal.signal, ignore) as pool:
        worker = partial(_worker, count=count, port=port)
        return next(pool.imap_unordered(worker, range(count)))


def _worker(rank: int, count: int, port: int) -> list[list[float]]:
    import torch

    from kalm_min.training import distributed

    torch.set_num_threads(1)
    plain = {option: step(option, *WAYS["1 chunk"]) for option in OPTIONS}  # before joining a group
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(count)}
    distributed.start(dict(os.environ), torch.device("cpu"))
    found = [
        [difference(one, step(option, *way)) for way in WAYS.values()]
        for option, one in plain.items()
    ]
    distributed.barrier()  # an early end would break the others' connections
    return found


def describe(name: str, texts: list[str], dtype: str | None) -> str:
    """What the files of a model say, how a sample is read, and its vectors in other ways."""
    import numpy as np
    from tokenizers import Tokenizer as FastTokenizer

    from kalm_min.embedder import Embedder, fastest_safe_dtype, pick_device
    from kalm_min.settings import open_folder

    served = dtype or str(fastest_safe_dtype(pick_device())).removeprefix("torch.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, model = open_folder(name), Embedder.from_pretrained(name, "cpu", "float32")
        other = Embedder.from_pretrained(name, dtype=served) if texts else model
    stored = found.config.get("dtype") or found.config.get("torch_dtype")
    values: dict[str, object] = asdict(found.settings) | {
        "end_of_text": found.end_of_text or "as tokenizer.json says",
        "dense": found.dense,
        "dimension": found.dimension,
        "released": found.released,
        "dtype": f"{stored} in the file, {served} would serve here",
    }
    rows = [(key, str(value), found.sources.get(key, "")) for key, value in values.items()]
    lines = [f"{key:22}{value!r:44} {source}".rstrip() for key, value, source in rows]
    lines += [f"warning: {one}" for one in dict.fromkeys(str(one.message) for one in caught)]
    ids = model.tokenizer.encode(_SAMPLE[:1], max_length=model.max_length)[0]
    words = FastTokenizer.from_file(str(found.tokenizer / "tokenizer.json"))
    lines += [f"{_SAMPLE[0]!r} is read as {[words.id_to_token(i) or i for i in ids]}"]
    try:
        from sentence_transformers import SentenceTransformer  # noqa: TID251 -- an oracle here too

        peer = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": "float32"})
        cosines = (model.encode(_SAMPLE) * peer.encode(_SAMPLE, normalize_embeddings=True)).sum(1)
        lines += [f"sentence-transformers, without remote code: cosine {cosines.min():.6f} or more"]
        if cosines.min() < 0.9999:
            lines += ["warning: it understands this folder otherwise (or it needs its remote code)"]
    except Exception as error:  # absent, or whatever it cannot do with the folder
        lines += [f"sentence-transformers gives no vectors: {str(error).partition(chr(10))[0]}"]
    if texts:
        cosines = (model.encode(texts) * other.encode(texts)).sum(1)
        low, middle = np.quantile(cosines, (0.01, 0.5))
        beside = f"{served} beside float32, {len(texts)} texts"
        lines += [f"{beside}: cosine {cosines.min():.6f} or more"]
        lines += [f"1 % are below {low:.6f}, half are below {middle:.6f}; the lowest:"]
        lines += [f"{cosines[i]:.6f}  {texts[i][:80]!r}" for i in cosines.argsort()[:5]]
    return "\n".join([*lines, ""])


def check(config: CheckConfig) -> int:
    """Print what was found; return 1 if a difference is above the limit, else 0."""
    rows = [[0.0]]
    if config.model is not None:
        lines = read_lines(config.texts) if config.texts is not None else []
        texts = [*dict.fromkeys(line for line in lines if line.strip())]
        text = describe(config.model, texts, config.dtype)
    else:
        found = [compare(count) for count in config.processes]
        head = [f"{count} x {way}" for count in config.processes for way in WAYS]
        rows = [[*chain(*parts)] for parts in zip(*found, strict=True)]  # one per option
        columns = [[f"{value:.0e}" for value in column] for column in zip(*rows, strict=True)]
        text = f"""# One process = several = gradient-cached

Largest relative difference of loss and parameter gradients from one plain backward over
the whole batch, float64, CPU, gloo. Columns: processes x chunks (n: one text per
chunk; 1 or n: one chunk on the first process, n on the others; sharded: FSDP2).
Made by `python -m kalm_min.check`; the limit is {LIMIT:.0e}.

{table(["loss option", *head], [*zip(OPTIONS, *columns, strict=True)])}
"""
    sys.stdout.write(text)
    if config.output is not None:
        write_text(config.output, text)
    return int(max(map(max, rows)) > LIMIT)


main = partial(run, CheckConfig, check, loads="kalm_min.training.step", positional="model")

if __name__ == "__main__":
    program.start("check")
