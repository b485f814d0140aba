"""The encode command: one row per line, and one sentence for what is wrong."""

import json

import numpy as np
import pytest

from kalm_min import Embedder
from kalm_min.encode import main


def run(tmp_path, model, content, *extra, name="texts.txt"):
    source = tmp_path / name
    source.write_bytes(content)
    output = tmp_path / "vectors.npy"
    code = main(
        [str(source), "--model", str(model), "--output", str(output), "--dtype", "float32", *extra]
    )
    return code, np.load(output) if output.exists() else None


def test_one_row_per_line(tiny_model_dir, tmp_path):
    """CRLF, a missing final newline and blank lines keep the rows aligned."""
    code, vectors = run(tmp_path, tiny_model_dir, "the cat\r\n\nyou 你好".encode())
    assert code == 0
    expected = Embedder.from_pretrained(tiny_model_dir, dtype="float32").encode(
        ["the cat", "", "you 你好"]
    )
    assert np.array_equal(vectors, expected)


def test_options_reach_the_model(tiny_model_dir, tmp_path):
    """JSONL input, prompt, truncation and raw length."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("a", "b"))
    extra = ("--prompt", "see ", "--truncate-dim", "8", "--normalize", "false")
    code, vectors = run(tmp_path, tiny_model_dir, lines.encode(), *extra, name="t.jsonl")
    model = Embedder.from_pretrained(tiny_model_dir, dtype="float32")
    assert code == 0
    assert np.array_equal(vectors, model.encode(["a", "b"], "see ", 8, normalize_embeddings=False))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "texts.txt", "expected at least one text, found none"),
        (b"fine\n\xff\n", "texts.txt", "texts.txt:2: expected UTF-8"),
        (
            b'{"text": "a"}\n{"body": "b"}\n',
            "t.jsonl",
            "t.jsonl:2: expected 'text' to be a string, found nothing",
        ),
        (b'{"text": "a"}\n{"te', "t.jsonl", "t.jsonl:2: expected a JSON object"),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(
    tiny_model_dir, tmp_path, capsys, content, name, message
):
    """file:line, exit code 2, nothing written."""
    code, vectors = run(tmp_path, tiny_model_dir, content, name=name)
    assert code == 2
    assert vectors is None
    assert message in capsys.readouterr().err


def test_a_wrong_model_or_output(tiny_model_dir, tmp_path, capsys):
    """A model or an input that does not exist, and an output that is not .npy."""
    absent = str(tmp_path / "absent.txt")
    assert main([absent, "--model", str(tiny_model_dir), "--output", str(tmp_path / "v.npy")]) == 2
    assert capsys.readouterr().err == f"kalm_min.encode: {absent}: No such file or directory\n"
    assert run(tmp_path, tmp_path / "nowhere", b"a\n") == (2, None)
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["x.txt", "--model", "m", "--output", "v.txt"])
    assert stop.value.code == 2
    assert "expected a name that ends in .npy" in capsys.readouterr().err
