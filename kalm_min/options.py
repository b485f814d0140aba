"""The options of training and mining: what `--help` lists, and what a TOML file may hold.

They are declared here, apart from the code that uses them, so that flags are read and checked
before torch is imported. `Annotated[type, "help", Range(...)]` gives the help and the bounds.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_type_hints

from kalm_min.settings import Pooling, check_template


class Range(NamedTuple):
    """The finite numbers that a setting, or every item of a list, may be; None is always in range."""

    low: float
    high: float = math.inf
    is_open: bool = False  # `low` itself is out of range

    def holds(self, value: object) -> bool:
        """Whether a number, or every number of a tuple, is in the range."""
        if isinstance(value, tuple):
            return all(map(self.holds, value))
        if not isinstance(value, int | float):
            return value is None
        inside = self.low <= value <= self.high and abs(value) < math.inf
        return inside and not (self.is_open and value == self.low)

    def __str__(self) -> str:
        """`at least 1`, `more than 0` or `0 to 1`."""
        if self.is_open:
            return f"more than {self.low:g}"
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"{self.low:,.15g} to {self.high:,.15g}"


# What cannot be a typing error: no count is beyond a billion.
COUNT, ANY_COUNT, SIZE = Range(1, 10**9), Range(0, 10**9), Range(1, 2**17)
POSITIVE, SHARE, TEMPERATURE = Range(0, is_open=True), Range(0, 1), Range(1e-6, 1e6)
COSINE, MARGIN = Range(-1, 1), Range(-2, 2)


class Ranged:
    """A dataclass whose numbers are checked against their ranges. Raises ValueError."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for one in getattr(hint, "__metadata__", ()):
                if isinstance(one, Range) and not one.holds(value := getattr(self, name)):
                    raise ValueError(f"{name}: expected {one}, found {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource(Ranged):
    """The model to start from: `path`, or `tokenizer` and the sizes of a fresh model."""

    path: Annotated[str | None, "Checkpoint to start from: a folder or a hub id."] = None
    tokenizer: Annotated[Path | None, "Folder of the tokenizer of a fresh model."] = None
    hidden_size: Annotated[int, "Dimension of a fresh model's states and vectors.", SIZE] = 256
    intermediate_size: Annotated[int, "Width of a fresh model's feed-forward layers.", SIZE] = 1024
    num_hidden_layers: Annotated[int, "Layers of a fresh model.", Range(1, 1000)] = 4
    num_attention_heads: Annotated[int, "Query heads of a fresh model.", Range(1, 1024)] = 4
    num_key_value_heads: Annotated[int, "Key/value heads of a fresh model.", Range(1, 1024)] = 2
    initializer_range: Annotated[float, "Standard deviation of fresh weights.", Range(0, 10)] = 0.02
    init_seed: Annotated[int, "Seed of a fresh model's or adapter's weights.", ANY_COUNT] = 0
    causal: Annotated[bool | None, "Causal attention; none: the checkpoint's, or false."] = None
    pooling: Annotated[
        Pooling | None,
        "Pooling; none: the checkpoint's (of a plain language model its last token), or mean.",
    ] = None
    max_length: Annotated[int, "Most tokens kept per text, instruction included.", COUNT] = 512
    instruction_template: Annotated[
        str | None, "Template of a prompt, with {instruction}; none: the checkpoint's."
    ] = None
    query_prompt: Annotated[
        str | None,
        "Prompt that the model stores for queries, also for those trained without an instruction; "
        "none: that of the instruction, else the checkpoint's.",
    ] = None

    def __post_init__(self) -> None:
        Ranged.__post_init__(self)
        if (self.path is None) == (self.tokenizer is None):
            raise ValueError(
                "give either --model.path, a checkpoint to start from, or --model.tokenizer, the "
                "folder of a tokenizer for a fresh model"
            )
        if self.instruction_template is not None:
            check_template(self.instruction_template)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig(Ranged):
    """Low-rank adapters on a frozen checkpoint instead of training all its weights."""

    rank: Annotated[int, "Rank of the updates; 0 trains all weights.", Range(0, 2**17)] = 0
    alpha: Annotated[float, "The updates are multiplied by alpha / rank.", POSITIVE] = 32.0
    target_modules: Annotated[
        tuple[str, ...], "Names, or their last parts, of the projections that get an update."
    ] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        Ranged.__post_init__(self)
        if not self.target_modules:
            raise ValueError("target_modules: expected names of projections, found none")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data of the run."""

    path: Annotated[Path, "JSONL(.gz) file, or a folder with one file or sub-folder per task."]
    validation: Annotated[Path | None, "Held-out pairs for validation, in the same format."] = None
    instruction: Annotated[str | None, "Instruction for queries that have none."] = None
    cache_dir: Annotated[Path | None, "Folder for line indices; none: beside the data."] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig(Ranged):
    """Which examples form a batch."""

    batch_size: Annotated[int, "Queries per optimizer step, over all processes.", Range(2)] = 512
    homogeneous_ratio: Annotated[float, "Share of a batch from one task; 0 mixes all.", SHARE] = 1.0
    num_negatives: Annotated[int, "Most hard negatives drawn per query.", ANY_COUNT] = 7
    size_exponent: Annotated[float, "Tasks count as size^exponent; 0: equal shares.", SHARE] = 1.0
    seed: Annotated[int, "Seed of the order of examples and of drawn texts.", ANY_COUNT] = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Ranged):
    """The loss of a step; the defaults are those of the public fine-tuning script."""

    temperature: Annotated[float, "Divides the cosine similarity.", TEMPERATURE] = 0.01
    gamma: Annotated[float, "Exponent of the focal (1 - p)^gamma; V2: 0.5.", Range(0, 100)] = 0.0
    matryoshka_dims: Annotated[tuple[int, ...], "Leading dimensions usable alone.", COUNT] = ()
    matryoshka_weights: Annotated[tuple[float, ...], "One weight per dimension.", POSITIVE] = ()
    mixing: Annotated[bool, "Add two negatives per query, mixed from its own (V2)."] = False
    distillation_weight: Annotated[float, "Share of the KL term; V2.5 uses 0.7.", SHARE] = 0.0
    distillation_temperature: Annotated[float, "Divides all scores in the KL.", TEMPERATURE] = 0.05
    memory_gib: Annotated[float, "GiB for scores; beyond, computed twice.", Range(1e-9, 1e6)] = 1.0
    mask_false_negatives: Annotated[
        bool, "Exclude a query's known positives, its own text and its class from its negatives."
    ] = True
    false_negative_margin: Annotated[
        float | None,
        "Mask negatives with a cosine above the positive's plus this; Qwen3: 0.1.",
        MARGIN,
    ] = None
    query_negatives: Annotated[bool, "Use the other queries of a batch as negatives."] = False
    document_negatives: Annotated[bool, "Use a query's negatives as its positive's too."] = False

    def __post_init__(self) -> None:
        Ranged.__post_init__(self)
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        one_each = f"one for each of the {len(dims)} matryoshka_dims"
        margin_works = self.false_negative_margin is None or self.mask_false_negatives
        for name, valid, expected in (
            ("matryoshka_dims", len({*dims}) == len(dims), "each dimension once"),
            ("matryoshka_weights", len(weights) == len(dims), one_each),
            ("false_negative_margin", margin_works, "mask_false_negatives to be true"),
        ):
            if not valid:
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Ranged):
    """AdamW; the defaults are those of the public fine-tuning script."""

    learning_rate: Annotated[float, "Peak learning rate.", POSITIVE] = 1e-5
    warmup_ratio: Annotated[float, "Share of steps that warm up from 0 to the peak.", SHARE] = 0.1
    weight_decay: Annotated[float, "Decay of matrices; biases, norms never decay.", Range(0)] = 0.0
    betas: Annotated[tuple[float, float], "Decay of both moments.", Range(0, 0.999999)] = (
        0.9,
        0.999,
    )
    eps: Annotated[float, "Added to the square root of the second moment.", POSITIVE] = 1e-8
    max_grad_norm: Annotated[float, "L2 norm to which the gradient is clipped.", POSITIVE] = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig(Ranged):
    """The length of training, its precision, checkpoints and validation."""

    epochs: Annotated[int, "Passes over the data.", COUNT] = 1
    max_steps: Annotated[int | None, "Most steps; none: all of the epochs.", COUNT] = None
    tokens_per_batch: Annotated[int, "Tokens per pass; affects memory only.", COUNT] = 16_384
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], "Dtype of products; auto: bfloat16 where native."
    ] = "auto"
    save_every: Annotated[int, "Steps between checkpoints.", COUNT] = 500
    keep_checkpoints: Annotated[int, "Newest checkpoints to keep, besides the best.", COUNT] = 3
    non_finite: Annotated[
        Literal["stop", "skip"], "Stop at a step whose loss or gradient is not finite, or skip it."
    ] = "stop"
    validate_every: Annotated[int, "Steps between validations.", COUNT] = 500
    validation_limit: Annotated[int, "Pairs per held-out task that a validation uses.", COUNT] = 500
    patience: Annotated[
        int | None, "Stop after so many validations without a better MRR; none: never.", COUNT
    ] = None
    log_to: Annotated[Literal["tensorboard", "wandb"] | None, "Where else the log is shown."] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model is distributed over processes, and what is kept for the backward pass."""

    strategy: Annotated[
        Literal["ddp", "fsdp"],
        "ddp: a copy on every process; fsdp: parameters and optimizer state sharded (FSDP2).",
    ] = "ddp"
    gradient_checkpointing: Annotated[bool, "Recompute layers in backward to save memory."] = False
    compile: Annotated[bool, "torch.compile each layer: faster on CUDA, slow first step."] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to train, apart from the model and the data."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Recipe):
    """Train an embedding model, alone or under torchrun."""

    output: Annotated[Path, "Folder of the run: settings, log, checkpoints, the model in final/."]
    model: ModelSource
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules(Ranged):
    """How rows are filtered and negatives chosen."""

    rank_range: Annotated[tuple[int, int], "First and last rank, from 1.", ANY_COUNT] = (50, 100)
    num_negatives: Annotated[int, "Negatives per row, if there are so many.", ANY_COUNT] = 7
    consistency_top_k: Annotated[
        int | None, "Drop a row whose best positive ranks worse; none: keep all.", COUNT
    ] = 50
    official_rank: Annotated[bool, "As the official code: positives count, off by one."] = False
    choice: Annotated[Literal["random", "top"], "Random or top-ranked candidates."] = "random"
    min_score: Annotated[float | None, "Lowest score (cosine) of a negative.", COSINE] = None
    max_score: Annotated[float | None, "Highest score (cosine) of a negative.", COSINE] = None
    absolute_margin: Annotated[
        float | None, "Minimum score difference of the row's best positive and a negative.", MARGIN
    ] = None
    relative_margin: Annotated[
        float | None, "The same as a share of that score: 0.05 is NV-Retriever's 95 %.", COSINE
    ] = None
    keep_negatives: Annotated[bool, "Keep a row's own negatives before the mined ones."] = False
    short_rows: Annotated[Literal["keep", "drop"], "Rows with too few mined negatives."] = "keep"
    seed: Annotated[int, "Seed of the random choice.", ANY_COUNT] = 0

    def __post_init__(self) -> None:
        Ranged.__post_init__(self)
        first, last = self.rank_range
        if last < max(first, 1):
            raise ValueError(f"rank_range: expected two ranks, first <= last, found {first} {last}")
        low, high = self.min_score, self.max_score
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_score: expected at most max_score {high}, found {low}")

    @property
    def depth(self) -> int:
        """The number of unlabelled candidates that a list of neighbours must hold."""
        return max(self.rank_range[1], (self.consistency_top_k or 0) + self.official_rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class MiningConfig(Rules):
    """Mine hard negatives and drop inconsistent rows, alone or under torchrun."""

    model: Annotated[str, "Embedding model: a folder or a hub id."]
    data: Annotated[Path, "Training data: a JSONL(.gz) file, or a folder of tasks."]
    output: Annotated[Path, "Folder of the mined data."]
    pool: Annotated[Path | None, 'JSONL(.gz) of {"text"} to mine; none: each task\'s texts.'] = None
    instruction: Annotated[str | None, "Instruction for queries that have none."] = None
    scorer: Annotated[str | None, "Model whose scores are written, for distillation."] = None
    store: Annotated[Path | None, "Folder of the vectors; none: inside the output folder."] = None
    search: Annotated[Literal["torch", "faiss"], "Search library; both find the same."] = "torch"
    index: Annotated[
        str | None, 'Approximate search with a faiss factory string: "IVF4096,Flat;nprobe=64".'
    ] = None
    max_length: Annotated[int | None, "Tokens kept per text; none: the model's limit."] = None
    device: Annotated[str | None, "cpu, cuda, ...; none: a GPU per process, else the CPU."] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "Dtype of the model; auto: bfloat16 where native, else float32.",
    ] = "auto"
    cache_dir: Annotated[Path | None, "Folder for line indices; none: beside the data."] = None
    dry_run: Annotated[bool, "Print what would be done, and do nothing."] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig(Ranged):
    """Write synthetic training data with a model behind an OpenAI-compatible server.

    A key for the server is read from the environment variable OPENAI_API_KEY.
    """

    model: Annotated[str, "Name of the model, as the server calls it."]
    output: Annotated[Path, "Folder of the training data."]
    server: Annotated[str, "URL of the server, as in http://localhost:8000/v1."] = ""
    examples: Annotated[int, "Samples to ask for; more of them later add to these.", COUNT] = 1000
    languages: Annotated[tuple[str, ...], "Codes of languages: en, zh, ..."] = ("en", "zh")
    tasks: Annotated[tuple[str, ...], "Types of tasks, which are names of prompt files."] = (
        *("short_long", "long_short", "short_short", "long_long", "sts", "bitext"),
    )
    personas: Annotated[
        Path | None, "JSONL with the key persona, or lines of text; none: those of the package."
    ] = None
    prompts: Annotated[Path | None, "Folder of prompt files that replace the package's."] = None
    passages: Annotated[Path | None, "JSONL of text and title: ask for queries to them."] = None
    hold_out: Annotated[int, "Passages kept apart, as a dataset <output>_hold_out.", ANY_COUNT] = 0
    instructions_per_persona: Annotated[int, "Instructions that a persona writes.", COUNT] = 5
    samples_per_instruction: Annotated[int, "Samples of an instruction, per language.", COUNT] = 14
    temperature: Annotated[float, "Sampling temperature of the model.", ANY_COUNT] = 1.0
    max_tokens: Annotated[int, "Limit of an answer; a longer one is rejected.", COUNT] = 2048
    seed: Annotated[int, "Seed of all draws, and of the seed in each request."] = 0
    structured: Annotated[
        Literal["auto", "json_schema", "json_object", "text"],
        "How JSON is asked for; auto: the strictest way of the server, json_schema for batch files.",
    ] = "auto"
    concurrency: Annotated[int, "Requests under way at once.", COUNT] = 32
    timeout: Annotated[float, "Seconds to wait for an answer.", POSITIVE] = 120.0
    retries: Annotated[int, "How often a failed request is sent again, with pauses.", ANY_COUNT] = 4
    batch_files: Annotated[Path | None, "Folder of requests.jsonl and results; no server."] = None
    dry_run: Annotated[bool, "Print a request of each type and the number of requests."] = False

    def __post_init__(self) -> None:
        Ranged.__post_init__(self)
        if self.hold_out and not self.passages:
            raise ValueError("hold_out: expected passages to keep some of, found none")
        without = self.dry_run or self.batch_files
        if not without and not self.server.startswith(("http://", "https://")):
            raise ValueError(f"server: expected a URL (http://...), found {self.server!r}")
