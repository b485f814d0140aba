"""The size of the package and what makes it hard to read: `make size`.

A private function that is called once and has at most 8 lines must earn its name.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

from kalm_min.console import table

PACKAGE = Path(__file__).resolve().parent.parent / "kalm_min"
# What the parts were meant to weigh; the model's includes what opens released checkpoints.
BUDGETS = {
    "config files console": 450, "vectors topk": 400, "tokenizer embedder": 320,
    "model settings": 1250, "losses": 350, "sampling": 250, "data": 800, "training": 1150,
    "mining": 900, "evaluation": 1400, "synthesis": 450, "encode convert soup check": 350,
    "train mine evaluate synthesize program __main__": None, "options schema": None,
    "__init__": None,
}  # fmt: skip
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def measure(source: str) -> tuple[int, list[str]]:
    """The number of code lines, and the names of small private functions that are called once."""
    code, nodes = set[int](), list(ast.walk(ast.parse(source)))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE and token.string:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in nodes:
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    uses = Counter(getattr(node, "id", getattr(node, "attr", None)) for node in nodes)
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    small = [node.name for node in functions if (node.end_lineno or 0) - node.lineno < 8]
    return len(code), [name for name in small if re.match("_(?!_)", name) and uses[name] == 1]


sources = {path: path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
lines = {path: source.count("\n") for path, source in sources.items()}
code, once = zip(*map(measure, sources.values()), strict=True)
parts: Counter[str] = Counter()
for path, count in lines.items():
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    parts[next(part for part in BUDGETS if name in part.split())] += count
totals = {
    "lines": (sum(lines.values()), 7000),
    "code lines (no docstring, comment, blank)": (sum(code), 5000),
    "modules": (len(sources), 50),
    "private functions of at most 8 lines called once": (sum(map(len, once)), 15),
    "lines with Any": (len(re.findall(r"^.*\bAny\b.*", "\n".join(sources.values()), re.M)), 60),
} | {f"lines in {name}": (parts[name], limit) for name, limit in BUDGETS.items()}
rows = [[name, f"{now:,}", f"{limit:,}" if limit else ""] for name, (now, limit) in totals.items()]
print(table(["what", "now", "at most"], rows, {1, 2}))
print("\nThe longest modules:")
for path in sorted(lines, key=lambda path: -lines[path])[:10]:
    print(f"{lines[path]:6} {path.relative_to(PACKAGE)}")
print("\nPrivate functions of at most 8 lines called once:")
for path, names in ((path, names) for path, names in zip(sources, once, strict=True) if names):
    print(f"       {path.relative_to(PACKAGE)}: {', '.join(names)}")
