"""What is to be evaluated: tasks, instructions, and which results exist already.

Benchmarks and task names go through mteb (imported only then), folders through `local_data`. Each
task gets its instruction from our own tables, its cost in characters and the file its result
belongs in. A result counts as done only if it was made by the same weights, settings, instruction
and data, and holds every dimension asked for: an old score is never reused by mistake.

Not here: anything that touches a device. The parent process lives on this module alone.
"""

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from kalm_min.evaluation.local import KINDS, LocalDataset, find_datasets
from kalm_min.files import checkpoint_folders, hash_checkpoint, read_json

_TABLES = Path(__file__).with_name("instructions.json")
_NEEDS_MTEB = 'evaluation needs mteb: pip install "kalm-min[eval]"'
_MAX_TOKENS = 512  # what a text is counted up to where --max-length does not say
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """The settings of evaluate.py."""

    model: str = ""
    """Model folder, LoRA adapters among them, or Hugging Face hub id."""
    benchmark: tuple[str, ...] = ()
    """Benchmarks of mteb, e.g. "MTEB(eng, v1)" "MTEB(cmn, v1)"."""
    tasks: tuple[str, ...] = ()
    """Single tasks of mteb, e.g. STS12 SciFact."""
    data: tuple[Path, ...] = ()
    """Dataset folders of one's own, or folders of such."""
    output: Path = Path("results")
    """Folder for results, logs and summary; the same command again continues there."""
    dims: tuple[int, ...] = ()
    """Matryoshka dimensions to score, all from one encoding; the full one if none is given."""
    devices: tuple[str, ...] = ()
    """One worker each, e.g. cuda:0 cuda:1 or cpu cpu; every visible GPU, else one CPU worker."""
    instructions: str = "v2"
    """official-v1, v2, none, or a JSON file {task or "type:STS": text or {query, document}}."""
    max_length: int | None = None
    """Tokens kept of a text, prompt included; the checkpoint's own limit if none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in; auto is bfloat16 where native, else float32."""
    causal: bool | None = None
    """Attention mode; the checkpoint's own if none."""
    pooling: Literal["mean", "lasttoken"] | None = None
    """Pooling; the checkpoint's own if none."""
    store: Path | None = None
    """Folder in which vectors are kept, to be found again by any later run of the same checkpoint."""
    shard: str = ""
    """This machine's part of the plan, e.g. 2/4; the parts meet in the same --output."""
    timeout: float = 1800.0
    """Seconds without progress after which a worker is replaced."""
    dry_run: bool = False
    """Print the plan and stop."""
    datasets: Path | None = None
    """Mirror of the hub's datasets; with it nothing is taken from the network."""
    prefetch: bool = False
    """Copy the datasets of --benchmark and --tasks from the hub into --datasets and stop."""
    report_only: bool = False
    """Run nothing, tabulate what is there; without --model everything that --output holds."""
    compare: tuple[Path, ...] = ()
    """Run nothing, tabulate two results folders or more beside one another."""

    def __post_init__(self) -> None:
        """Refuse what no run could mean."""
        if len(self.compare) == 1:
            raise ValueError("--compare: expected two folders or more, found one")
        if self.compare or (self.report_only and not self.model):
            pass  # needs no model
        elif self.prefetch:
            if self.datasets is None or not (self.benchmark or self.tasks):
                raise ValueError("--prefetch: expected --datasets, and --benchmark or --tasks")
        elif not self.model:
            raise ValueError("--model: expected a model folder or a hub id, found none")
        elif not (self.benchmark or self.tasks or self.data):
            raise ValueError("nothing to evaluate: give --benchmark, --tasks or --data")
        for device in self.devices:
            if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
                raise ValueError(f"--devices: expected cpu, cuda:0, ..., found {device!r}")
        if any(dim < 1 for dim in self.dims) or len(set(self.dims)) < len(self.dims):
            raise ValueError(f"--dims: expected different numbers above 0, found {self.dims}")
        part = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        if not part or not 1 <= int(part[1]) <= int(part[2]):
            raise ValueError(f"--shard: expected k/n with k from 1 to n, found {self.shard!r}")
        if self.timeout <= 0:
            raise ValueError(f"--timeout: expected seconds above 0, found {self.timeout}")


@dataclass(frozen=True, slots=True)
class Instruction:
    """What is said before the texts of a task; "" is nothing."""

    query: str = ""
    """Before queries, and before every text of a task without two sides."""
    document: str = ""
    """Before the documents of retrieval and reranking."""
    origin: Literal["task", "type", "none"] = "none"
    """Whether the table (or task.toml) names the task, or only its type, or says nothing."""


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One leaf task: what a worker needs to run it and where its result belongs."""

    name: str
    type: str
    main_score: str
    revision: str
    characters: int
    """To encode, each text once; 0 where mteb does not say. Orders and divides the work."""
    instruction: Instruction
    folder: Path | None = None
    """Of a local dataset; None for a task of mteb's own."""
    repository: str = ""
    """On the hub, of a task of mteb's own."""
    mirror: Path | None = None
    """The copy of the repository to read instead."""
    splits: tuple[str, ...] = ("test",)
    subsets: tuple[str, ...] = ()
    texts: int = 0
    corpus_characters: int = 0
    """The part of `characters` that are documents to search, which several workers may encode."""
    documents: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run needs to know, decided before it starts."""

    model: str
    checkpoint: str
    """Hash of the model's files."""
    dims: tuple[int, ...]
    """Largest first."""
    settings: dict[str, Any]
    tasks: tuple[PlannedTask, ...]
    """The longest first."""
    results: Path
    """Folder of the result files."""
    benchmarks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Benchmark -> its tasks, aggregates among them."""
    aggregates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Aggregate task -> the leaf tasks it is the mean of."""
    elsewhere: frozenset[str] = frozenset()
    """Tasks that are another machine's."""

    def result_path(self, task: PlannedTask) -> Path:
        """Where a task's result file belongs."""
        return self.results / f"{task.name}.json"

    def key(self, task: PlannedTask) -> dict[str, Any]:
        """All that decides a score, apart from the dimension."""
        return self.settings | {
            "checkpoint": self.checkpoint,
            "revision": task.revision,
            "splits": list(task.splits),
            "subsets": list(task.subsets),
            "main_score": task.main_score,
            "query_instruction": task.instruction.query,
            "document_instruction": task.instruction.document,
        }

    def result(self, task: PlannedTask) -> dict[str, Any] | None:
        """The finished result of a task, or None if there is none that still holds."""
        try:
            result = read_json(self.result_path(task))
            record = result["kalm_min"]
            holds = record["key"] == self.key(task)
            return (
                result if holds and {str(d) for d in self.dims} <= record["dims"].keys() else None
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # Absent, torn or not ours: run it (again).


def make_plan(config: EvaluationConfig) -> Plan:
    """Resolve a configuration. Raises ValueError with one sentence for what cannot be run."""
    folders = checkpoint_folders(config.model)
    tasks, benchmarks, aggregates = find_tasks(config)
    checkpoint = hash_checkpoint(*folders)
    settings = {
        "instructions": Path(config.instructions).stem,
        "max_length": config.max_length,
        "dtype": config.dtype,
        "causal": config.causal,
        "pooling": config.pooling,
    }
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    is_local = Path(config.model).expanduser().is_dir()
    owner = f"local/{folders[0].resolve().name}" if is_local else config.model
    # mteb's layout, so that mteb.ResultCache(output) finds the results too.
    revision = f"{checkpoint[:12]}-{digest[:8]}"
    return Plan(
        model=config.model,
        checkpoint=checkpoint,
        dims=_check_dims(folders[-1], config.dims),
        settings=settings,
        tasks=tuple(sorted(tasks, key=lambda task: -task.characters)),
        elsewhere=_elsewhere(tasks, config.shard),
        results=config.output / "results" / owner.replace("/", "__") / revision,
        benchmarks=benchmarks,
        aggregates=aggregates,
    )


def _elsewhere(tasks: Sequence[PlannedTask], shard: str) -> frozenset[str]:
    """The tasks that part `shard` ("2/4") leaves to the other machines.

    The same on every machine: the largest task to the machine that has least so far.
    """
    number, count = map(int, (shard or "1/1").split("/"))
    totals = [0] * count
    others: set[str] = set()
    for task in sorted(tasks, key=lambda task: (-task.characters, task.name)):
        machine = totals.index(min(totals))
        totals[machine] += max(1, task.characters)
        if machine != number - 1:
            others.add(task.name)
    return frozenset(others)


def find_tasks(
    config: EvaluationConfig,
) -> tuple[list[PlannedTask], dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """The leaf tasks asked for, the tasks of each benchmark, and the leaves of each aggregate."""
    if find_spec("mteb") is None:
        raise ValueError(_NEEDS_MTEB)
    table = instruction_table(config.instructions)
    tasks = [
        _plan_local(dataset, table, silent=config.instructions == "none")
        for path in config.data
        for dataset in find_datasets(path)
    ]
    benchmarks: dict[str, tuple[str, ...]] = {}
    aggregates: dict[str, tuple[str, ...]] = {}
    if config.benchmark or config.tasks:
        benchmarks, aggregates, found = _plan_mteb(config, table)
        tasks += found
    names = [task.name for task in tasks]
    for name in sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two tasks are called {name}; rename the folder of one")
    return tasks, benchmarks, aggregates


def _check_dims(folder: Path, dims: Sequence[int]) -> tuple[int, ...]:
    full = read_json(folder / "config.json").get("hidden_size")
    if not isinstance(full, int):
        raise ValueError(f"{folder / 'config.json'}: expected hidden_size, found none")
    for dim in dims:
        if dim > full:
            raise ValueError(f"--dims: {dim} is more than the model's {full} dimensions")
    return tuple(sorted(dims or [full], reverse=True))


def instruction_table(style: str) -> dict[str, Any]:
    """A style of instructions.json, or a user's own JSON file.

    Sources of the wording. official-v1: the lists of the official evaluation script
    (HITsz-TMG/KaLM-Embedding, evaluate/utils.py), typing errors included; what it does not list
    gets no instruction. v2: those lists as mteb's kalm_models.py corrects them, and the instructions
    of symmetric tasks, on both sides (V2 section on data; rows "-query"/"-document" there).
    The v2 defaults of bitext mining, classification and clustering are what mteb's loader falls
    back on for these models.
    """
    if style.endswith(".json"):
        if not Path(style).is_file():
            raise ValueError(f"--instructions: {style}: expected a file, found none")
        table = read_json(style)
        if not isinstance(table, dict):
            raise ValueError(f"{style}: expected an object, found {type(table).__name__}")
    else:
        tables = read_json(_TABLES)
        if style not in tables:
            near = difflib.get_close_matches(style, tables, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"--instructions: expected {', '.join(tables)} or a .json file, found {style!r}{hint}"
            )
        table = tables[style]
    for name, entry in table.items():
        sides = entry if isinstance(entry, dict) else {"query": entry}
        if not sides.keys() <= {"query", "document"} or not all(
            isinstance(text, str) for text in sides.values()
        ):
            raise ValueError(f"{style}: {name}: expected a text or {{query, document}}")
    return table


def resolve_instruction(table: dict[str, Any], name: str, kind: str) -> Instruction:
    """The instruction of a task: its own row, that of its first version, or its type's.

    `kind` is mteb's name of the type. A task `X.v2` is the data of X, sampled or cleaned.
    """
    for key in (name, re.sub(r"\.v\d+$", "", name), f"type:{kind}"):
        if key in table:
            entry = table[key]
            sides = entry if isinstance(entry, dict) else {"query": entry}
            origin = "type" if key.startswith("type:") else "task"
            return Instruction(**sides, origin=origin)
    return Instruction()


def _plan_local(dataset: LocalDataset, table: dict[str, Any], *, silent: bool) -> PlannedTask:
    """`silent`: the style is none, which also holds back an instruction of task.toml."""
    kind = KINDS[dataset.kind].type
    instruction = resolve_instruction(table, dataset.name, kind)
    if dataset.instruction is not None and not silent:
        instruction = Instruction(query=dataset.instruction, origin="task")
    if dataset.symmetric:
        instruction = Instruction(instruction.query, instruction.query, instruction.origin)
    return PlannedTask(
        name=dataset.name,
        type=kind,
        main_score=dataset.main_score,
        revision=dataset.revision,
        characters=dataset.characters,
        instruction=instruction,
        folder=dataset.path,
        texts=dataset.texts,
        # Nearly all texts of retrieval are the corpus.
        corpus_characters=dataset.characters if dataset.kind == "retrieval" else 0,
        documents=dataset.texts if dataset.kind == "retrieval" else 0,
    )


# From here on: mteb.


def _plan_mteb(
    config: EvaluationConfig, table: dict[str, Any]
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]], list[PlannedTask]]:
    """Benchmarks and task names -> (benchmark: tasks), (aggregate: leaves), leaf tasks.

    A task of two benchmarks is run once, on the splits and subsets of both.
    """
    import mteb
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    members: dict[str, list[Any]] = {}
    for name in config.benchmark:
        try:
            members[name] = list(mteb.get_benchmark(name).tasks)
        except KeyError as error:
            raise ValueError(f"--benchmark: {error.args[0]}") from error
    try:
        single: list[Any] = [mteb.get_task(name) for name in config.tasks]
    except KeyError as error:
        reason = str(error.args[0]).removeprefix("KeyError: ")
        raise ValueError(f"--tasks: {reason}") from error
    aggregates: dict[str, tuple[str, ...]] = {}
    leaves: dict[str, PlannedTask] = {}
    queue = [task for group in [*members.values(), single] for task in group]
    for task in queue:
        if isinstance(task, AbsTaskAggregate):
            aggregates[task.metadata.name] = tuple(t.metadata.name for t in task.metadata.tasks)
            queue += task.metadata.tasks
        else:
            planned = _plan_leaf(task, table, config.max_length)
            leaves[planned.name] = _join(leaves.get(planned.name), planned)
    groups = {name: tuple(task.metadata.name for task in group) for name, group in members.items()}
    return groups, aggregates, list(leaves.values())


def _plan_leaf(task: Any, table: dict[str, Any], max_length: int | None) -> PlannedTask:
    metadata = task.metadata
    if list(metadata.modalities) != ["text"]:
        raise ValueError(
            f"{metadata.name} is about {', '.join(metadata.modalities)}, not only text"
        )
    return PlannedTask(
        name=metadata.name,
        type=metadata.type,
        main_score=metadata.main_score,
        revision=metadata.revision,
        instruction=resolve_instruction(table, metadata.name, metadata.type),
        splits=tuple(task.eval_splits),
        subsets=tuple(task.hf_subsets),
        repository=metadata.dataset["path"],
        **_sizes(task, max_length),
    )


def _join(a: PlannedTask | None, b: PlannedTask) -> PlannedTask:
    if a is None or a == b:
        return b
    raise ValueError(
        f"{b.name} is asked for twice with different parts ({a.splits} {a.subsets} and {b.splits} "
        f"{b.subsets}); evaluate the benchmarks one after the other, in separate --output folders"
    )


def _sizes(task: Any, max_length: int | None) -> dict[str, int]:
    """Texts and characters to encode, from the statistics that mteb ships of splits and subsets.

    A text is counted once in a column, and only up to about the length that is encoded.
    """
    longest = _CHARACTERS_PER_TOKEN * (max_length or _MAX_TOKENS)
    sampled = getattr(task, "max_document_to_embed", None)  # of a task that takes a part only
    total = dict.fromkeys(("texts", "characters", "documents", "corpus_characters"), 0.0)
    for split, statistics in (task.metadata.descriptive_stats or {}).items():
        subsets = statistics.get("hf_subset_descriptive_stats") or {}
        parts = [subsets[name] for name in task.hf_subsets if name in subsets] or [statistics]
        for part in parts if split in task.eval_splits else ():
            for name, column in part.items():
                if not isinstance(column, dict) or not column.get("total_text_length"):
                    continue
                average = column["average_text_length"] or 1
                texts = column.get("unique_texts") or column["total_text_length"] / average
                texts = min(texts, sampled or texts)
                total["texts"] += texts
                total["characters"] += texts * min(average, longest)
                if name.startswith("documents"):
                    total["documents"] += texts
                    total["corpus_characters"] += texts * min(average, longest)
    return {name: round(value) for name, value in total.items()}


def official_results(name: str, leaves: dict[str, dict[str, Any]]) -> Any:
    """The TaskResult of a task, or of an aggregate by mteb's own rule, from its leaves' results."""
    import mteb
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.results import TaskResult

    task: Any = mteb.get_task(name)
    if not isinstance(task, AbsTaskAggregate):
        return TaskResult.from_dict(leaves[name])
    parts = [TaskResult.from_dict(leaves[leaf.metadata.name]) for leaf in task.metadata.tasks]
    return task.combine_task_results(parts)


def official_means(benchmark: str, leaves: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """mteb's own summary of a benchmark (0 to 1): "Mean(Task)", "Mean(TaskType)" and each type.

    `leaves` holds mteb's result of every leaf task, by name. Raises ValueError when one is missing:
    mteb does not average a part of a benchmark, and neither do we.
    """
    import mteb
    from mteb.results import BenchmarkResults, ModelResult

    whole = mteb.get_benchmark(benchmark)
    results = [official_results(task.metadata.name, leaves) for task in whole.tasks]
    model = ModelResult(model_name="a/model", model_revision="0", task_results=results)
    return whole.get_score(BenchmarkResults(model_results=[model]), raise_error=True)["a/model"]
