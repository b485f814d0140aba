"""What to evaluate: settings, tasks, instructions, and the results that exist already.

Benchmarks and task names are resolved by mteb (imported only then), folders by `local`. Every task
gets its instruction from the checkpoint's prompts or instructions.json, and the file for its result.
A result is reused only if it has the same weights, settings, instruction and data; what it lacks of
the requested dimensions is added. No torch is imported.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, TypeVar

from kalm_min.evaluation.local import Instruction, PlannedTask, find_datasets
from kalm_min.files import (
    Object,
    atomic_directory,
    checkpoint_folders,
    did_you_mean,
    escape_name,
    hash_checkpoint,
    read_json,
)
from kalm_min.schema import Field, is_number, is_string, problem_with
from kalm_min.settings import KALM_TEMPLATE, Opened, Pooling, Precision, open_folder

if TYPE_CHECKING:
    from mteb import AbsTask

One = TypeVar("One")

_TABLES = Path(__file__).with_name("instructions.json")
_OBJECT = Field("an object", lambda value: isinstance(value, dict), required=True)
_TEXT = Field("a text", is_string, required=True)
_TEXTS = Field("a list of texts", is_string, items=0, required=True)
_RECORD = dict.fromkeys(("key", "dims", "used"), _OBJECT) | {
    "seconds": Field("a number", is_number, required=True),
    "type": Field("a text", is_string),
}
_KEY = {"checkpoint": _TEXT, "revision": _TEXT, "main_score": _TEXT}
_KEY |= {"splits": _TEXTS, "subsets": _TEXTS}
# The settings of a run that affect a score.
SETTINGS = ("instructions", "max_length", "dtype", "causal", "pooling")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """The settings of evaluate.py."""

    model: Annotated[tuple[str, ...], "Folders of models or LoRA adapters, or hub ids."] = ()
    benchmark: Annotated[tuple[str, ...], 'Benchmarks of mteb, e.g. "MTEB(eng, v1)".'] = ()
    tasks: Annotated[tuple[str, ...], "Single tasks of mteb, e.g. STS12 SciFact."] = ()
    data: Annotated[tuple[Path, ...], "Local dataset folders, or folders of dataset folders."] = ()
    output: Annotated[Path, "Folder of results; the same command again resumes."] = Path("results")
    dims: Annotated[tuple[int, ...], "Matryoshka dimensions to score; if none, the full one."] = ()
    precision: Annotated[
        tuple[Precision, ...], "Score the vectors as stored in these, too, beside float32."
    ] = ()
    devices: Annotated[tuple[str, ...], "Devices, one worker each; all GPUs, or cpu, if none."] = ()
    instructions: Annotated[
        str,
        "checkpoint (its stored prompts), official-v1, v2, none, or a JSON file "
        '{task or "type:STS": text or {query, document}}; if none is given, a KaLM release has '
        "its own, a model trained here without stored prompts has v2, any other has checkpoint.",
    ] = ""
    max_length: Annotated[int | None, "Tokens per text, prompt included; the checkpoint's."] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], "auto: bfloat16 where native."
    ] = "auto"
    causal: Annotated[bool | None, "Causal attention; the checkpoint's mode if none."] = None
    pooling: Annotated[Pooling | None, "Pooling; the checkpoint's if none."] = None
    store: Annotated[Path | None, "Folder that keeps vectors for later runs."] = None
    shard: Annotated[str, "This machine's part of the plan, e.g. 2/4; all share one --output."] = ""
    timeout: Annotated[float, "Seconds without progress after which a worker is replaced."] = 1800.0
    per_query: Annotated[bool, "Write the worst queries of local retrieval data."] = False
    dry_run: Annotated[bool, "Print the plan, with the time it will take, and stop."] = False
    datasets: Annotated[Path | None, "Mirror of the hub's datasets, instead of the network."] = None
    prefetch: Annotated[bool, "Only copy the tasks' datasets from the hub to --datasets."] = False
    report_only: Annotated[bool, "Tabulate existing results; without --model, all of them."] = False
    compare: Annotated[tuple[Path, ...], "Compare the models in these results folders."] = ()

    def __post_init__(self) -> None:
        """Validate option combinations."""
        has_tasks = bool(self.benchmark or self.tasks)
        needs_model = not (self.compare or self.prefetch or self.report_only)
        if self.prefetch and not (self.datasets and has_tasks) and not self.compare:
            raise ValueError("--prefetch: expected --datasets, and --benchmark or --tasks")
        if needs_model and not self.model:
            raise ValueError("--model: expected a model folder or a hub id, found none")
        if (needs_model or (self.report_only and self.model)) and not (has_tasks or self.data):
            raise ValueError("nothing to evaluate: give --benchmark, --tasks or --data")
        part = re.fullmatch(r"(\d+)/(\d+)", self.shard or "1/1")
        are_devices = all(re.fullmatch(r"cpu|mps|cuda(:\d+)?", one) for one in self.devices)
        are_dims = min(self.dims, default=1) > 0 and len({*self.dims}) == len(self.dims)
        is_part = part is not None and 1 <= int(part[1]) <= int(part[2])
        for name, fits, expected in (
            ("devices", are_devices, "cpu, cuda:0, ..."),
            ("dims", are_dims, "different numbers above 0"),
            ("shard", is_part, "k/n with k from 1 to n"),
            ("timeout", self.timeout > 0, "seconds above 0"),
            ("max_length", self.max_length is None or self.max_length > 0, "at least 1 token"),
        ):
            if not fits:
                flag, found = f"--{name.replace('_', '-')}", getattr(self, name)
                raise ValueError(f"{flag}: expected {expected}, found {found!r}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run needs to know about one model, decided before it starts."""

    model: str
    checkpoint: str  # hash of the model's files
    dims: tuple[str, ...]  # what is scored, e.g. "896", "256", "896 int8"; the main one first
    settings: dict[str, object]
    tasks: tuple[PlannedTask, ...]  # largest first
    results: Path  # folder of the result files
    benchmarks: tuple[str, ...] = ()
    elsewhere: frozenset[str] = frozenset()  # names of the tasks that other machines run
    per_query: bool = False

    @property
    def name(self) -> str:
        """The hub id of the model, or local/ and the name of its run."""
        return self.results.absolute().parent.name.replace("__", "/")

    def result_path(self, task: PlannedTask) -> Path:
        """The file of a task's result."""
        return self.results / f"{escape_name(task.name)}.json"

    def queries_path(self, task: PlannedTask) -> Path | None:
        """The file of a task's worst queries, if they are requested and the task has any."""
        wanted = self.per_query and task.folder and task.type in ("Retrieval", "Reranking")
        return self.results / f"{escape_name(task.name)}.queries.jsonl" if wanted else None

    def key(self, task: PlannedTask) -> dict[str, object]:
        """Everything that affects a score, apart from the dimension."""
        instruction = task.instruction
        return self.settings | {
            "checkpoint": self.checkpoint,
            "revision": task.revision,
            "splits": list(task.splits),
            "subsets": list(task.subsets),
            "main_score": task.main_score,
            f"query_{instruction.kind}": instruction.query,
            f"document_{instruction.kind}": instruction.document,
        }

    def missing(self, task: PlannedTask) -> list[str]:
        """The requested dimensions that a task's result lacks, all of them if there is no result."""
        result = read_result(self.result_path(task), self.key(task))
        found = result["kalm_min"]["dims"] if result else {}
        missing = [dim for dim in self.dims if dim not in found]
        if not missing and (queries := self.queries_path(task)) and not queries.is_file():
            return [self.dims[0]]
        return missing

    def result(self, task: PlannedTask) -> Object | None:
        """The valid result of a task with every requested dimension, or None."""
        return None if self.missing(task) else read_result(self.result_path(task), self.key(task))


def read_result(path: Path, key: object = None) -> Object | None:
    """A result file; None if it is absent, torn, another program's, or of another `key`.

    It is mteb's own result at the largest dimension with an entry "kalm_min": "key", "type",
    "used", "seconds" and "dims", which holds mteb's result at each dimension.
    """
    try:
        result = read_json(path)
    except (OSError, ValueError):
        return None
    record = result.get("kalm_min") if isinstance(result, dict) else None
    if not isinstance(record, dict) or problem_with(record, _RECORD, extra=True):
        return None
    if problem_with(record["key"], _KEY, extra=True) or key not in (None, record["key"]):
        return None
    record["dims"] = {
        dim: scores
        for dim, scores in record["dims"].items()
        if re.fullmatch(r"[1-9]\d{0,8}( u?(int8|binary))?", dim)
        and isinstance(scores, dict)
        and is_number(scores.get("main_score"))
    }
    return result if record["dims"] else None


def ordered(dims: Iterable[str]) -> tuple[str, ...]:
    """Dimensions, the largest first; then those of each other precision."""
    return tuple(sorted(dims, key=lambda dim: (dim.partition(" ")[2], -int(dim.split()[0]))))


def make_plans(config: EvaluationConfig) -> list[Plan]:
    """A plan for each model. Raises ValueError with one sentence for what cannot be run."""
    tasks = sorted(find_tasks(config), key=lambda task: -task.characters)
    missing = [str(task.mirror) for task in tasks if task.mirror and not task.mirror.is_dir()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"--datasets: expected {', '.join(missing[:5])}{more}, found none; the same command with "
            "--prefetch, on a machine with network access, copies them"
        )
    plans = [_make_plan(config, model, tasks) for model in config.model]
    if len({plan.results for plan in plans}) < len(plans):
        raise ValueError(f"--model: expected different models, found one twice in {config.model}")
    return plans


def _make_plan(config: EvaluationConfig, model: str, tasks: Sequence[PlannedTask]) -> Plan:
    folders = checkpoint_folders(model)
    checkpoint, opened = hash_checkpoint(*folders), open_folder(model, causal=config.causal)
    style, stored = config.instructions or usual_style(opened), opened.settings
    # sentence-transformers puts the default prompt before texts for which none is named.
    prompts = stored.prompts | {"": stored.prompts.get(stored.default_prompt_name or "", "")}
    if style == "checkpoint":
        resolve = partial(resolve_prompts, prompts)
    else:
        resolve = partial(resolve_instruction, instruction_table(style))
    planned = tuple(
        task  # with an instruction of its own, of its task.toml
        if task.instruction.origin and style != "none"
        else replace(task, instruction=resolve(task))
        for task in tasks
    )
    if (most := max(config.dims, default=0)) > opened.dimension:
        raise ValueError(
            f"--dims: {most} is more than the {opened.dimension} dimensions of {model}"
        )
    dims, precisions = config.dims or [opened.dimension], {"float32", *config.precision}
    settings = {name: getattr(config, name) for name in SETTINGS}
    settings["instructions"] = Path(style).stem
    # mteb's layout, so that mteb.ResultCache(output) finds the results too. Not files.digest: a
    # different hash would give the folders of earlier runs other names.
    hashed = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    revision = f"{checkpoint[:12]}-{hashed[:8]}"
    # A model keeps its results when its folder is moved or renamed.
    earlier = sorted((config.output / "results").glob(f"*/{revision}"))
    owner = _name(folders[0].resolve()) if Path(model).expanduser().is_dir() else model
    return Plan(
        model,
        checkpoint,
        ordered(f"{dim} {one}".removesuffix(" float32") for one in precisions for dim in dims),
        settings,
        planned,
        [*earlier, config.output / "results" / owner.replace("/", "__") / revision][0],
        benchmarks=config.benchmark,
        elsewhere=tasks_elsewhere(tasks, config.shard),
        per_query=config.per_query,
    )


def _name(folder: Path) -> str:
    """local/RUN for RUN/final, local/RUN-step_10 for RUN/checkpoints/step_10, else local/FOLDER."""
    if folder.parent.name == "checkpoints":
        return f"local/{folder.parents[1].name}-{folder.name}"
    is_part = folder.name in ("final", "adapter") and folder.parent.name
    return f"local/{folder.parent.name if is_part else folder.name}"


def usual_style(opened: Opened) -> str:
    """The style of a model for which none is given: KaLM's tables, or its stored prompts."""
    if opened.released.startswith("KaLM-Embedding"):
        return "official-v1" if " v1" in opened.released else "v2"
    is_ours = opened.sources["instruction_template"] == "config_sentence_transformers.json"
    is_ours &= opened.settings.instruction_template == KALM_TEMPLATE
    return "v2" if is_ours and not any(opened.settings.prompts.values()) else "checkpoint"


def check_hub(plans: Iterable[Plan]) -> None:
    """Raise ValueError if datasets must come from the hub, which cannot be reached.

    It costs one request, where `datasets` would try for a minute in every worker.
    """
    every = [task for plan in plans for task in plan.tasks if plan.missing(task)]
    wanted = {task.repository: task for task in every if task.repository and not task.mirror}
    if not wanted:
        return
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    cached = {path.name.replace("___", "/") for path in Path(config.HF_DATASETS_CACHE).glob("*")}
    for name in sorted(wanted.keys() - cached)[:1]:
        try:
            HfApi().dataset_info(name, timeout=10)
        except HfHubHTTPError:
            return  # the hub has answered; the worker tells what is wrong
        except Exception as error:  # the client raises a dozen types
            raise ValueError(
                f"{wanted[name].name}: its dataset {name} is neither here nor within reach ({error}); "
                "--prefetch with --datasets FOLDER copies it, on a machine with network access"
            ) from error


def tasks_elsewhere(tasks: Sequence[PlannedTask], shard: str) -> frozenset[str]:
    """The tasks that part `shard` ("2/4") leaves to other machines; all machines compute the same.

    The largest remaining task goes to the machine with the least work so far.
    """
    number, count = map(int, (shard or "1/1").split("/"))
    totals = [0] * count
    machines: dict[str, int] = {}
    for task in sorted(tasks, key=lambda task: (-task.characters, task.name)):
        machines[task.name] = totals.index(min(totals))
        totals[machines[task.name]] += max(1, task.characters)
    return frozenset(name for name, machine in machines.items() if machine != number - 1)


def find_tasks(config: EvaluationConfig) -> list[PlannedTask]:
    """The requested tasks, with no instruction but that of a task.toml.

    Raises ValueError with one sentence for what cannot be run.
    """
    if find_spec("mteb") is None:
        raise ValueError('evaluation needs mteb: pip install "kalm-min[eval]"')
    tasks = _mteb_tasks(config) if config.benchmark or config.tasks else {}
    for task in (task for path in config.data for task in find_datasets(path)):
        if task.name in tasks:
            raise ValueError(f"two tasks are called {task.name}; rename the folder of one")
        tasks[task.name] = task
    return list(tasks.values())


def _named(
    flag: str, name: str, get: Callable[[str], One], every: Callable[[], Iterable[object]]
) -> One:
    """A task or benchmark of mteb. Raises ValueError with the nearest name if there is none."""
    try:
        return get(name)
    except KeyError as error:
        known = [getattr(getattr(one, "metadata", one), "name", "") for one in every()]
        near = did_you_mean(name, known)
        raise ValueError(f"{flag}: mteb has no {name}{near}") from error


def _mteb_tasks(config: EvaluationConfig) -> dict[str, PlannedTask]:
    """Tasks by name; a task of two benchmarks is run once, on the splits and subsets of both."""
    import mteb

    find = partial(_named, "--benchmark", get=mteb.get_benchmark, every=mteb.get_benchmarks)
    every = partial(mteb.get_tasks, exclude_superseded=False)
    requested = [task for name in config.benchmark for task in find(name).tasks]
    requested += [_named("--tasks", name, mteb.get_task, every) for name in config.tasks]
    tasks: dict[str, PlannedTask] = {}
    for leaf, parent in ((leaf, task) for task in requested for leaf in _leaves(task)):
        metadata = leaf.metadata
        if list(metadata.modalities) != ["text"]:
            modalities = ", ".join(metadata.modalities)
            raise ValueError(f"{metadata.name} is about {modalities}, not only text")
        repository = metadata.dataset["path"]
        characters, corpus_characters, documents = task_size(leaf, config.max_length)
        new = PlannedTask(
            metadata.name,
            metadata.type,
            metadata.main_score,
            metadata.revision,
            characters,
            repository=repository,
            mirror=config.datasets and config.datasets.absolute() / repository / metadata.revision,
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
    return tasks


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
    sizes: list[tuple[float, float, float]] = []
    for split in task.eval_splits:
        statistics = (task.metadata.descriptive_stats or {}).get(split, {})
        subsets = statistics.get("hf_subset_descriptive_stats") or {}
        parts = [subsets[name] for name in task.hf_subsets if name in subsets] or [statistics]
        for name, column in (item for part in parts for item in part.items()):
            if isinstance(column, dict) and (length := column.get("total_text_length")):
                average = column["average_text_length"] or 1
                texts = column.get("unique_texts") or length / average
                texts = min(texts, sampled or texts)
                size, is_corpus = texts * min(average, longest), name.startswith("documents")
                sizes.append((size, size * is_corpus, texts * is_corpus))
    characters, corpus_characters, documents = map(sum, zip((0, 0, 0), *sizes, strict=True))
    return round(characters), round(corpus_characters), round(documents)


def instruction_table(style: str) -> dict[str, Instruction]:
    """A style of instructions.json, or a user's JSON file: task, or "type:" and a type -> instruction.

    Sources of the wording. official-v1: the lists of the official evaluation script
    (HITsz-TMG/KaLM-Embedding, evaluate/utils.py), typing errors included; what it does not list
    gets no instruction. v2: those lists as corrected in mteb's kalm_models.py, with the instructions
    of symmetric tasks for queries and documents alike (V2 section on data; rows "-query"/"-document"
    there), and the defaults of mteb's loader for bitext mining, classification and clustering.
    """
    is_file = style.endswith(".json")
    if is_file and not Path(style).is_file():
        raise ValueError(f"--instructions: {style}: expected a file, found none")
    tables = {style: read_json(style)} if is_file else read_json(_TABLES)
    if style not in tables:
        expected = f"expected checkpoint, {', '.join(tables)} or a .json file"
        near = did_you_mean(style, tables)
        raise ValueError(f"--instructions: {expected}, found {style!r}{near}")
    if not isinstance(entries := tables[style], dict):
        raise ValueError(f"{style}: expected an object, found {type(entries).__name__}")
    table: dict[str, Instruction] = {}
    for name, entry in entries.items():
        texts = entry if isinstance(entry, dict) else {"query": entry}
        are_texts = all(isinstance(text, str) for text in texts.values())
        if not are_texts or not texts.keys() <= {"query", "document"}:
            raise ValueError(f"{style}: {name}: expected a text or {{query, document}}")
        table[name] = Instruction(**texts, origin="type" if name.startswith("type:") else "task")
    return table


def resolve_instruction(table: Mapping[str, Instruction], task: PlannedTask) -> Instruction:
    """The instruction of a task: from its own row, that of its first version, or that of its type.

    A task `X.v2` is the data of X, sampled or cleaned.
    """
    keys = (task.name, re.sub(r"\.v\d+$", "", task.name), f"type:{task.type}")
    found = next((table[key] for key in keys if key in table), Instruction())
    return replace(found, document=found.query) if task.symmetric else found


def resolve_prompts(prompts: Mapping[str, str], task: PlannedTask) -> Instruction:
    """A task's prompts among a checkpoint's, chosen as mteb chooses for sentence-transformers.

    The name of a local dataset counts too, for its queries only, as training stores it.
    """
    name, kind = task.name, task.type
    queries, documents = (name, kind, ""), ()
    if kind.endswith(("Retrieval", "Reranking")):
        queries = (f"{name}-query", name, f"{kind}-query", kind, "query")
        shared = () if task.folder and not task.symmetric else (name,)
        documents = (f"{name}-document", *shared, f"{kind}-document", kind, "document")
    found = [next((key for key in keys if key in prompts), None) for keys in (queries, documents)]
    query, document = ("" if key is None else prompts[key] for key in found)
    used = dict.fromkeys(key or "default" for key in found if key is not None and prompts[key])
    origin = f"prompts {', '.join(used)}" if used else ""
    return Instruction(query, document, origin, "prompt")


def official_means(benchmark: str, results: Mapping[str, Object]) -> dict[str, float | None]:
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
        try:
            parts = [TaskResult.from_dict(results[leaf.metadata.name]) for leaf in _leaves(task)]
        except Exception as error:  # a file that was edited can fail in a dozen ways
            raise ValueError(f"the result of {task.metadata.name} is damaged") from error
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
