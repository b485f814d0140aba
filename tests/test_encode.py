"""The encode command: one row per line, and one sentence for what is wrong."""

import gzip
import json
import re
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_min import Embedder
from kalm_min.encode import main, read_texts
from kalm_min.model import Qwen2, quantize


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


@given(
    st.lists(st.text("a \r\x0b\x0c\x1c\u2028\x85\ufeff"), min_size=1, max_size=5),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_text_i_is_line_i(tmp_path_factory, lines, end, bom, is_json):
    """Only LF and CRLF end a line; a byte order mark is no text; blank lines count in each format."""
    texts = [line.rstrip("\r") for line in lines]
    lines = [json.dumps({"text": x}) if x and is_json else x * (not is_json) for x in texts]
    path = tmp_path_factory.getbasetemp() / ("lines.jsonl" if is_json else "lines.txt")
    path.write_bytes(("\ufeff" * bom + "".join(line + end for line in lines)).encode())
    expected = (
        texts if is_json or not texts[0].startswith("\ufeff") or bom else [texts[0][1:], *texts[1:]]
    )
    assert read_texts(path) == expected


def test_tables_and_pipes(tiny_model_dir, tmp_path):
    """A column of a table, quotes and newlines in cells included, another key of a .jsonl, and
    lines from standard input."""
    table = 'id,text,other\n1,"the cat, ""mat""\nsat",x\n2,,y\n3,dog,z\n'
    (tmp_path / "a.csv").write_text("\ufeff" + table)
    assert read_texts(tmp_path / "a.csv") == ['the cat, "mat"\nsat', "", "dog"]
    with gzip.open(tmp_path / "a.tsv.gz", "wt") as file:
        file.write("one\ttwo\r\na\tb\r\n")
    assert read_texts(tmp_path / "a.tsv.gz", "two") == ["b"]
    (tmp_path / "a.jsonl").write_text('{"two": "c"}\n')
    assert read_texts(tmp_path / "a.jsonl", "two") == ["c"]
    command = [sys.executable, "-m", "kalm_min.encode", "-", "--model", str(tiny_model_dir)]
    command += ["--output", str(tmp_path / "v.npy"), "--dtype", "float32"]
    subprocess.run(command, input="the cat\n\ndog\n", text=True, check=True, capture_output=True)
    expected = Embedder.from_pretrained(tiny_model_dir, dtype="float32").encode(
        ["the cat", "", "dog"]
    )
    assert np.array_equal(np.load(tmp_path / "v.npy"), expected)


def test_fewer_bits(tiny_model_dir, tmp_path):
    """The precision of the output, with ranges of the output or of another file's vectors."""
    full = run(tmp_path, tiny_model_dir, b"the cat\na dog\nfar\n")[1]
    np.save(tmp_path / "known.npy", full)
    for extra, expected in (
        (("int8",), quantize(full[:2], "int8")),
        (("uint8", "--ranges", str(tmp_path / "known.npy")), quantize(full[:2], "uint8", full)),
        (("binary",), quantize(full[:2], "binary")),
    ):
        code, found = run(tmp_path, tiny_model_dir, b"the cat\na dog\n", "--precision", *extra)
        assert code == 0
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


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
        (b'[{"text": "a"}]', "t.jsonl", "found one JSON array; write one object per line"),
        (b"a,b\n1,2\n", "t.csv", "expected the column 'text', found a, b; name the one"),
        (b'"a\nb",c\n1,2\n', "t.csv", "expected the column 'text', found 'a\\nb', c; name the one"),
        (b'{"text": "a"}\n\x1f\n', "t.jsonl", "t.jsonl:2: expected a JSON object, found Expecting"),
        (b"text,b\n1,2\n3\n", "t.csv", "t.csv:3: expected 2 cells, found 1"),
        (b'text,b\n1,"2\n', "t.csv", "t.csv:2: expected a table, found: unexpected end of data"),
        ("é\n".encode("utf-16"), "t.csv", "expected UTF-8 text, found UTF-16"),
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


def test_a_wrong_number_is_not_a_default(tiny_model_dir, tmp_path, capsys):
    """0 is a number, not the absence of one; and an interrupt ends without a traceback."""
    for flag, message in (
        ("--max-length", "max_length: expected at least 1 token, found 0"),
        ("--truncate-dim", "truncate_dim: expected 1 to 32, found 0"),
        ("--device", "device: expected cpu.*, found '0'"),
    ):
        assert run(tmp_path, tiny_model_dir, b"a\n", flag, "0")[0] == 2
        assert re.search(message, capsys.readouterr().err)


def test_an_interrupt_while_encoding(tiny_model_dir, tmp_path, capsys, monkeypatch):
    """Ctrl-C: exit code 130, one line, no file."""
    monkeypatch.setattr(Qwen2, "forward", Mock(side_effect=KeyboardInterrupt))
    assert run(tmp_path, tiny_model_dir, b"a\n") == (130, None)
    assert capsys.readouterr().err == "interrupted\n"


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
