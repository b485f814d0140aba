"""All speed benchmarks in turn, with their ratios beside the last recorded ones.

    python benchmarks/all.py --data DIR --tokenizer DIR --output runs/benchmarks [--record true]

Ratios (kalm_min to a peer or to the machine's limit) show what a change of the code did, while
seconds depend on the machine. Run this by hand before a release, on a machine at rest. The exit code
is 1 if a ratio fell by more than a sixth; --record true stores the new ratios for this kind of device
instead.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kalm_min.config import parse
from kalm_min.files import read_json, write_json

HERE = Path(__file__).parent
RECORDED = HERE / "recorded.json"
_FALL = 1 / 6
SETS: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "encode": ["--layers", "4", "--texts", "96", "--rounds", "2"],
        "prefix": ["--layers", "4", "--queries", "192", "--rounds", "2"],
        "train_step": ["--layers", "3", "--queries", "4", "--rounds", "2"],
        "batch_growth": ["--max-length", "8", "--queries", "64", "512", "4096"],
    },
    "cuda": {
        "encode": ["--layers", "24", "--texts", "16384", "--dtypes", "bfloat16"],
        "prefix": ["--layers", "24", "--queries", "8192", "--dtypes", "bfloat16"],
        "train_step": ["--layers", "24", "--queries", "32"],
        "batch_growth": ["--dim", "256", "--queries", "64", "512", "8192"],
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of all benchmarks."""

    data: Annotated[Path, "Folder of training files (.jsonl, .jsonl.gz), one per task."]
    tokenizer: Annotated[Path, "Folder of the Qwen2 tokenizer."]
    output: Annotated[Path, "Folder of the results, one .json file per benchmark."]
    device: Annotated[
        str, "cpu or cuda: the set of sizes; the scripts choose the device themselves."
    ] = "cpu"
    record: Annotated[bool, "Store these ratios for later comparisons."] = False


def main(argv: list[str]) -> int:
    """Run and compare; return 1 if something has become slower."""
    options = parse(Options, argv, program="all.py", description="All speed benchmarks.")
    found: dict[str, float] = {}
    for name, sizes in SETS[options.device].items():
        result = options.output.absolute() / f"{name}.json"
        given = ["--data", str(options.data), "--tokenizer", str(options.tokenizer)]
        script = [sys.executable, "-W", "ignore", str(HERE / f"{name}.py")]
        subprocess.run([*script, *given, *sizes, "--output", str(result)], check=True)
        found |= {f"{name}, {what}": value for what, value in read_json(result)["ratios"].items()}
    recorded = read_json(RECORDED) if RECORDED.is_file() else {}
    if options.record:
        write_json(RECORDED, recorded | {options.device: found})
        return 0
    return compare(recorded.get(options.device, {}), found)


def compare(recorded: dict[str, float], found: dict[str, float]) -> int:
    """Print a table; return 1 if a ratio fell."""
    fallen = 0
    print("\n| ratio, larger is better | recorded | now | |\n|---|---|---|---|")
    for what, now in found.items():
        before = recorded.get(what)
        fell = before is not None and now < before * (1 - _FALL)
        fallen += fell
        print(f"| {what} | {before or ''} | {now} | {'SLOWER' if fell else ''} |")
    return int(fallen > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
