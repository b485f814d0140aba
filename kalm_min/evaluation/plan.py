"""What to evaluate: settings, tasks, instructions, and the results that exist already.

Benchmarks and task names are resolved by mteb (imported only then), folders by `local`. Every task
gets its instruction from instructions.json, its size in characters, and the file for its result. A
result is reused only if it has the same weights, settings, instruction and data and every requested
dimension. The parent process needs nothing else: no torch and no device.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from kalm_min.evaluation.local import KINDS, find_datasets
from kalm_min.files import (
    atomic_directory,
    checkpoint_folders,
    did_you_mean,
    hash_checkpoint,
    read_json,
)

if TYPE_CHECKING:
    from mteb import AbsTask

_TABLES = Path(__file__).with_name("instructions.json")
# The settings of a run that affect a score.
SETTINGS = ("instructions", "max_length", "dtype", "causal", "pooling")
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """The settings of evaluate.py."""

    model: Annotated[str, "Model folder, LoRA adapter folder, or Hugging Face hub id."] = ""
    benchmark: Annotated[tuple[str, ...], 'Benchmarks of mteb, e.g. "MTEB(eng, v1)".'] = ()
    tasks: Annotated[tuple[str, ...], "Single tasks of mteb, e.g. STS12 SciFact."] = ()
    data: Annotated[tuple[Path, ...], "Local dataset folders, or folders of dataset folders."] = ()
    output: Annotated[Path, "Folder of results; the same command again resumes."] = Path("results")
    dims: Annotated[tuple[int, ...], "Matryoshka dimensions to score; if none, the full one."] = ()
    devices: Annotated[tuple[str, ...], "Devices, one worker each; all GPUs, or cpu, if none."] = ()
    instructions: Annotated[
        str,
        'official-v1, v2, none, or a JSON file {task or "type:STS": text or {query, document}}.',
    ] = "v2"
    max_length: Annotated[
        int | None, "Maximum tokens per text, prompt included; the checkpoint's limit if none."
    ] = None
    dtype: Annotated[Precision, "Dtype; auto: bfloat16 where native, else float32."] = "auto"
    causal: Annotated[bool | None, "Causal attention; the checkpoint's mode if none."] = None
    pooling: Annotated[
        Literal["mean", "lasttoken"] | None, "Pooling; the checkpoint's if none."
    ] = None
    store: Annotated[Path | None, "Folder that keeps vectors for later runs."] = None
    shard: Annotated[str, "This machine's part of the plan, e.g. 2/4; all share one --output."] = ""
    timeout: Annotated[float, "Seconds without progress after which a worker is replaced."] = 1800.0
    dry_run: Annotated[bool, "Print the plan and stop."] = False
    datasets: Annotated[Path | None, "Mirror of the hub's datasets, instead of the network."] = None
    prefetch: Annotated[bool, "Only copy the tasks' datasets from the hub to --datasets."] = False
    report_only: Annotated[bool, "Tabulate existing results; without --model, all of them."] = False
    compare: Annotated[tuple[Path, ...], "Run nothing; compare these results folders."] = ()

    def __post_init__(self) -> None:
        """Validate option combinations."""
        has_tasks = bool(self.benchmark or self.tasks)
        needs_model = not (self.compare or self.prefetch or self.report_only)
        if len(self.compare) == 1:
            raise ValueError("--compare: expected two folders or more, found one")
        if self.prefetch and not (self.datasets and has_tasks) and not self.compare:
            raise ValueError("--prefetch: expected --datasets, and --benchmark or --tasks")
        if needs_model and not self.model:
            raise ValueError("--model: expected a model folder or a hub id, found none")
        if (needs_model or (self.report_only and self.model)) and not (has_tasks or self.data):
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
    """The instructions of a task; an empty one adds no prompt."""

    query: str = ""  # of every text if a task does not distinguish queries and documents
    document: str = ""  # of retrieval and reranking
    origin: Literal["task", "type", "none"] = "none"  # the entry in the table (or task.toml)


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One task (never an aggregate): what a worker needs to run it and to identify its result."""

    name: str
    type: str
    main_score: str
    revision: str
    characters: int  # to encode, each text once; 0 if unknown; orders and divides the work
    instruction: Instruction
    folder: Path | None = None  # the folder of a local dataset
    repository: str = ""  # the hub repository of a task of mteb
    mirror: Path | None = None  # the copy of the repository, by revision, to read instead
    splits: tuple[str, ...] = ("test",)
    subsets: tuple[str, ...] = ()
    corpus_characters: int = 0  # of documents to search, which several workers may encode
    documents: int = 0
    aggregate: str = ""  # the task of mteb whose score is the mean of this one and others


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run needs to know, decided before it starts."""

    model: str
    checkpoint: str  # hash of the model's files
    dims: tuple[int, ...]  # largest first
    settings: dict[str, object]
    tasks: tuple[PlannedTask, ...]  # largest first
    results: Path  # folder of the result files
    benchmarks: tuple[str, ...] = ()
    elsewhere: frozenset[str] = frozenset()  # names of the tasks that other machines run

    def result_path(self, task: PlannedTask) -> Path:
        """The file of a task's result."""
        return self.results / f"{task.name}.json"

    def key(self, task: PlannedTask) -> dict[str, object]:
        """Everything that affects a score, apart from the dimension."""
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
        """The valid result of a task with every requested dimension, or None.

        It is mteb's own result at the largest dimension with an entry "kalm_min": "key", "type",
        "used", "seconds" and "dims", which holds mteb's result at each dimension.
        """
        try:
            result = read_json(self.result_path(task))
            record = result["kalm_min"]
            is_valid = record["key"] == self.key(task)
            has_dims = {str(dim) for dim in self.dims} <= record["dims"].keys()
            return result if is_valid and has_dims else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # absent, torn or another program's, so the task is run


def make_plan(config: EvaluationConfig) -> Plan:
    """Resolve a configuration. Raises ValueError with one sentence for what cannot be run."""
    folders = checkpoint_folders(config.model)
    tasks = find_tasks(config)
    checkpoint = hash_checkpoint(*folders)
    settings = {name: getattr(config, name) for name in SETTINGS}
    settings["instructions"] = Path(config.instructions).stem
    missing = [str(task.mirror) for task in tasks if task.mirror and not task.mirror.is_dir()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"--datasets: expected {', '.join(missing[:5])}{more}, found none; the same command with "
            "--prefetch, on a machine with network access, copies them"
        )
    full = read_json(folders[-1] / "config.json").get("hidden_size")
    if not isinstance(full, int):
        raise ValueError(f"{folders[-1] / 'config.json'}: expected hidden_size, found none")
    if max(config.dims, default=0) > full:
        raise ValueError(f"--dims: {max(config.dims)} is more than the model's {full} dimensions")
    is_local = Path(config.model).expanduser().is_dir()
    owner = f"local/{folders[0].resolve().name}" if is_local else config.model
    # mteb's layout, so that mteb.ResultCache(output) finds the results too. Not files.digest: a
    # different hash would give the folders of earlier runs other names.
    hashed = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    revision = f"{checkpoint[:12]}-{hashed[:8]}"
    return Plan(
        model=config.model,
        checkpoint=checkpoint,
        dims=tuple(sorted(config.dims or [full], reverse=True)),
        settings=settings,
        tasks=tuple(sorted(tasks, key=lambda task: -task.characters)),
        results=config.output / "results" / owner.replace("/", "__") / revision,
        benchmarks=config.benchmark,
        elsewhere=tasks_elsewhere(tasks, config.shard),
    )


def tasks_elsewhere(tasks: Sequence[PlannedTask], shard: str) -> frozenset[str]:
    """The tasks that part `shard` ("2/4") leaves to other machines; all machines compute the same.

    The largest remaining task goes to the machine with the least work so far.
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


def find_tasks(config: EvaluationConfig) -> list[PlannedTask]:
    """The requested tasks. Raises ValueError with one sentence for what cannot be run."""
    if find_spec("mteb") is None:
        raise ValueError('evaluation needs mteb: pip install "kalm-min[eval]"')
    table = instruction_table(config.instructions)
    tasks = _mteb_tasks(config, table) if config.benchmark or config.tasks else []
    for dataset in (dataset for path in config.data for dataset in find_datasets(path)):
        if dataset.name in [task.name for task in tasks]:
            raise ValueError(f"two tasks are called {dataset.name}; rename the folder of one")
        kind = KINDS[dataset.kind].type
        instruction = resolve_instruction(table, dataset.name, kind)
        if dataset.instruction is not None and config.instructions != "none":
            instruction = Instruction(dataset.instruction, origin="task")
        if dataset.symmetric:
            instruction = replace(instruction, document=instruction.query)
        is_corpus = dataset.kind == "retrieval"  # nearly all of the texts are documents
        task = PlannedTask(
            name=dataset.name,
            type=kind,
            main_score=dataset.main_score,
            revision=dataset.revision,
            characters=dataset.characters,
            instruction=instruction,
            folder=dataset.path,
            corpus_characters=dataset.characters * is_corpus,
            documents=dataset.texts * is_corpus,
        )
        tasks.append(task)
    return tasks


def _mteb_tasks(config: EvaluationConfig, table: Mapping[str, Instruction]) -> list[PlannedTask]:
    """Tasks by name; a task of two benchmarks is run once, on the splits and subsets of both."""
    import mteb

    flag = "--benchmark"
    try:
        requested = [task for name in config.benchmark for task in mteb.get_benchmark(name).tasks]
        flag = "--tasks"
        requested += [mteb.get_task(name) for name in config.tasks]
    except KeyError as error:
        raise ValueError(f"{flag}: {str(error.args[0]).removeprefix('KeyError: ')}") from error
    tasks: dict[str, PlannedTask] = {}
    for leaf, parent in ((leaf, task) for task in requested for leaf in _leaves(task)):
        metadata = leaf.metadata
        if list(metadata.modalities) != ["text"]:
            raise ValueError(
                f"{metadata.name} is about {', '.join(metadata.modalities)}, not only text"
            )
        repository = metadata.dataset["path"]
        mirror = config.datasets and config.datasets.absolute() / repository / metadata.revision
        characters, corpus_characters, documents = task_size(leaf, config.max_length)
        new = PlannedTask(
            name=metadata.name,
            type=metadata.type,
            main_score=metadata.main_score,
            revision=metadata.revision,
            characters=characters,
            instruction=resolve_instruction(table, metadata.name, metadata.type),
            repository=repository,
            mirror=mirror,
            splits=tuple(leaf.eval_splits),
            subsets=tuple(leaf.hf_subsets),
            corpus_characters=corpus_characters,
            documents=documents,
            aggregate="" if leaf is parent else parent.metadata.name,
        )
        old = tasks.get(new.name, new)
        if (old.splits, old.subsets) != (new.splits, new.subsets):
            raise ValueError(
                f"{new.name} is requested twice with different splits or subsets; evaluate the "
                "benchmarks one after the other, in separate --output folders"
            )
        tasks[new.name] = old if old.aggregate else new
    return list(tasks.values())


def _leaves(task: "AbsTask") -> "list[AbsTask]":
    """The tasks that an aggregate averages; for any other task, the task itself."""
    return getattr(task, "tasks", [task])


def task_size(task: "AbsTask", max_length: int | None) -> tuple[int, int, int]:
    """Characters to encode, those of documents to search, and the number of these documents.

    They come from the statistics that mteb ships. A text is counted once per column, and only up to
    about the length that is encoded (512 tokens if no maximum is given).
    """
    longest = 4 * (max_length or 512)  # characters of so many tokens
    sampled = getattr(task, "max_document_to_embed", None)  # set if a task encodes only a sample
    characters = corpus_characters = documents = 0.0
    for split in task.eval_splits:
        statistics = (task.metadata.descriptive_stats or {}).get(split, {})
        subsets = statistics.get("hf_subset_descriptive_stats") or {}
        parts = [subsets[name] for name in task.hf_subsets if name in subsets] or [statistics]
        for name, column in (item for part in parts for item in part.items()):
            if isinstance(column, dict) and (length := column.get("total_text_length")):
                average = column["average_text_length"] or 1
                texts = column.get("unique_texts") or length / average
                texts = min(texts, sampled or texts)
                size = texts * min(average, longest)
                characters += size
                if name.startswith("documents"):
                    documents += texts
                    corpus_characters += size
    return round(characters), round(corpus_characters), round(documents)


def instruction_table(style: str) -> dict[str, Instruction]:
    """A style of instructions.json, or a user's JSON file: task, or "type:" and a type -> instruction.

    Sources of the wording. official-v1: the lists of the official evaluation script
    (HITsz-TMG/KaLM-Embedding, evaluate/utils.py), typing errors included; what it does not list
    gets no instruction. v2: those lists as corrected in mteb's kalm_models.py, with the instructions
    of symmetric tasks for queries and documents alike (V2 section on data; rows "-query"/"-document"
    there). The v2 defaults of bitext mining, classification and clustering are what mteb's loader
    falls back on for these models.
    """
    is_file = style.endswith(".json")
    if is_file and not Path(style).is_file():
        raise ValueError(f"--instructions: {style}: expected a file, found none")
    tables = {style: read_json(style)} if is_file else read_json(_TABLES)
    if style not in tables:
        expected = f"expected {', '.join(tables)} or a .json file"
        near = did_you_mean(style, tables)
        raise ValueError(f"--instructions: {expected}, found {style!r}{near}")
    entries = tables[style]
    if not isinstance(entries, dict):
        raise ValueError(f"{style}: expected an object, found {type(entries).__name__}")
    table: dict[str, Instruction] = {}
    for name, entry in entries.items():
        texts = entry if isinstance(entry, dict) else {"query": entry}
        are_texts = all(isinstance(text, str) for text in texts.values())
        if not are_texts or not texts.keys() <= {"query", "document"}:
            raise ValueError(f"{style}: {name}: expected a text or {{query, document}}")
        table[name] = Instruction(**texts, origin="type" if name.startswith("type:") else "task")
    return table


def resolve_instruction(table: Mapping[str, Instruction], name: str, kind: str) -> Instruction:
    """The instruction of a task: from its own row, that of its first version, or that of its type.

    `kind` is mteb's name of the type. A task `X.v2` is the data of X, sampled or cleaned.
    """
    keys = (name, re.sub(r"\.v\d+$", "", name), f"type:{kind}")
    return next((table[key] for key in keys if key in table), Instruction())


def official_means(benchmark: str, results: Mapping[str, dict]) -> dict[str, float | None]:
    """mteb's own summary of a benchmark (0 to 1): "Mean(Task)", "Mean(TaskType)" and each type.

    `results` holds mteb's result of every task by name, without aggregates. Raises ValueError if
    one is missing, since mteb does not average a part of a benchmark.
    """
    import mteb
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.results import BenchmarkResults, ModelResult, TaskResult

    full = mteb.get_benchmark(benchmark)
    names = [leaf.metadata.name for task in full.tasks for leaf in _leaves(task)]
    if missing := len(names) - len(results.keys() & set(names)):
        raise ValueError(f"{missing} of {len(names)} tasks missing")
    found: list[TaskResult] = []
    for task in full.tasks:
        parts = [TaskResult.from_dict(results[leaf.metadata.name]) for leaf in _leaves(task)]
        is_aggregate = isinstance(task, AbsTaskAggregate)
        found.append(task.combine_task_results(parts) if is_aggregate else parts[0])
    model = ModelResult(model_name="a/model", model_revision="0", task_results=found)
    return full.get_score(BenchmarkResults(model_results=[model]), raise_error=True)["a/model"]


def prefetch(tasks: Iterable[PlannedTask], stream: TextIO) -> list[str]:
    """Copy the repositories of tasks from the hub to their mirror, each at its task's revision.

    Returns one sentence per repository that could not be copied; the same call again resumes it. A
    copy is complete or absent. The path has the revision because `datasets` reads whatever is in a
    folder, while the result names the requested revision. Scripts are not copied.
    """
    from huggingface_hub import snapshot_download

    failures: list[str] = []
    wanted = {task.mirror: task for task in tasks if task.mirror}
    for number, (folder, task) in enumerate(wanted.items(), start=1):
        what = f"{task.repository} at {task.revision[:12]} ({task.name})"
        stream.write(f"[{number}/{len(wanted)}] {what}\n")
        stream.flush()
        if folder.is_dir():
            continue
        part = folder.with_name(f".{task.revision}.part")
        options = {"repo_type": "dataset", "revision": task.revision, "ignore_patterns": ["*.py"]}
        try:
            snapshot_download(task.repository, local_dir=part, **options)
        except Exception as error:  # the hub client raises a dozen types
            failures.append(f"{what}: {' '.join(str(error).split())[:300]}")
            continue
        shutil.rmtree(part / ".cache", ignore_errors=True)  # the client's bookkeeping
        with atomic_directory(folder) as complete:
            part.replace(complete)
    return failures
