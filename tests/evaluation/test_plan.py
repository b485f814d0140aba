"""Plans: instructions, what a result belongs to, and which results still hold."""

import json
import re
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min import Embedder
from kalm_min.evaluation import plan as planning
from kalm_min.evaluation.plan import (
    EvaluationConfig,
    Instruction,
    PlannedTask,
    check_hub,
    instruction_table,
    make_plans,
    official_means,
    resolve_instruction,
    resolve_prompts,
    task_size,
    tasks_elsewhere,
)
from kalm_min.files import write_json
from kalm_min.model.lora import Adapter, LoRAConfig, add_adapter

RETRIEVE = "Given a query, retrieve documents that answer the query"


@pytest.fixture
def config(tiny_model_dir, eight, tmp_path):
    """make(**changes) -> the plan of the eight datasets."""
    if find_spec("mteb") is None:
        pytest.skip("needs mteb")

    def make(**changes):
        settings = {
            "model": (str(tiny_model_dir),),
            "data": (eight,),
            "output": tmp_path / "results",
        }
        return make_plans(EvaluationConfig(**settings | changes))[0]

    return make


def finish(plan, task, **changes):
    """Write what a worker would write for a task."""
    dims = {str(dim): {"main_score": 0.5} for dim in plan.dims}
    record = {"key": plan.key(task), "dims": dims, "seconds": 1.0, "used": {}} | changes
    write_json(plan.result_path(task), {"kalm_min": record})


def a_task(name, kind, **more):
    return PlannedTask(name, kind, "m", "1", 0, Instruction(), **more)


@pytest.mark.parametrize(
    ("style", "name", "kind", "expected"),
    [
        # V1 section 1.6: one sentence for retrieval and reranking, nothing on passages.
        ("official-v1", "QuoraRetrieval", "Retrieval", Instruction(RETRIEVE + ".", "", "type")),
        (
            "official-v1",
            "AskUbuntuDupQuestions",
            "Reranking",
            Instruction(RETRIEVE + ".", "", "type"),
        ),
        ("official-v1", "STS12", "STS", Instruction()),
        ("official-v1", "MyOwn", "Classification", Instruction()),
        # The official typing errors stay.
        (
            "official-v1",
            "Banking77Classification",
            "Classification",
            Instruction("Given a online banking query, find the corresponding intents", "", "task"),
        ),
        (
            "official-v1",
            "JDReview",
            "Classification",
            Instruction(
                "Classifying sentiment of the customer review for iPhoneinto positive or negative",
                "",
                "task",
            ),
        ),
        # V2: queries and documents of symmetric tasks; other documents have none.
        (
            "v2",
            "QuoraRetrieval",
            "Retrieval",
            Instruction(
                "Retrieve semantically similar questions",
                "Retrieve semantically similar questions",
                "task",
            ),
        ),
        ("v2", "SciFact", "Retrieval", Instruction(RETRIEVE, "", "task")),
        ("v2", "STS22.v2", "STS", Instruction("Retrieve semantically similar text", "", "task")),
        ("v2", "MyOwn", "STS", Instruction("Retrieve semantically similar text", "", "type")),
        ("v2", "SummEval", "Summarization", None),
        ("v2", "Odd", "Regression", Instruction()),
        ("none", "STS12", "STS", Instruction()),
    ],
)
def test_instructions(style, name, kind, expected):
    """Promise: our own tables, and a type's default is marked as such."""
    found = resolve_instruction(instruction_table(style), a_task(name, kind))
    if expected is None:
        expected = Instruction("Retrieve semantically similar summaries", "", "task")
    assert found == expected


PROMPTS = {"query": "q: ", "document": "d: ", "STS": "s: ", "SciFact": "f: ", "own": "o: "}


@pytest.mark.parametrize(
    ("name", "kind", "more", "query", "document", "origin"),
    [
        ("Other", "Retrieval", {}, "q: ", "d: ", "prompts query, document"),
        ("SciFact", "Retrieval", {}, "f: ", "f: ", "prompts SciFact"),
        ("own", "Retrieval", {"folder": "own"}, "o: ", "d: ", "prompts own, document"),
        ("Other", "STS", {}, "s: ", "", "prompts STS"),
        ("Other", "Clustering", {}, "e: ", "", "prompts default"),
    ],
)
def test_stored_prompts_are_chosen_as_in_mteb(name, kind, more, query, document, origin):
    """By name, by type, by role; a task without documents has no role and gets the default prompt."""
    found = resolve_prompts(PROMPTS | {"": "e: "}, a_task(name, kind, **more))
    assert found == Instruction(query, document, origin, "prompt")


def store_prompts(folder, **changes):
    """Change config_sentence_transformers.json of a model; None removes a key."""
    path = folder / "config_sentence_transformers.json"
    stored = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in stored.items() if value is not None})


def test_the_style_follows_the_model(config, make_model, tmp_path):
    """Promise: stored prompts are used unless a style is named; KaLM's tables need no naming."""
    make_model(tmp_path / "model")
    one = {"model": (str(tmp_path / "model"),)}
    assert config(**one).settings["instructions"] == "v2"
    store_prompts(tmp_path / "model", instruction_template="Instruct: {instruction}\nQuery:")
    assert config(**one).settings["instructions"] == "checkpoint"
    store_prompts(tmp_path / "model", instruction_template=None, prompts={"query": "q: "})
    plan = config(**one)
    assert plan.settings["instructions"] == "checkpoint"
    assert {task.type: task.instruction.query for task in plan.tasks if task.instruction.query} == {
        "Retrieval": "q: ",
        "Reranking": "q: ",
    }
    assert plan.key(plan.tasks[0])["query_prompt"] == plan.tasks[0].instruction.query
    assert config(**one, instructions="v2").settings["instructions"] == "v2"


def test_every_symmetric_row_of_v2_has_one_instruction_for_queries_and_documents():
    symmetric = [entry for entry in instruction_table("v2").values() if entry.document]
    assert len(symmetric) == 17  # 12 CQADupstack parts, Quora, SCIDOCS, and three rerankings
    assert all(entry.query == entry.document for entry in symmetric)


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    write_json(path, {"type:STS": "Compare", "a": {"query": "q", "document": "d"}})
    table = instruction_table(str(path))
    assert resolve_instruction(table, a_task("a", "Retrieval")) == Instruction("q", "d", "task")
    assert resolve_instruction(table, a_task("b", "STS")) == Instruction("Compare", "", "type")
    write_json(path, {"a": {"passage": "d"}})
    with pytest.raises(ValueError, match="a: expected a text or"):
        instruction_table(str(path))
    write_json(path, ["a"])
    with pytest.raises(ValueError, match="expected an object, found list"):
        instruction_table(str(path))
    with pytest.raises(
        ValueError, match=r"--instructions: gone\.json: expected a file, found none"
    ):
        instruction_table("gone.json")
    with pytest.raises(ValueError, match=r"official-v1.*did you mean official-v1"):
        instruction_table("official-v2")


def test_task_toml_instruction_and_symmetry(config, datasets):
    """A dataset's instruction wins, on documents too if it is symmetric; "none" adds none."""
    (datasets / "retrieval" / "task.toml").write_text('instruction = "Find it"\nsymmetric = true')
    (task,) = config(data=(datasets / "retrieval",)).tasks
    assert task.instruction == Instruction("Find it", "Find it", "task.toml")
    (task,) = config(data=(datasets / "retrieval",), instructions="none").tasks
    assert task.instruction.query == task.instruction.document == ""


def test_a_result_holds_for_its_settings_only(config):
    """Bug to avoid: a changed setting reusing an old score."""
    plan = config()
    for task in plan.tasks:
        finish(plan, task)
    assert all(plan.result(task) for task in plan.tasks)
    assert all(config().result(task) for task in plan.tasks)
    for change in (
        {"instructions": "none"},
        {"max_length": 16},
        {"dtype": "float32"},
        {"causal": False},
        {"pooling": "lasttoken"},
    ):
        other = config(**change)
        assert other.results != plan.results
        assert not any(other.result(task) for task in other.tasks), change


def test_the_folder_of_results_is_that_of_earlier_versions(config):
    """Bug to avoid: a different hash of the same settings, which would lose all earlier results."""
    plan = config()
    assert plan.results.name == f"{plan.checkpoint[:12]}-864b3a7a"
    assert plan.results.parent.name == "local__model"


def test_dimensions_are_present_or_not(config):
    """A result with more dimensions serves a run that asks for fewer, not the other way round."""
    plan = config(dims=(8, 32))
    assert plan.dims == ("32", "8")
    task = plan.tasks[0]
    finish(plan, task)
    assert config(dims=(8,)).result(task)
    assert config().result(task)  # 32 is the model's own
    assert not config(dims=(16, 8)).result(task)
    assert config(dims=(16, 8)).missing(task) == ["16"]
    assert config(dims=(16, 8), precision=("int8",)).missing(task) == ["16", "16 int8", "8 int8"]
    with pytest.raises(ValueError, match="--dims: 64 is more than the 32 dimensions of"):
        config(dims=(64,))


def test_a_result_holds_for_its_data_and_instruction_only(config, datasets):
    """Bug to avoid: the folder is named alike, the content is not."""
    rows = (datasets / "sts" / "test.jsonl").read_text()
    for file, content in (
        ("task.toml", 'instruction = "Other"'),
        ("test.jsonl", rows.replace("cat", "dog")),
    ):
        plan = config(data=(datasets / "sts",))
        finish(plan, plan.tasks[0])
        assert plan.result(plan.tasks[0])
        (datasets / "sts" / file).write_text(content)
        plan = config(data=(datasets / "sts",))
        assert not plan.result(plan.tasks[0])


def test_a_changed_weight_is_another_checkpoint(config, make_model, tmp_path):
    models = [tmp_path / "a" / "model", tmp_path / "b" / "model"]
    for seed, folder in enumerate(models):
        make_model(folder, seed=seed)
    plans = [config(model=(str(folder),)) for folder in models]
    assert plans[0].checkpoint != plans[1].checkpoint
    assert plans[0].results.parent == plans[1].results.parent  # the folders are named alike
    assert plans[0].results != plans[1].results
    (models[0] / "README.md").write_text("a new card")
    write_json(models[0] / "results" / "task.json", {"kept": "beside the weights"})
    assert config(model=(str(models[0]),)).checkpoint == plans[0].checkpoint


def test_an_adapter_is_a_checkpoint_of_its_own_over_its_base(config, make_model, tmp_path):
    """Promise: a LoRA folder can be evaluated; another adapter or another base is another model."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model(base, seed=0)
    embedder = Embedder.from_pretrained(base, device="cpu")
    embedder.adapter = Adapter(LoRAConfig(rank=2), str(base))
    add_adapter(embedder.model, embedder.adapter.config)
    adapter.mkdir()
    embedder.write_files(adapter, merged=False)
    plans = [config(model=(str(base),)), config(model=(str(adapter),))]
    assert plans[1].dims == plans[0].dims
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    plans.append(config(model=(str(adapter),)))
    make_model(base, seed=1)
    plans.append(config(model=(str(adapter),)))
    assert len({plan.checkpoint for plan in plans}) == 4
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "./gone"}')
    with pytest.raises(ValueError, match=r"\./gone: expected a model folder"):
        config(model=(str(adapter),))


@pytest.mark.parametrize("content", ["", '{"kalm_min": {"key"', "[]", "{}", '{"kalm_min": 3}'])
def test_a_torn_result_is_no_result(config, content):
    plan = config()
    task = plan.tasks[0]
    finish(plan, task)
    plan.result_path(task).write_text(content)
    assert plan.result(task) is None


@pytest.mark.parametrize("score", ["NaN", "Infinity", "1e999", '"0.5"', "true", "null", "[]"])
def test_a_score_that_is_no_number_is_no_result(config, score):
    """Bug to avoid: a mean over NaN or infinity."""
    plan = config()
    task = plan.tasks[0]
    finish(plan, task)
    path = plan.result_path(task)
    path.write_text(path.read_text().replace("0.5", score))
    assert plan.result(task) is None
    assert plan.missing(task) == ["32"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/ft/final", "local__ft"),
        ("runs/ft/checkpoints/step_10", "local__ft-step_10"),
        ("ft", "local__ft"),
        ("final", "local__*"),
    ],
)
def test_a_model_is_called_after_its_run(config, make_model, tmp_path, path, name):
    """Bug to avoid: every model being called local/final."""
    make_model(tmp_path / path)
    plan = config(model=(str(tmp_path / path),))
    assert plan.results.parent.match(name)
    assert "final" not in plan.results.parent.name
    finish(plan, plan.tasks[0])
    (tmp_path / path).rename(tmp_path / "moved")
    assert config(model=(str(tmp_path / "moved"),)).result(plan.tasks[0])


def test_a_task_without_network_is_told_at_once(mteb, config, monkeypatch, tmp_path):
    """Promise: one sentence that names --prefetch, before a worker starts."""
    import datasets
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    plan = config(data=(), tasks=("STS12",))
    with pytest.raises(ValueError, match=r"STS12: its dataset mteb/sts12-sts .* --prefetch"):
        check_hub([plan])
    (tmp_path / "mteb___sts12-sts").mkdir()
    check_hub([plan])
    check_hub([config()])


def test_longest_first(config):
    characters = [task.characters for task in config().tasks]
    assert characters == sorted(characters, reverse=True)


def test_shards_of_a_plan_are_the_same_plan(config):
    """Promise: every machine knows all tasks, and each task is run on one of them."""
    plans = [config(shard=f"{number}/3") for number in (1, 2, 3)]
    assert len({plan.tasks for plan in plans}) == 1
    own = [{task.name for task in plan.tasks} - plan.elsewhere for plan in plans]
    assert sorted(name for names in own for name in names) == sorted(
        task.name for task in plans[0].tasks
    )
    assert config().elsewhere == frozenset()


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=12), machines=st.integers(1, 5))
def test_machines_share_the_tasks_evenly(sizes, machines):
    """Promise: each task belongs to one machine, and no machine has far more than others."""
    tasks = [
        PlannedTask(f"t{i}", "STS", "m", "1", size, Instruction()) for i, size in enumerate(sizes)
    ]
    names = {task.name for task in tasks}
    shares = [names - tasks_elsewhere(tasks, f"{k + 1}/{machines}") for k in range(machines)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    totals = [sum(t.characters + 1 for t in tasks if t.name in share) for share in shares]
    assert max(totals) <= sum(totals) / machines + max(sizes) + 1


def test_characters_are_those_that_are_encoded():
    """Long texts count up to the limit, texts of a column once, sampled tasks by their sample."""
    column = {"total_text_length": 100_000, "average_text_length": 1000, "unique_texts": 50}
    part = {"documents_text_statistics": column, "num_documents": 100, "label_statistics": None}
    metadata = SimpleNamespace(descriptive_stats={"test": part, "train": part})
    task = SimpleNamespace(metadata=metadata, eval_splits=["test"], hf_subsets=["default"])
    assert task_size(task, 128) == (50 * 512, 50 * 512, 50)
    metadata.descriptive_stats = {"test": {"text_statistics": column}}
    task.max_document_to_embed = 10
    assert task_size(task, None) == (10 * 1000, 0, 0)


def test_what_cannot_be_run_is_said(config, tmp_path, monkeypatch, eight):
    with pytest.raises(ValueError, match="expected a model folder or a hub id"):
        config(model=("./nowhere",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected a model folder with config.json"):
        config(model=(str(tmp_path / "empty"),))
    with pytest.raises(ValueError, match="two tasks are called sts"):
        config(data=(eight, eight / "sts"))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        config(data=())
    with pytest.raises(ValueError, match="--devices: expected cpu, cuda:0"):
        config(devices=("gpu",))
    with pytest.raises(ValueError, match="--model: expected a model folder or a hub id"):
        config(model=())
    with pytest.raises(ValueError, match="--shard: expected k/n with k from 1 to n, found '3/2'"):
        config(shard="3/2")
    with pytest.raises(ValueError, match="--prefetch: expected --datasets, and --benchmark"):
        config(prefetch=True, datasets=tmp_path)
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape('pip install "kalm-min[eval]"')):
        config()


@pytest.mark.filterwarnings("ignore")
def test_an_official_benchmark(mteb, config):
    """Leaf tasks, sizes and subsets come from what mteb ships; nothing is downloaded."""
    plan = config(data=(), benchmark=("MTEB(eng, v1)",), tasks=("STS12", "TNews"))
    assert plan.benchmarks == ("MTEB(eng, v1)",)
    assert sum(task.aggregate == "CQADupstackRetrieval" for task in plan.tasks) == 12
    assert sum(task.aggregate == "" for task in plan.tasks) == 55 + 1
    assert len(plan.tasks) == 67 + 1  # STS12 is in the benchmark already
    assert plan.tasks[0].name == "MSMARCO"
    assert plan.tasks[0].splits == ("dev",)
    total = sum(task.characters for task in plan.tasks if task.name != "TNews")
    assert total == pytest.approx(15_877e6, rel=1e-3)  # 16,376 million less the duplicates
    by_name = {task.name: task for task in plan.tasks}
    assert by_name["STS17"].subsets == ("en-en",)
    assert all(task.instruction.origin == "task" for task in plan.tasks)
    for changes, hint in (
        ({"benchmark": ("MTEB(eng v1)",)}, r"MTEB\(eng, v1\)"),
        ({"tasks": ("STS21",)}, "STS22"),
        ({"tasks": ("sts12",)}, "did you mean STS12"),
    ):
        with pytest.raises(ValueError, match=hint):
            config(data=(), **changes)


@pytest.mark.filterwarnings("ignore")
def test_official_means_are_mtebs_and_never_partial(mteb, config):
    """The official mean counts an aggregate once and is refused while a task is missing."""
    from mteb.results import TaskResult

    plan = config(data=(), benchmark=("MTEB(eng, v1)",))
    leaves = {}
    for number, task in enumerate(plan.tasks):
        scores = {
            split: [
                {"main_score": number / 100, "hf_subset": subset, "languages": ["eng-Latn"]}
                for subset in task.subsets
            ]
            for split in task.splits
        }
        result = {"dataset_revision": "1", "task_name": task.name, "mteb_version": "2.20.0"}
        leaves[task.name] = result | {"scores": scores, "evaluation_time": 1.0}
    numbers = {task.name: number / 100 for number, task in enumerate(plan.tasks)}
    children = [task.name for task in plan.tasks if task.aggregate == "CQADupstackRetrieval"]
    mean = sum(numbers.pop(name) for name in children) / 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [TaskResult.from_dict(leaves[name]) for name in children]
        combined = mteb.get_task("CQADupstackRetrieval").combine_task_results(parts)
        assert combined.get_score() == pytest.approx(mean)  # the rule that the report assumes
        means = official_means("MTEB(eng, v1)", leaves)
        assert means["Mean(Task)"] == pytest.approx((sum(numbers.values()) + mean) / 56)
        scores = leaves["STS12"].pop("scores")
        with pytest.raises(ValueError, match="the result of STS12 is damaged"):
            official_means("MTEB(eng, v1)", leaves)
        leaves["STS12"]["scores"] = scores
        del leaves["STS12"]
        with pytest.raises(ValueError, match="1 of 67 tasks missing"):
            official_means("MTEB(eng, v1)", leaves)


def test_the_tables_are_data(tmp_path):
    """instructions.json is complete JSON that a person may read and copy."""
    tables = json.loads(planning._TABLES.read_text(encoding="utf-8"))
    assert list(tables) == ["official-v1", "v2", "none"]
    for table in tables.values():
        assert all(name.strip() == name for name in table)
