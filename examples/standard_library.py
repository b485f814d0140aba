"""The text of the demo: documentation and code of the running Python's standard library.

Every source file of the library is parsed, never imported, into definitions (functions, classes and
modules with their signature, documentation and code) and comments (with the lines they describe).
A hash of its name assigns each top-level definition, with everything inside it, to training or to
evaluation; a training pair with a text that also occurs in evaluation is dropped. The same Python
gives the same files on every machine.

The files are those of docs/design.md: training tasks in JSONL, and evaluation sets in the layouts
that `evaluate.py --data` reads.
"""

import ast
import hashlib
import json
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kalm_min.files import atomic_directory, write_text

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "turtledemo"}
EVALUATION_SHARE = 0.25
LONGEST = 600  # characters of a text, so that a demo with a small model stays short

Definable = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Definition:
    """A documented or undocumented function, class or module."""

    module: str
    name: str  # dotted within the module; empty for the module itself
    signature: str  # "email.message: Message.get_all(self, name, failobj=None)"
    summary: str  # first sentence of the documentation
    details: str  # the rest of it
    code: str  # without the documentation; empty for classes and modules
    comments: tuple[tuple[str, str], ...]  # (comment, the lines below it)

    @property
    def package(self) -> str:
        """The top-level package: `email` for `email.message`."""
        return self.module.split(".")[0]

    @property
    def documentation(self) -> str:
        """Summary and details."""
        return f"{self.summary} {self.details}".strip()

    @property
    def is_held_out(self) -> bool:
        """Whether it is for evaluation, decided by the name of its outermost definition."""
        unit = f"{self.module}:{self.name.split('.')[0]}"
        digest = hashlib.blake2b(unit.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64 < EVALUATION_SHARE


def collect(library: Path | None = None) -> list[Definition]:
    """Every definition in the standard library's source files, in order of their paths."""
    library = library or Path(sysconfig.get_path("stdlib"))
    definitions: list[Definition] = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        source = path.read_text(encoding="utf-8", errors="replace")
        tree = ast.parse(source)
        definitions.append(_definition(module, "", tree, source.splitlines()))
        definitions += _walk(module, "", tree, source.splitlines())
    return definitions


def _walk(module: str, prefix: str, tree: ast.AST, lines: list[str]) -> Iterator[Definition]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definable):
            yield _definition(module, prefix + node.name, node, lines)
            yield from _walk(module, f"{prefix}{node.name}.", node, lines)


def _definition(
    module: str, name: str, node: Definable | ast.Module, lines: list[str]
) -> Definition:
    summary, details = _sentences(ast.get_docstring(node) or "")
    code, comments, arguments = "", (), ""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = f"({ast.unparse(node.args)})"
        body = _body(node, lines)
        code = _cut("\n".join(line for line in body if not line.lstrip().startswith("#")))
        comments = tuple(_comments(body))
    signature = _cut(f"{module}: {name}{arguments}" if name else module)
    return Definition(module, name, signature, summary, details, code, comments)


def _sentences(documentation: str) -> tuple[str, str]:
    """The first sentence and the rest, with white space collapsed."""
    head, _, rest = documentation.partition("\n\n")
    head = " ".join(head.split())
    match = re.match(r"(.{15,}?[.!?:])\s+(?=\S)(.*)", head)
    first, more = match.groups() if match else (head, "")
    return _cut(first), _cut(" ".join(f"{more} {rest}".split()))


def _body(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> list[str]:
    """The function's lines without its documentation, indented from zero."""
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    kept = lines[first:last]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : last]
    return textwrap.dedent("\n".join(kept)).splitlines()


def _comments(body: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (comment, up to six lines below it)."""
    comment: list[str] = []
    for index, line in enumerate(body):
        stripped = line.strip()
        if stripped.startswith("# "):
            comment.append(stripped[2:])
        elif comment and stripped:
            text = _cut(" ".join(comment))
            if len(text) >= 20:
                yield text, _cut(textwrap.dedent("\n".join(body[index : index + 6])))
            comment = []


def _cut(text: str) -> str:
    return text[:LONGEST].rstrip()


def training_tasks(definitions: list[Definition]) -> dict[str, list[dict[str, Any]]]:
    """Pairs of texts with the same meaning, by task, from definitions that are not held out."""
    seen = [one for one in definitions if not one.is_held_out]
    documented = [one for one in seen if len(one.summary) >= 15]
    modules = {one.module: one for one in documented if not one.name}
    return {
        "signature_to_documentation": [
            _pair(one.signature, one.documentation) for one in documented if one.name
        ],
        "summary_to_details": [
            _pair(one.summary, one.details) for one in documented if len(one.details) >= 40
        ],
        "summary_to_code": [_pair(one.summary, one.code) for one in documented if one.code],
        "name_to_documentation": [
            _pair(_spoken(one.name), one.documentation) for one in documented if one.name
        ],
        "name_to_code": [_pair(_spoken(one.name), one.code) for one in seen if len(one.code) >= 80],
        "code_to_rest": [_pair(*_halves(one.code)) for one in seen if len(one.code) >= 200],
        "comment_to_code": [_pair(*pair) for one in seen for pair in one.comments],
        # Many texts have one answer: `group` keeps them from being each other's negatives.
        "documentation_to_module": [
            _pair(one.documentation, f"{one.module}: {modules[one.module].summary}", one.module)
            for one in documented
            if one.name and one.module in modules
        ],
    }


def _pair(query: str, positive: str, group: str | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"query": query, "pos": [positive]}
    return row if group is None else {**row, "group": group}


def _halves(code: str) -> tuple[str, str]:
    lines = code.splitlines()
    return "\n".join(lines[: len(lines) // 2]), "\n".join(lines[len(lines) // 2 :])


def words(text: str) -> list[str]:
    """The words of prose or code: `getContent_type(3)` -> get, content, type, 3."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]


def _spoken(name: str) -> str:
    """`Message.get_content_type` in words: "message get content type"."""
    return " ".join(words(name)) or name


def evaluation_sets(definitions: list[Definition]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Evaluation sets of four types, as set -> file -> rows, from the held-out definitions."""
    documented = _once([one for one in definitions if one.is_held_out and len(one.summary) >= 15])
    common = _of_common_packages(documented, smallest=25)
    return {
        "find_details": _retrieval(
            [(one.summary, one.details) for one in documented if one.details]
        ),
        "find_code": _retrieval([(one.summary, one.code) for one in documented if one.code]),
        "find_by_name": _retrieval([(_spoken(one.name), one.documentation) for one in documented]),
        "same_function": {"test.jsonl": _matches(documented)},
        "package_classification": {
            "train.jsonl": [_labelled(one) for one in common[::2]],
            "test.jsonl": [_labelled(one) for one in common[1::2]],
        },
        "package_clustering": {"test.jsonl": [_labelled(one) for one in common]},
    }


def _once(definitions: list[Definition]) -> list[Definition]:
    """The first definition with each documentation, as some is copied from class to class."""
    return list({one.documentation: one for one in reversed(definitions)}.values())[::-1]


def _of_common_packages(definitions: list[Definition], *, smallest: int) -> list[Definition]:
    sizes = Counter(one.package for one in definitions)
    return [one for one in definitions if sizes[one.package] >= smallest]


def _labelled(one: Definition) -> dict[str, Any]:
    return {"text": one.documentation, "label": one.package}


def _retrieval(pairs: list[tuple[str, str]]) -> dict[str, list[dict[str, Any]]]:
    """BEIR's three files; a text that occurs several times is one query or one document."""
    queries = {text: f"q{i}" for i, text in enumerate(dict.fromkeys(query for query, _ in pairs))}
    corpus = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(found for _, found in pairs))}
    judged = dict.fromkeys((queries[query], corpus[found]) for query, found in pairs)
    return {
        "queries.jsonl": [{"_id": name, "text": text} for text, name in queries.items()],
        "corpus.jsonl": [{"_id": name, "title": "", "text": text} for text, name in corpus.items()],
        "qrels/test.tsv": [{"query-id": q, "corpus-id": d, "score": 1} for q, d in judged],
    }


def _matches(definitions: list[Definition]) -> list[dict[str, Any]]:
    """Pairs (summary, code) of one function, and of a function and the next one in the file."""
    functions = [one for one in definitions if one.code]
    rows: list[dict[str, Any]] = []
    for one, other in pairwise(functions):
        for shown, label in ((one, 1), (other, 0)):
            rows.append({"sentence1": one.summary, "sentence2": shown.code, "label": label})
    return rows


def texts_of(rows: Iterable[dict[str, Any]]) -> set[str]:
    """Every text of training or evaluation rows, in lower case with white space collapsed."""
    keys = ("query", "pos", "text", "sentence1", "sentence2")
    values = [row[key] for row in rows for key in keys if key in row]
    texts = [text for value in values for text in ([value] if isinstance(value, str) else value)]
    return {" ".join(text.lower().split()) for text in texts}


def write(folder: Path) -> dict[str, int]:
    """Write `train/` and `eval/` into a new folder, with no text in both.

    Returns the number of rows by file.
    """
    definitions = collect()
    files = {
        f"eval/{name}/{file}": rows
        for name, parts in evaluation_sets(definitions).items()
        for file, rows in parts.items()
    }
    hidden = set[str]().union(*(texts_of(rows) for rows in files.values()))
    for task, rows in training_tasks(definitions).items():
        kept = [row for row in rows if not texts_of([row]) & hidden]
        assert not texts_of(kept) & hidden
        files[f"train/{task}.jsonl"] = kept
    with atomic_directory(folder) as new:
        for name, rows in files.items():
            _write_rows(new / name, rows)
    return {name: len(rows) for name, rows in files.items()}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, "\n".join(lines) + "\n")
