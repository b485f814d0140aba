"""JsonlFile: lines, line numbers, and a cache that is complete and current or not believed."""

import gzip
import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalm_min.data import JsonlFile, TrainingData, index

LINES = [b'{"a": 1}', b'{"a": 2}', b'{"a": 3}']


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def values(file: JsonlFile) -> list:
    return [record["a"] for record in file]


def cache_of(file: JsonlFile, suffix: str) -> Path:
    """The one cache file of its kind, wherever it is."""
    folders = [folder for folder in file._folders if folder.is_dir()]
    (found,) = (one for folder in folders for one in folder.glob(f"{file._name}.{suffix}"))
    return found


def cached(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / ".kalm_min").iterdir())


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"\n".join(LINES) + b"\n", [1, 2, 3]),
        (b"\n".join(LINES), [1, 2, 3]),
        (b"\r\n".join(LINES) + b"\r\n", [1, 2, 3]),
        (b"\n\n" + b"\n\n\n".join(LINES) + b"\n\n", [3, 6, 9]),
        (b" \r\n" + b"\r\n\t\r\n".join(LINES) + b"\r\n  ", [2, 4, 6]),
        (b"  " + b"\n \t ".join(LINES), [1, 2, 3]),
    ],
    ids=["plain", "no final newline", "CRLF", "blank lines", "blank CRLF lines", "indented"],
)
def test_lines(tmp_path, name, content, lines):
    """Line endings, blank lines and indentation change neither records nor line numbers."""
    path = write(tmp_path / name, content)
    for _ in range(2):  # built, then from the cache
        file = JsonlFile(path)
        assert values(file) == [1, 2, 3]
        assert [file.location(i) for i in range(3)] == [f"{path}:{line}" for line in lines]
        assert file[-1] == {"a": 3}
        with pytest.raises(IndexError):
            file[3]


@given(
    st.lists(st.one_of(st.just(""), st.sampled_from([" ", "\r", "\t \r"]), st.text())),
    st.booleans(),
    st.sampled_from([1, 2, 7, 1 << 22]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_any_text_survives_any_chunking(tmp_path, monkeypatch, texts, final, chunk):
    """Strings come back as written, with their line numbers, wherever a chunk ends.

    U+2028 and similar characters, at which str.splitlines ends lines, stay inside their string.
    """
    monkeypatch.setattr(index, "_CHUNK", chunk)
    lines = [
        text if not text.strip(" \t\r") else json.dumps({"a": text}, ensure_ascii=i % 2 == 0)
        for i, text in enumerate([*texts, "x\u2028y\u2029z\x85\x0b\x0c", *texts])
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(("\n".join(lines) + "\n" * final).encode("utf-8", "surrogatepass"))
    expected = [(json.loads(line)["a"], n) for n, line in enumerate(lines, 1) if line.strip()]
    file = JsonlFile(path, cache_dir=tmp_path / "cache")
    assert len(file) == len(expected)
    for i, (text, number) in enumerate(expected):
        assert file.location(i) == f"{path}:{number}"
        try:
            text.encode()
        except UnicodeEncodeError:
            continue  # written as bytes that are not UTF-8
        assert file[i] == {"a": text}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"a": "\xff"}', "expected UTF-8 text, found invalid start byte"),
        (b'{"a": 1', "expected a JSON object, found Expecting"),
        (b'{"a": "\x00"}', "expected a JSON object, found a NUL byte"),
        (b"\x00\x00\x00", "expected a JSON object, found a NUL byte"),
        (b"[1]", "expected a JSON object, found"),
        (b"\xef\xbb\xbf{}", "expected a JSON object, found Unexpected UTF-8 BOM"),
        (b'{"a": ' + b"[" * 100_000, "expected a JSON object, found maximum recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected a JSON object, found Exceeds the limit"),
    ],
    ids=["utf8", "cut", "nul in string", "nuls", "list", "bom", "nesting", "digits"],
)
def test_malformed_line(tmp_path, line, found):
    """A line that is no JSON object is reported with its location, and the others can still be read."""
    path = write(tmp_path / "x.jsonl", b"\n".join([LINES[0], b"", line, LINES[1]]))
    file = JsonlFile(path)
    with pytest.raises(ValueError, match="x.jsonl:3: " + found) as error:
        file[1]
    assert "\n" not in str(error.value)
    assert file[2] == {"a": 2}


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n"])
def test_empty_file(tmp_path, name, content):
    """A file without a record is refused, and leaves nothing that a later run would believe."""
    path = write(tmp_path / name, content)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name}: expected at least one record, found"):
            JsonlFile(path)
    assert not list(tmp_path.glob(".kalm_min/*.index"))


def test_broken_gzip(tmp_path):
    """A .gz that ends early or is no .gz is reported in one sentence; the repaired file opens."""
    path = write(tmp_path / "x.jsonl.gz", b"\n".join(LINES * 1000))
    whole = path.read_bytes()
    damaged = whole[:-8] + bytes(4) + whole[-4:]
    for broken in (whole[: len(whole) // 2], b'{"a": 1}\n', damaged):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"x\.jsonl\.gz: expected a complete gzip file, found"):
            JsonlFile(path)
        assert cached(tmp_path) == []
    path.write_bytes(whole)
    assert len(JsonlFile(path)) == 3000


def test_a_huge_line(tmp_path):
    """A record of 20 MB is a record like any other, before and after others."""
    text = "long " * 4_000_000
    path = write(tmp_path / "x.jsonl", b"\n".join([LINES[0], b'{"a": "%s"}' % text.encode()]))
    assert values(JsonlFile(path)) == [1, text]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_changed_file_is_read_anew(tmp_path, name):
    """The cache of the old content is neither used nor kept; other files' caches stay."""
    other = JsonlFile(write(tmp_path / f"x.jsonl.v{name}", b'{"a": 9}'))
    path = write(tmp_path / name, b"\n".join(LINES))
    JsonlFile(path)
    before = cached(tmp_path)
    write(path, b'{"a": 7}\n{"a": 8}')
    assert values(JsonlFile(path)) == [7, 8]
    assert len(cached(tmp_path)) == len(before)
    assert values(JsonlFile(other.path)) == [9]


def test_remains_of_killed_processes(tmp_path):
    """A temporary file of yesterday is removed; one of a process that may be writing is not."""
    (tmp_path / ".kalm_min").mkdir()
    for name, age in (("old", 90_000), ("new", 9)):
        other = f".{name}.jsonl.v3.0123abcd-9.0123456789abcdef.tmp"  # of another machine
        os.utime(write(tmp_path / ".kalm_min" / other, b"half"), (time.time() - age,) * 2)
    JsonlFile(write(tmp_path / "x.jsonl", b"\n".join(LINES)))
    assert [name[:4] for name in cached(tmp_path) if name.endswith(".tmp")] == [".new"]


def test_a_change_of_equal_size_is_seen(tmp_path):
    """The modification time counts too."""
    path = write(tmp_path / "x.jsonl", b"\n".join(LINES))
    JsonlFile(path)
    content = b'{"a": 77}\n' + b'{"b": 8}'
    write(path, content + b" " * (path.stat().st_size - len(content)))
    assert len(JsonlFile(path)) == 2


def test_a_change_while_reading_is_refused(tmp_path, monkeypatch):
    """Offsets of one content must not be kept under the name of another."""
    path = write(tmp_path / "x.jsonl", b"\n".join(LINES))
    lines = index._lines

    def meanwhile(data):
        yield from lines(data)
        with path.open("ab") as file:
            file.write(b'\n{"a": 4}')

    monkeypatch.setattr(index, "_lines", meanwhile)
    with pytest.raises(ValueError, match="changed while it was read"):
        JsonlFile(path)
    monkeypatch.undo()
    assert values(JsonlFile(path)) == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "absent", "fits nothing"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_torn_cache_is_rebuilt(tmp_path, name, damage):
    """The records are right, whatever a crash or another program did to the cache."""
    path = write(tmp_path / name, b"\n".join(LINES))
    offsets = cache_of(JsonlFile(path), "index")
    content = offsets.read_bytes()
    if damage == "absent":
        offsets.unlink()
    elif damage == "fits nothing":
        np.array([0, 5, 5000, 0]).tofile(offsets)
    else:
        cut = {"empty": b"", "cut": content[:-9], "noise": b"noise" * 99}[damage]
        offsets.write_bytes(cut)
    assert values(JsonlFile(path)) == [1, 2, 3]
    assert offsets.read_bytes() == content


def test_a_lost_or_torn_copy_of_a_gz_is_made_again(tmp_path):
    """The uncompressed copy is believed only at the length its index was made for."""
    path = write(tmp_path / "x.jsonl.gz", b"\n".join(LINES))
    copy = cache_of(JsonlFile(path), "jsonl")
    copy.write_bytes(copy.read_bytes()[:-3])
    assert values(JsonlFile(path)) == [1, 2, 3]
    copy.unlink()
    assert values(JsonlFile(path)) == [1, 2, 3]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_damaged_cache_is_never_believed(tmp_path, name):
    """Whichever byte of whichever cache file is changed, by a program that hides its traces or not,
    the same examples are read."""
    rows = [{"query": f"q{i}", "pos": ["p"], "task": "ab"[i % 2], "group": i % 3} for i in range(9)]
    path = write(tmp_path / name, "\n".join(map(json.dumps, rows)).encode())
    good, random = list(TrainingData(path)), np.random.default_rng(0)
    for cache in sorted((tmp_path / ".kalm_min").iterdir()):
        content, stat = cache.read_bytes(), cache.stat()
        for _ in range(40):
            damaged = bytearray(content)
            damaged[random.integers(len(content))] ^= 1 << random.integers(8)
            cache.write_bytes(damaged)
            os.utime(cache, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert list(TrainingData(path)) == good
            assert cache.read_bytes() == content


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_other_bytes_of_equal_size_and_time_are_seen(tmp_path, name):
    """The time of the last change cannot be set back."""
    path = write(tmp_path / name, b"\n".join(LINES))
    stat = path.stat()
    before = JsonlFile(path)
    write(path, b"\n".join(LINES).replace(b"3", b"4"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert values(JsonlFile(path)) == [1, 2, 4]
    assert JsonlFile(path).digest != before.digest
    assert values(JsonlFile(write(tmp_path / "plain.jsonl", b"\n".join(LINES)))) == [1, 2, 3]
    assert JsonlFile(tmp_path / "plain.jsonl").digest == before.digest


def test_a_file_with_a_byte_order_mark(tmp_path):
    """Records, line numbers and the first text are those of the file without it."""
    path = write(tmp_path / "x.jsonl", b"\xef\xbb\xbf\n" + b"\n".join(LINES))
    assert values(JsonlFile(path)) == [1, 2, 3]
    assert JsonlFile(path).location(0) == f"{path}:2"
    write(path, b"\xef\xbb\xbf" + b"\n".join(LINES))
    assert [values(JsonlFile(path)), JsonlFile(path).location(0)] == [[1, 2, 3], f"{path}:1"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'[\n{"a": 1},\n{"a": 2}\n]\n', "one JSON array; write one object per line"),
        (b'\n {\n "a": 1\n}\n', "an object over many lines; write one object per line"),
        ('{"a": 1}\n'.encode("utf-16"), "UTF-16; save the file as UTF-8"),
        (gzip.compress(b'{"a": 1}\n', mtime=0), "a .gz without that name; save the file as UTF-8"),
    ],
)
def test_what_is_no_jsonl_at_all(tmp_path, content, found):
    """One sentence about the file, built or cached, instead of one about each of its lines."""
    path = write(tmp_path / "x.jsonl", content)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(f"{path}: expected ")) as error:
            JsonlFile(path)
        assert f"found {found}" in str(error.value)


def test_a_long_name_in_a_deep_folder(tmp_path):
    """A name as long as the file system allows leaves room for those of its caches."""
    path = write(tmp_path / f"{'x' * 246}.jsonl.gz", b"\n".join(LINES))
    assert [values(JsonlFile(path)) for _ in range(2)] == [[1, 2, 3]] * 2


def test_a_kill_while_building_leaves_nothing_to_believe(tmp_path, monkeypatch):
    """An exception (as a kill or a full disk) in the middle: no index appears."""
    path = write(tmp_path / "x.jsonl", b"\n".join(LINES))

    def full(data):
        yield from ()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "_lines", full)
    with pytest.raises(OSError, match="No space left"):
        JsonlFile(path)
    monkeypatch.undo()
    assert cached(tmp_path) == []
    assert values(JsonlFile(path)) == [1, 2, 3]


def test_cache_folder(tmp_path):
    """With a cache folder, nothing is written beside the data, and equal names do not collide."""
    files = []
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
        path = write(tmp_path / part / "x.jsonl", b'{"a": "%s"}' % part.encode())
        os.utime(path, ns=(5, 5))
        files.append(JsonlFile(path, cache_dir=tmp_path / "cache"))
        assert [entry.name for entry in path.parent.iterdir()] == ["x.jsonl"]
    assert [values(file) for file in files] == [["one"], ["two"]]


def test_read_only_data(tmp_path, monkeypatch):
    """Where `.kalm_min` cannot be made the index goes to the user's cache folder."""
    path = write(tmp_path / "x.jsonl", b"\n".join(LINES))
    (tmp_path / ".kalm_min").write_text("in the way")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    file = JsonlFile(path)
    assert values(file) == [1, 2, 3]
    assert cache_of(file, "index").is_relative_to(tmp_path / "home" / ".cache" / "kalm_min")

    (tmp_path / "nowhere").write_text("in the way")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"x\.jsonl: its index cannot be written to .* or "):
        JsonlFile(path)


def test_data_that_became_read_only(tmp_path, monkeypatch):
    """An index beside the data is used; new files go to a folder that can be written."""
    path = write(tmp_path / "data" / "x.jsonl", b"\n".join(LINES))
    offsets = cache_of(JsonlFile(path), "index")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(os, "access", lambda folder, _: "home" in folder.parts)
    file = JsonlFile(path)
    assert cache_of(file, "index") == offsets
    file.save("else", [], {"a": 1})
    assert cache_of(file, "else").is_relative_to(tmp_path / "home")
    assert file.load("else")[1] == {"a": 1}


def _open_in_child(path, start, results):
    start.wait()
    results.put(values(JsonlFile(path)))


def test_processes_may_build_at_once(tmp_path):
    """Ranks that open the same new file together all get it right."""
    path = write(tmp_path / "x.jsonl.gz", b"\n".join(LINES))
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    children = [
        context.Process(target=_open_in_child, args=(path, start, results)) for _ in range(3)
    ]
    for child in children:
        child.start()
    start.set()
    assert [results.get(timeout=60) for _ in children] == [[1, 2, 3]] * 3
    for child in children:
        child.join()
    assert len(cached(tmp_path)) == 2


def test_opening_costs_no_reading(tmp_path, monkeypatch):
    """A million lines open from the cache in milliseconds and without searching the file."""
    path = write(tmp_path / "x.jsonl", b'{"a": 1}\n' * 1_000_000)
    assert len(JsonlFile(path)) == 1_000_000
    monkeypatch.delattr(JsonlFile, "_build")
    begin = time.perf_counter()
    file = JsonlFile(path)
    assert file[999_999] == {"a": 1}
    assert file.location(999_999).endswith(":1000000")
    assert time.perf_counter() - begin < 0.1
