"""kalm_min.files: complete or absent, and errors that name the file and the line."""

import gzip
import os

import pytest

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
        "7: expected UTF-8 text, found invalid start byte",
    ]
    with pytest.raises(ValueError, match=r"t\.jsonl.*:3: expected a JSON object, found list"):
        list(files.read_jsonl(path))


def test_a_torn_gzip_file(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match="expected a complete gzip file, found: "):
        list(files.read_jsonl(path))


@pytest.mark.parametrize(
    ("read", "content", "sentence"),
    [
        (files.read_json, b'{"a": 1,\n}', ":2: expected JSON, found "),
        (files.read_json, b"\xff", ": expected UTF-8 text, found invalid start byte"),
        (files.read_toml, b"a = 1\nb\n", ":2: expected TOML, found "),
        (files.read_toml, b"\xff", ": expected UTF-8 text, found invalid start byte"),
    ],
)
def test_settings_files(tmp_path, read, content, sentence):
    """What is no JSON or TOML names the line."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}{sentence}"):
        read(path)


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
