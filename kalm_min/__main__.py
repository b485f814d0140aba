"""The command `kalm-min`, also `python -m kalm_min`: `kalm-min train --help` and so on."""

import sys

from kalm_min import __version__, program

COMMANDS = {
    "train": "fine-tune or train an embedding model (under torchrun: torchrun -m kalm_min train)",
    "mine": "find hard negatives for training data, and drop inconsistent rows",
    "evaluate": "score models on MTEB and on your own data",
    "synthesize": "training data written by a language model, from personas or your own passages",
    "encode": "a file of texts -> a file of vectors",
    "convert": "CSV, TSV, Parquet, JSON or JSONL -> training data, and held-out evaluation data",
    "soup": "the weighted mean of checkpoints",
    "check": "show what a model's files say, or that training is exact on this machine",
}
_USAGE = "usage: kalm-min COMMAND ...     kalm-min COMMAND --help lists the flags of a command\n"


def main() -> None:
    """Run the command that the first word names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        commands = "\n".join(f"  {name:<12}{about}" for name, about in COMMANDS.items())
        sys.stdout.write(f"{_USAGE}\n{commands}\n")
    elif name == "--version":
        sys.stdout.write(f"kalm-min {__version__}\n")
    elif name in COMMANDS:
        sys.argv = [f"kalm-min {name}", *rest]
        program.start(name)
    else:
        from kalm_min.files import did_you_mean

        near = did_you_mean(name, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        sys.stderr.write(f"kalm-min: unknown command {name!a}{near}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
