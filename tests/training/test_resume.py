"""What a run continues from, what it refuses, and what it stores: started within this process."""

import json
import random
import shutil
import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kalm_min import Embedder
from kalm_min.training.tracking import draw_curve
from tests.training.runs import log, same, start, weights

WORDS = ["cat", "dog", "bird", "house", "mat", "blue", "far", "see", "run", "sat"]


def write_pairs(path, count=20, **extra):
    """Pairs about numbered items, each line with `extra`."""
    rng = random.Random(path.stem)
    path.parent.mkdir(exist_ok=True)
    rows = [
        {"query": " ".join(rng.choices(WORDS, k=4)) + f" {i}", "pos": [f"a {i}"]} | extra
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    """Two tasks of 20 pairs, and held-out pairs."""
    for name in ("train/a", "train/b", "valid"):
        write_pairs(tmp_path / f"{name}.jsonl")
    return tmp_path / "train"


@pytest.fixture
def arguments(data, tiny_model_dir):
    """Six steps of eight queries, a checkpoint every two."""
    return [
        *("--model.path", tiny_model_dir, "--data.path", data, "--training.max-steps", 6),
        *("--sampling.batch-size", 8, "--training.epochs", 99, "--training.save-every", 2),
        *("--training.precision", "float32", "--optimizer.learning-rate", 0.01),
        *("--loss.temperature", 0.1),
    ]


def finish(arguments, output, *extra):
    """A run to the end; what it said."""
    code, said = start(arguments, output, *extra)
    assert code == 0, said
    return said


# ---- continuing ----------------------------------------------------------------------------------


DAMAGES = [
    lambda path: (path / "state.json").write_text("[" * 100_000),
    lambda path: (path / "state.json").write_text('{"step": 1000000000, "sampler": {}}'),
    lambda path: (path / "state.json").write_text('{"step": true, "sampler": []}'),
    lambda path: (path / "state.json").unlink(),
    lambda path: (path / "state.json").write_text('{"step": 6, "sampler": {}, "prompts": [1, 2]}'),
    lambda path: (path / "optimizer.safetensors").write_bytes(b"torn"),
    lambda path: (path / "model.safetensors").unlink(),
    lambda path: (path / "config.json").write_text("{}"),
]


def test_a_damaged_checkpoint_is_passed_over(arguments, tmp_path):
    """The run goes on from the newest whole one, names the folder, and ends like the unbroken run."""
    output = tmp_path / "run"
    finish(arguments, output)
    lines, trained = log(output), weights(output)
    newest = output / "checkpoints" / "step_00000006"
    newest.with_name("step_notes.txt").touch()
    newest.with_name("step_7").mkdir()
    for damage in DAMAGES:
        damage(newest)
        said = finish(arguments, output)
        assert f"delete the folder {newest}\n" in said
        assert "resuming from step 4" in said
        assert log(output) == lines
        assert same(weights(output), trained)
    assert "delete" not in finish(arguments, output)  # it was written anew


def test_without_a_whole_checkpoint_a_run_does_not_start_over(arguments, tmp_path):
    """One sentence that says what to delete; also for a step beyond the end, and damaged settings."""
    output = tmp_path / "run"
    finish(arguments, output, "--training.keep-checkpoints", 1)
    (path,) = (output / "checkpoints").iterdir()
    path.rename(path.with_name("step_1000000000"))
    state = path.with_name("step_1000000000") / "state.json"
    state.write_text(state.read_text().replace('"step": 6', '"step": 1000000000', 1))
    code, said = start(arguments, output, "--training.keep-checkpoints", 1)
    assert code == 2
    assert "step_1000000000: cannot resume: expected a step of at most 6, the length of" in said
    state.write_text("{}")
    code, said = start(arguments, output, "--training.keep-checkpoints", 1)
    assert code == 2
    assert "checkpoints: expected a whole checkpoint, found none" in said
    assert said.endswith("delete the folder to start over\n")


def test_without_its_settings_a_run_does_not_resume(arguments, tmp_path):
    """Other ones could not be told from those it began with."""
    output = tmp_path / "run"
    finish(arguments, output)
    (output / "config.toml").unlink()
    code, said = start(arguments, output)
    assert code == 2
    assert f"{output / 'config.toml'}: " in said


def swap_words(data):
    path = data / "b.jsonl"
    path.write_text(path.read_text().replace("a 1", "a 2"))


def swap_weights(base):
    tensors = load_file(base / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"] * np.float32(1.01)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


OTHER_CONTENT = [
    (lambda folder: swap_words(folder / "train"), "--data.path"),
    (lambda folder: (folder / "train" / "a.toml").write_text("symmetric = true"), "--data.path"),
    (lambda folder: write_pairs(folder / "valid.jsonl", group="x"), "--data.validation"),
    (lambda folder: swap_weights(folder / "base"), "--model.path"),
]


def test_other_content_under_the_same_name_is_not_resumed(arguments, tmp_path, tiny_model_dir):
    """Lines, task settings, held-out pairs and an adapter's base are known by what they hold."""
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    given = [*arguments, "--model.path", tmp_path / "base", "--lora.rank", 2]
    given = [*given[2:], "--data.validation", tmp_path / "valid.jsonl"]
    output = tmp_path / "run"
    finish(given, output)
    for change, name in OTHER_CONTENT:
        shutil.copytree(tmp_path, saved := tmp_path.with_name(f"{tmp_path.name} saved"))
        change(tmp_path)
        code, said = start(given, output)
        assert code == 2
        assert f"step_00000006: cannot resume: expected {name} to hold what it held" in said
        shutil.rmtree(tmp_path)
        saved.rename(tmp_path)
    finish(given, output)  # with everything as it was


def test_a_folder_removed_in_mid_run_is_an_error(arguments, tmp_path, monkeypatch):
    """Never exit code 0 without log and settings."""
    from kalm_min import train

    output = tmp_path / "run"
    show = train.show

    def removing(progress, line, *more):
        if line["step"] == 3:
            shutil.rmtree(output)
        show(progress, line, *more)

    monkeypatch.setattr(train, "show", removing)
    code, said = start(arguments, output)
    assert code == 1
    assert f"{output / 'log.jsonl'}: expected the log of this run, found it removed" in said
    assert not (output / "final").exists()


# ---- what fits -----------------------------------------------------------------------------------


def test_batch_and_slices_are_fitted_to_data_and_model(arguments, tmp_path):
    """40 pairs and the default batch, slices wider than the model: one line each, and it trains."""
    extra = ("--sampling.batch-size", 512, "--loss.matryoshka-dims", 8, 896, 64)
    extra += ("--loss.matryoshka-weights", 0.3, 1, 0.5)
    said = finish(arguments, tmp_path / "run", *extra)
    assert "an epoch has 40 examples: the batch is lowered from 512 to 40 queries" in said
    assert "--loss.matryoshka-dims 64 896: dropped, since the model has 32 dimensions" in said
    same_run = ("--sampling.batch-size", 40, "--loss.matryoshka-dims", 32, 8)
    finish(arguments, tmp_path / "named", *same_run, "--loss.matryoshka-weights", 1, 0.3)
    assert log(tmp_path / "run") == log(tmp_path / "named")
    assert "resuming from step 6" in finish(arguments, tmp_path / "run", *extra)


def test_a_run_that_stops_early_is_the_same_however_it_is_interrupted(arguments, tmp_path):
    """--training.patience: after two validations without a better MRR, resumed or not."""
    extra = ("--data.validation", tmp_path / "valid.jsonl", "--training.patience", 2)
    extra += ("--training.validate-every", 1, "--training.max-steps", 30)
    extra += ("--optimizer.learning-rate", 3.0, "--training.keep-checkpoints", 99)
    output = tmp_path / "run"
    said = finish(arguments, output, *extra)
    assert "no better MRR in 2 validations" in said
    lines, trained = log(output), weights(output)
    scores = [line["validation"]["mrr"] for line in lines if "validation" in line]
    assert scores.index(max(scores)) == len(scores) - 3
    for kept in (len(lines), 2):  # killed before the final model, and at step 2
        shutil.rmtree(output / "final")
        for path in (output / "checkpoints").iterdir():
            if int(path.name[5:]) > kept:
                shutil.rmtree(path)
        finish(arguments, output, *extra)
        assert log(output) == lines
        assert same(weights(output), trained)


# ---- prompts -------------------------------------------------------------------------------------


def prompts_of(output):
    return Embedder.from_pretrained(output / "final", dtype="float32").prompts


def test_the_instruction_of_a_run_becomes_the_query_prompt(arguments, data, tmp_path):
    """With the template; documents get it only where every task is symmetric; a flag overrides it."""
    prompt = "Instruct: find it \n Query: "
    extra = ("--data.instruction", "find it")
    said = finish(arguments, tmp_path / "one", *extra)
    assert prompts_of(tmp_path / "one") == {"query": prompt, "document": ""}
    assert f"encode_query puts {prompt!r} before texts, encode_document no prompt" in said
    for task in ("a", "b"):
        (data / f"{task}.toml").write_text('symmetric = true\ninstruction = "find it"\n')
    finish(arguments, tmp_path / "symmetric")
    assert prompts_of(tmp_path / "symmetric") == {"query": prompt, "document": prompt}
    finish(arguments, tmp_path / "flag", "--model.query-prompt", "q: ")
    assert prompts_of(tmp_path / "flag") == {"query": "q: ", "document": prompt}


def test_several_instructions_are_stored_by_task(arguments, data, tmp_path):
    """Tasks by name, the run's default as that of queries; also in a checkpoint that is resumed."""
    (data / "a.toml").write_text('instruction = "sort"\n')
    write_pairs(data / "c.jsonl")
    (data / "c.toml").write_text("weight = 0\n")
    extra = ("--data.instruction", "find it", "--model.instruction-template", "{instruction}: ")
    output = tmp_path / "run"
    said = finish(arguments, output, *extra)
    expected = {"query": "find it: ", "document": "", "a": "sort: ", "b": "find it: "}
    assert prompts_of(output) == expected
    assert "by prompt_name: 'a', 'b'" in said
    shutil.rmtree(output / "checkpoints" / "step_00000006")
    trained = weights(output)
    finish(arguments, output, *extra)
    assert prompts_of(output) == expected
    assert same(weights(output), trained)


def test_texts_without_an_instruction_get_the_prompts_of_the_checkpoint(
    arguments, make_model, tmp_path
):
    """As encode_query and encode_document would, in training, in validation, and after a resume."""
    prompted = make_model(tmp_path / "prompted")
    prompted.prompts = {"query": "ask: ", "document": "say: "}
    prompted.save_pretrained(tmp_path / "prompted")
    for name in ("train/a", "train/b", "valid"):
        rows = [json.loads(s) for s in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        rows = [{"query": f"ask: {r['query']}", "pos": [f"say: {r['pos'][0]}"]} for r in rows]
        path = tmp_path / "written" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = ["--model.path", tmp_path / "prompted", *arguments[2:]]
    finish(stored, tmp_path / "stored", "--data.validation", tmp_path / "valid.jsonl")
    written = ("--data.path", tmp_path / "written" / "train")
    written += ("--data.validation", tmp_path / "written" / "valid.jsonl")
    finish(arguments, tmp_path / "given", *written)
    assert log(tmp_path / "stored") == log(tmp_path / "given")
    assert prompts_of(tmp_path / "stored") == {"query": "ask: ", "document": "say: "}


# ---- the log -------------------------------------------------------------------------------------


def test_the_log_is_shown_where_it_is_asked_for(arguments, tmp_path, monkeypatch):
    """TensorBoard's writer gets every number, from the step of the resume on; no package, no run."""
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            seen.append((name, step, value))

        def flush(self):
            pass

    extra = ("--training.log-to", "tensorboard", "--data.validation", tmp_path / "valid.jsonl")
    if not find_spec("tensorboard"):
        code, said = start(arguments, tmp_path / "refused", *extra)
        assert code == 2
        assert "--training.log-to: expected the package tensorboard, found none" in said
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("kalm_min.train.find_spec", lambda name: True)
    output = tmp_path / "run"
    finish(arguments, output, *extra)
    assert seen[0] == (output / "tensorboard", 1)
    assert [step for name, step, _ in seen[1:] if name == "loss"] == [1, 2, 3, 4, 5, 6]
    assert {("loss", line["step"], line["loss"]) for line in log(output) if "loss" in line} < {
        *seen
    }
    assert any(name == "validation/mrr" for name, *_ in seen[1:])


def test_a_curve_is_drawn_of_losses_and_scores(tmp_path):
    """curve.png, where matplotlib is there; steps that were skipped have no loss."""
    pytest.importorskip("matplotlib")
    lines = [{"step": 1, "loss": 0.3}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.1}]
    for more in ([], [{"step": 3, "validation": {"mrr": 0.5}}]):
        text = "".join(json.dumps(line) + "\n" for line in lines + more)
        (tmp_path / "log.jsonl").write_text(text)
        draw_curve(tmp_path)
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_in_which_nothing_can_be_learned_is_named(arguments, data, tmp_path):
    """No query has a negative: the loss is zero, which a low number in a log would not tell."""
    (data / "b.toml").write_text("in_batch_negatives = false\n")
    said = finish(arguments, tmp_path / "run")
    assert said.count("no query of task b has a negative") == 1
