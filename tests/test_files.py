"""kalm_min.files: complete or absent, and errors that name the file and the line."""

import gzip
import os
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kalm_min import files


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    """A failure leaves the old file and nothing beside it; the umask sets the permissions."""
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "old\r\n")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path, "w") as file:  # noqa: PT012
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old\r\n"
    assert list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_keeps_what_else_stands_in_it(tmp_path):
    """A new folder appears at once; into an existing one its files are moved."""
    path = tmp_path / "model"
    for text in ("1", "2"):
        with files.atomic_directory(path) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "a").write_text(text)
        (path / "results").touch()
    with pytest.raises(OSError, match="full"), files.atomic_directory(path) as folder:  # noqa: PT012
        (folder / "sub").mkdir()
        raise OSError("full")
    assert (path / "sub" / "a").read_text() == "2"
    assert sorted(entry.name for entry in path.iterdir()) == ["results", "sub"]
    assert list(tmp_path.iterdir()) == [path]


LINES = ['{"a": "x\u2028y"}', "", "[1]", '{"a": 1}', '{"a":', '{"a": "\0"}']


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_jsonl(tmp_path, suffix):
    """Only a newline ends a line, blank lines count; one bad line stops, or is one problem of many."""
    path = tmp_path / f"t.{suffix}"
    data = "\n".join(LINES).encode() + b"\n\xff\n"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    problems = []
    assert list(files.read_jsonl(path, problems)) == [(1, {"a": "x\u2028y"}), (4, {"a": 1})]
    assert [problem.removeprefix(f"{path}:") for problem in problems] == [
        "3: expected a JSON object, found list",
        "5: expected a JSON object, found Expecting value: column 6 (char 5)",
        "6: expected a JSON object, found a NUL byte",
        "7: expected UTF-8 text, found invalid start byte (Latin-1?); save the file as UTF-8",
    ]
    with pytest.raises(ValueError, match=r"t\.jsonl.*:3: expected a JSON object, found list"):
        list(files.read_jsonl(path))


def test_a_torn_gzip_file(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match="expected a complete gzip file, found: "):
        list(files.read_jsonl(path))


DEEP = 100_000
READERS = {
    "json": files.read_json,
    "toml": files.read_toml,
    "jsonl": lambda path: list(files.read_jsonl(path)),
    "txt": files.read_lines,
}


@pytest.mark.parametrize(
    ("kind", "content", "sentence"),
    [
        ("json", b'{"a": 1,\n}', ":2: expected JSON, found "),
        ("json", b"\xff", ": expected UTF-8 text, found invalid start byte"),
        ("json", b"[" * DEEP, ": expected JSON, found maximum recursion depth exceeded"),
        ("json", b"[" * 101 + b"]" * 101, ": expected JSON, found more than 100 nested levels"),
        ("json", b'{"a": ' + b"9" * 5000 + b"}", ": expected JSON, found Exceeds the limit"),
        ("json", b'{"b": {"a": 1, "a": 1}}', ": expected JSON, found the key 'a' twice in one object"),
        ("json", b"", ": expected JSON, found "),
        ("toml", b"a = 1\nb\n", ":2: expected TOML, found "),
        ("toml", b"\xff", ": expected UTF-8 text, found invalid start byte"),
        ("toml", b"a = 1\na = 2\n", ":2: expected TOML, found Cannot overwrite a value"),
        ("toml", b"a = " + b"[" * DEEP, ": expected TOML, found maximum recursion depth exceeded"),
        ("toml", b"a." * DEEP + b"a = 1", ": expected TOML, found a key of more than 100 parts"),
        ("toml", b"[" + b"a . " * DEEP + b"a]", ": expected TOML, found a key of more than 100 parts"),
        ("toml", b"[" + b"a." * 60 + b"a]\n" + b"a." * 60 + b"a=1", ": expected TOML, found more than 100 nested"),
        ("json", b"{" + b'"x": 0,' * DEEP + b'"x": 0}', ": expected JSON, found the key 'x' twice"),
        ("toml", b"a = " + b"9" * 5000, ": expected TOML, found Exceeds the limit"),
        ("jsonl", b'{"a": 1}\n{"a": 1, "a": 2}', ":2: expected a JSON object, found the key 'a' twice"),
        ("jsonl", b'\n[\n{"a": 1},\n{"a": 2}\n]', ": expected a JSON object in each line, found one JSON array; write one object per line"),
        ("jsonl", b'[{"a": 1}, {"a": 2}]', ": expected a JSON object in each line, found one JSON array; write one object per line"),
        ("jsonl", b'{\n"a": 1\n}\n', ": expected a JSON object in each line, found an object over many lines"),
        ("jsonl", b'{"a": 1}\n{"a": ' + b"[" * DEEP, ":2: expected a JSON object, found maximum recursion"),
        ("jsonl", '{"a": "é"}\n'.encode("latin-1"), ":1: expected UTF-8 text, found invalid continuation byte (Latin-1?)"),
        ("jsonl", b"\xef\xbb\xbf{}\n\xef\xbb\xbf{}", ":2: expected a JSON object, found Unexpected UTF-8 BOM"),
        ("txt", "a\né\n".encode("latin-1"), ":2: expected UTF-8 text, found invalid continuation byte (Latin-1?)"),
        ("txt", "a\nb".encode("utf-16-le"), ":1: expected UTF-8 text, found a NUL byte (UTF-16?)"),
    ],
    ids=lambda value: f"{value!r:.30}",
)  # fmt: skip
def test_malformed_files(tmp_path, kind, content, sentence):
    """One sentence that names the file and, where there is one, the line."""
    path = tmp_path / f"file.{kind}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{sentence}")) as error:
        READERS[kind](path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_reader_knows_the_same_encodings(tmp_path, kind, suffix):
    """A byte order mark and CRLF are read; UTF-16, Latin-1 and a gzip file by another name are named."""
    text = {"json": '{\r\n"a": "é"}', "toml": 'a = "é"\r\n', "txt": "é\r\nx\ry\r\n"}
    text["jsonl"] = '{"a": "é"}\r\n'
    value = {"jsonl": [(1, {"a": "é"})], "txt": ["é", "x\ry"]}.get(kind, {"a": "é"})
    path, pack = tmp_path / f"x.{kind}{suffix}", gzip.compress if suffix else bytes
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(pack(text[kind].encode(encoding)))
        assert READERS[kind](path) == value
    whole = pack(text[kind].encode())
    bad = {pack(text[kind].encode("utf-16")): "UTF-16", gzip.compress(whole): "a .gz without that"}
    bad[pack(text[kind].encode("latin-1"))] = "Latin-1?"
    bad |= dict.fromkeys((whole[:-9], b"plain", whole[:12]), "a complete gzip") if suffix else {}
    for content, words in bad.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}")) as error:
            READERS[kind](path)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


names = st.text(st.sampled_from("ab%2Ff./\\README\x1b日\ud800"), min_size=1, max_size=20)


@given(names, names, st.sampled_from([1, 30]))
@example("a/b", "a%2Fb", 1)
@example("x" * 241, "x" * 300, 1)
def test_names_of_files(one, other, times):
    """No two names share a file, and none leaves its folder, hides or is too long."""
    one, other = one * times, other * times
    found, another = files.escape_name(one), files.escape_name(other)
    assert (found == another) == (one == other)
    assert re.fullmatch(r"[^./\\\x00-\x1f\ud800-\udfff][^/\\\x00-\x1f\ud800-\udfff]*", found)
    assert len(found.encode()) <= 240
    assert not found.startswith("README")


def test_plain_names_stay():
    for name in ("news", "100%", "質問 答え", "a.b-c_d", "x" * 240):
        assert files.escape_name(name) == name


def test_the_nearest_name():
    assert files.did_you_mean("wieght", ("weight", "name")) == " (did you mean weight?)"
    assert files.did_you_mean("xyzzy", ("weight", "name")) == ""


def test_digests_depend_on_every_part(tmp_path):
    """The boundary between parts and the names of files count; a lone surrogate has a hash."""
    assert files.digest("ab", "c") != files.digest("a", "bc")
    assert files.digest("a") == files.digest(b"a")
    (tmp_path / "x").write_bytes(b"1")
    assert files.hash_files([("a", tmp_path / "x")]) != files.hash_files([("b", tmp_path / "x")])
    assert files.text_hash("\ud800") != files.text_hash("")


def test_differences_name_keys_and_both_values():
    """One sentence for every folder that belongs to one set of settings."""
    stored, current = {"a": 1, "b": True, "c": "x" * 99}, {"a": 1, "b": False, "d": None}
    assert files.differences(stored, current) == f'b was true, is false; c was "{"x" * 39}, is null'
    assert files.differences(stored, dict(stored)) == ""


def test_a_folder_is_locked_by_one_at_a_time(tmp_path):
    """The second is refused and told by whom; the lock ends with the block, whatever its file says."""
    folder = tmp_path / "new"
    for left in ("", "process 1 on \x1b[2J", "x" * 1000):
        with files.locked(folder):
            with pytest.raises(ValueError, match=rf"new: .* found process {os.getpid()} on "):
                files.locked(folder).__enter__()
            (folder / ".lock").write_text(left)
            with pytest.raises(ValueError, match="found a process at work; wait"):
                files.locked(folder).__enter__()


def test_the_digest_of_a_checkpoint_covers_its_modules_wherever_they_are(tmp_path):
    """Stored vectors and results are of other weights when a module's weights change, in any folder."""
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "dense"}, 1]', encoding="utf-8")
    for folder in ("dense", "1_Pooling", "results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}", encoding="utf-8")
    found = {files.hash_checkpoint(tmp_path)}
    for folder in ("dense", "1_Pooling"):
        (tmp_path / folder / "config.json").write_text('{"a": 1}', encoding="utf-8")
        found.add(files.hash_checkpoint(tmp_path))
    assert len(found) == 3
    (tmp_path / "results" / "config.json").write_text('{"a": 1}', encoding="utf-8")
    assert files.hash_checkpoint(tmp_path) in found
