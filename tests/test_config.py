"""kalm_min.config: dataclass <- TOML <- flags, and one sentence for every mistake."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min.config import parse, to_toml
from kalm_min.config import run as run_command


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the examples are."""

    path: Annotated[Path, "File or folder of examples; 100% of it is read."]
    cache_dir: Annotated[Path | None, "Index folder."] = None
    rank_range: Annotated[tuple[int, int], "First and last rank."] = (50, 100)

    def __post_init__(self) -> None:
        if self.rank_range[0] >= self.rank_range[1]:
            raise ValueError(f"rank_range: expected low < high, found {self.rank_range}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    temperature: Annotated[float, "Divides the cosines."] = 0.02
    dims: tuple[int, ...] = (896, 512)
    limit: int | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    data: DataConfig
    loss: LossConfig = field(default_factory=lambda: LossConfig(temperature=0.05))
    output: Annotated[Path, "Folder to write."] = Path("runs/x")
    dtype: Literal["float32", "bfloat16"] | None = None
    level: Literal[1, 2] = 1
    resume: bool = False
    seed: int = 0
    title: str = "a run"


def run(*argv: str) -> RunConfig:
    return parse(RunConfig, list(argv), program="train.py", description="Trains 100% of it.")


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence `argv` is refused with."""
    with pytest.raises(SystemExit) as error:
        run(*argv)
    captured = capsys.readouterr()
    assert error.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("train.py: ").rstrip("\n")


def test_defaults_then_file_then_flags(tmp_path):
    """A flag wins over the file, the file over the default, a section's default instance over its
    class's defaults."""
    file = tmp_path / "run.toml"
    file.write_text('seed = 7\ntitle = "t"\n[data]\npath = "a"\n[loss]\ndims = [64]\n')
    config = run(str(file), "--seed", "8", "--data.rank-range", "3", "9")
    assert config == RunConfig(
        data=DataConfig(path=Path("a"), rank_range=(3, 9)),
        loss=LossConfig(temperature=0.05, dims=(64,)),
        seed=8,
        title="t",
    )


@pytest.mark.parametrize("flag", ["--data.rank-range", "--data.rank_range"])
def test_dashes_and_underscores(flag):
    """Both spellings of a flag are the same flag; values keep their underscores."""
    config = run("--data.path=a_b", flag, "1", "2", "--title=c_d")
    assert config.data == DataConfig(path=Path("a_b"), rank_range=(1, 2))
    assert config.title == "c_d"


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--resume"], "resume", True),
        (["--resume", "false"], "resume", False),
        (["--resume=True"], "resume", True),
        (["--dtype", "none"], "dtype", None),
        (["--dtype", "None"], "dtype", None),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--dtype", "bf16"], "dtype", "bfloat16"),  # the short name of the same choice
        (["--level", "2"], "level", 2),
        (["--seed", "-3"], "seed", -3),
        (["--title", "two words"], "title", "two words"),
    ],
)
def test_flag_types(words, name, expected):
    """Each supported annotation reads what a person would type."""
    assert getattr(run("--data.path", "p", *words), name) == expected


def test_sequences_from_flags():
    """A list takes one or more words, a tuple of fixed length that many."""
    config = run("--data.path", "p", "--loss.dims", "3", "2", "--loss.names", "a", "--seed", "1")
    assert (config.loss.dims, config.loss.names, config.seed) == ((3, 2), ("a",), 1)
    assert run("--data.path", "p", "--loss.dims", "--seed", "1").loss.dims == ()
    assert run("--data.path", "p", "--data.rank-range", "1", "2").data.rank_range == (1, 2)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "--data.path must be given (--help tells more)"),
        (["--data.pth", "x"], "unknown flag --data.pth (did you mean --data.path?)"),
        (["--temperature=1"], "unknown flag --temperature (did you mean --loss.temperature?)"),
        (["--xyzzy"], "unknown flag --xyzzy (--help lists them all)"),
        (["--seed", "1.5"], "--seed: expected an integer, found '1.5'"),
        (["--loss.temperature", "nan"], "--loss.temperature: expected a number, found 'nan'"),
        (["--dtype", "fp8"], "--dtype: expected float32 or bfloat16 or none, found 'fp8'"),
        (["--resume", "maybe"], "--resume: expected true or false, found 'maybe'"),
        (["--data.path", ""], "--data.path: expected a path, found ''"),
        (
            ["--loss.dims", "4", "x"],
            "--loss.dims: expected a list, each an integer, found ['4', 'x']",
        ),
        (["--data.rank-range", "4"], "--data.rank-range: expected 2 arguments"),
        (["--loss.limit", "x"], "--loss.limit: expected an integer or none, found 'x'"),
        (["--seed"], "--seed: expected one argument"),
        (["--seed", "1", "--seed=2"], "--seed: expected once, found it twice"),
        (["--seed", "1", "x.toml"], "expected a flag, found 'x.toml' (a TOML file comes first)"),
        (["x"], "expected a .toml file, the name of a recipe or a flag, found 'x'"),
        (
            ["v2_finetun"],
            "expected a .toml file, the name of a recipe or a flag, found 'v2_finetun' (did you mean v2_finetune?)",
        ),
        (["no.toml"], "no.toml: No such file or directory"),
        (
            ["--data.path", "p", "--data.rank-range", "9", "3"],
            "--data.rank-range: expected low < high, found (9, 3)",
        ),
    ],
)
def test_mistakes_in_flags(capsys, argv, sentence):
    """Every mistake is one sentence on stderr and exit code 2, never a traceback."""
    assert fails(capsys, *argv) == sentence


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("[data]\npth = 'x'", ": unknown key [data] pth (did you mean [data] path?)"),
        ("temperature = 1", ": unknown key temperature (did you mean [loss] temperature?)"),
        ("[optim]\nlr = 1", ": unknown key [optim] lr (--help lists them all)"),
        ("[data]\npath = 3", ": [data] path: expected a path, found 3"),
        ("data = 3", ": unknown key data (--help lists them all)"),
        ("seed = true", ": seed: expected an integer, found True"),
        ("level = true", ": level: expected 1 or 2, found True"),
        ("level = [1]", ": level: expected 1 or 2, found [1]"),
        ("resume = 1", ": resume: expected true or false, found 1"),
        ("[loss]\ndims = 3", ": [loss] dims: expected a list, each an integer, found 3"),
        ("[loss]\ntemperature = 'x'", ": [loss] temperature: expected a number, found 'x'"),
        (
            "[data]\nrank_range = [1]",
            ": [data] rank_range: expected 2 values, each an integer, found [1]",
        ),
        ("[seed]\nx = 1", ": unknown key [seed] x (did you mean seed?)"),
    ],
)
def test_mistakes_in_a_file(capsys, tmp_path, toml, sentence):
    """A mistake in a TOML file names the file, the section and the key."""
    file = tmp_path / "run.toml"
    file.write_text(toml)
    assert fails(capsys, str(file)) == f"{file}{sentence}"


def test_broken_toml_names_the_line(capsys, tmp_path):
    """A file that is not TOML, or not UTF-8, is refused with file and line."""
    file = tmp_path / "run.toml"
    file.write_text("seed = 1\n[data\n")
    sentence = fails(capsys, str(file))
    assert sentence.startswith(f"{file}:2: expected TOML, found ")
    file.write_bytes(b"title = '\xff'")
    assert fails(capsys, str(file)).startswith(f"{file}: expected UTF-8 text")


def test_help(capsys):
    """--help groups by section, tells every field's sentence and its default, and exits with 0."""
    with pytest.raises(SystemExit) as error:
        run("--help")
    assert error.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: train.py [FILE.toml] [--NAME VALUE ...]" in text
    assert "[data] Where the examples are:" in text
    assert "--data.path PATH File or folder of examples; 100% of it is read. (required)" in text
    assert "--data.rank-range INT INT First and last rank. (default: 50 100)" in text
    assert "--loss.temperature NUMBER Divides the cosines. (default: 0.05)" in text
    assert "--output PATH Folder to write. (default: runs/x)" in text
    assert "--title TEXT (default: a run)" in text
    assert "--loss.names [TEXT ...] (default: nothing)" in text


def test_an_inherited_field_keeps_its_help(capsys):
    """The help of a field belongs to its annotation, wherever the field is declared."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Child(LossConfig):
        more: Annotated[int, "One more."] = 1

    with pytest.raises(SystemExit):
        parse(Child, ["-h"], program="p", description="")
    text = " ".join(capsys.readouterr().out.split())
    assert "Divides the cosines." in text
    assert "One more. (default: 1)" in text


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
PATHS = st.text("ab/._ é", min_size=1).map(Path)


@given(
    config=st.builds(
        RunConfig,
        data=st.builds(DataConfig, path=PATHS, cache_dir=st.none() | PATHS),
        loss=st.builds(
            LossConfig,
            temperature=st.floats(allow_nan=False),
            dims=st.lists(st.integers()).map(tuple),
            limit=st.none() | st.integers(),
            names=st.lists(TEXTS).map(tuple),
        ),
        dtype=st.sampled_from([None, "float32", "bfloat16"]),
        level=st.sampled_from([1, 2]),
        resume=st.booleans(),
        seed=st.integers(),
        title=TEXTS,
    )
)
def test_to_toml_reads_back_equal(tmp_path_factory, config):
    """The configuration written with a run reads back as that of the run."""
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8", newline="")
    assert run(str(file)) == config


def act(error: BaseException | None = None, *argv: str, **options: object) -> int:
    """The exit code of a command that ends with `error`."""

    def action(config: RunConfig) -> int:
        if error is not None:
            raise error
        return config.seed

    words = ["--data.path", "p", *argv]
    return run_command(RunConfig, action, words, program="p", description="d", **options)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("x: expected a, found b"), 2, "p: x: expected a, found b\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "p: x: No such file\n"),
        (
            OSError(28, "No space left on device"),
            1,
            "p: runs/x: No space left on device; what was written is kept, the same command continues\n",
        ),
        (
            KeyboardInterrupt(),
            130,
            "interrupted; what was written is kept, the same command continues\n",
        ),
    ],
)
def test_what_a_person_can_mend_is_one_sentence(capsys, monkeypatch, error, code, sentence):
    """A wrong request is 2, a failure of the machine 1, Ctrl-C 130; never a traceback."""
    assert act(error, resumable=True) == code
    assert capsys.readouterr().err == sentence
    assert act(error) == code
    assert "continues" not in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    act(error)
    assert bool(capsys.readouterr().err) == (code == 1)


def test_an_error_of_the_program_is_not_hidden():
    """An error that no other request can correct keeps its traceback; success passes through."""
    with pytest.raises(ZeroDivisionError):
        act(ZeroDivisionError())
    assert act(None, "--seed", "3") == 3


def test_the_first_setting_may_stand_without_its_flag(tmp_path):
    """One word or several, unless a TOML file or a flag comes first."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Command:
        inputs: tuple[str, ...]
        output: str = "o"

    def inputs(*argv: str) -> tuple[str, ...]:
        options = {"program": "p", "description": "d", "positional": "inputs"}
        return parse(Command, list(argv), **options).inputs

    (tmp_path / "run.toml").write_text("inputs = ['c']")
    assert inputs("a", "b", "--output", "x") == ("a", "b")
    assert inputs("--output", "x", "--inputs", "a") == ("a",)
    assert inputs(str(tmp_path / "run.toml")) == ("c",)


def test_to_toml_keeps_infinity_and_defaults(tmp_path):
    """Resolved means every setting is written, the untouched ones too."""
    text = to_toml(
        RunConfig(data=DataConfig(path=Path("p")), loss=LossConfig(temperature=math.inf))
    )
    assert text.startswith('output = "runs/x"\ndtype = "none"\n')
    assert "temperature = inf\n" in text
