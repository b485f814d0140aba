"""Write synthetic training data: `python synthesize.py --server http://localhost:8000/v1 --model NAME --output data/synthetic`.

A model behind an OpenAI-compatible server writes it, from personas or from your own passages. The
same command continues an interrupted run and asks for no answer twice. The exit code is 0 if every
sample is decided, 2 if the request is wrong, 1 if the server gives no answer. Needs
`pip install "kalm-min[synthesis]"`. See docs/synthesis.md.
"""

import sys
from typing import TYPE_CHECKING

from kalm_min import program
from kalm_min.config import run
from kalm_min.console import printable, table
from kalm_min.files import atomic_write, locked, write_text
from kalm_min.options import SynthesisConfig

if TYPE_CHECKING:
    from kalm_min.synthesis.pipeline import Synthesis
    from kalm_min.synthesis.prompts import Plan

_TOKEN = 4  # characters, roughly, in estimates


def main(argv: list[str]) -> int:
    """Run the command; `config.run` defines the exit codes."""
    options = {"program": "synthesize.py", "loads": "kalm_min.synthesis.pipeline"}
    return run(SynthesisConfig, synthesize, argv, resumable=True, **options)


def synthesize(config: SynthesisConfig) -> int:
    """Write the data and its report, or print what would be asked."""
    from kalm_min.synthesis.pipeline import Synthesis
    from kalm_min.synthesis.prompts import Plan

    plan = Plan(config)
    if config.dry_run:
        sys.stdout.write(preview(plan))
        return 0
    with locked(config.output):
        work = Synthesis(config, plan, sys.stderr)
        try:
            work.run()
        finally:
            if work.publish():
                write_report(work)
    if work.missing:
        sys.stderr.write(
            f"{work.missing:,} samples wait for answers: run {config.batch_files}/requests.jsonl "
            "through a batch server, put its results beside it, and give the same command again\n"
        )
    sys.stderr.write(
        f"{work.accepted:,} of {work.decided:,} samples accepted -> {config.output}; "
        f"report: {config.output}/README.md\n"
    )
    return 0


def preview(plan: "Plan") -> str:
    """One request of each prompt, the number of requests, and an estimate of their tokens."""
    parts, tokens, requests = list[str](), 0, 0
    languages, config = len(plan.languages), plan.config
    samples = plan.total * languages // len(plan.pairs)  # of a type
    for number in range(0, len(plan.pairs), languages):
        sample = plan.sample(number)
        values = sample.values | {"number": str(config.instructions_per_persona)}
        values["instruction"] = sample.prompt.instruction or "(an instruction of the first stage)"
        first = -(-samples // (plan.repeats * languages)) * languages
        stages = {f"{sample.prompt.name}.instructions": first, sample.prompt.name: samples}
        for name, count in stages.items():
            if prompt := plan.prompts.get(name):
                body = plan.body(prompt, values, "preview", 0)
                messages = [f"{one['role']}: {one['content']}" for one in body["messages"]]
                answer = sum(map(sum, prompt.lengths.values()))
                tokens += count * (len("".join(messages)) // _TOKEN + answer)
                requests += count
                parts.append("\n\n".join([f"--- {name}", *messages]))
    sums = f"--- {requests:,} requests, some {tokens:,} tokens, if no answer is rejected"
    return printable("\n\n".join([*parts, sums])) + "\n"


def write_report(work: "Synthesis") -> None:
    """Write README.md and, if matplotlib is installed, README.png into the output."""
    config, counts, first = work.config, work.counts, ["asked", "accepted"]
    names = sorted({name for name, _ in counts})
    reasons = sorted({what for _, what in counts} - {*first})
    rows = [[name, *(f"{counts[name, what]:,}" for what in first)] for name in names]
    rejected = [[what, *(f"{counts[name, what]:,}" for name in names)] for what in reasons]
    done = "" if work.decided == work.plan.total else f" (broken off: {work.plan.total:,} wanted)"
    origin = (
        f"{work.accepted:,} of {work.decided:,} samples were accepted{done}. "
        f"Model {printable(config.model)}, seed {config.seed}, temperature {config.temperature}, "
        f"{len(work.plan.personas):,} personas, {work.tokens:,} tokens. "
        "`README.provenance/` holds the origin of each line."
    )
    parts = [
        "# Synthetic training data",
        origin,
        table(["file", *first], rows, {1, 2}),
        "## Rejected answers\n\nA sample is lost after three of them.",
        table(["reason", *names], rejected, range(1, len(names) + 1)),
        *(["![lengths in words](README.png)"] if _plot(work) else []),
    ]
    write_text(config.output / "README.md", "\n\n".join(parts) + "\n")


def _plot(work: "Synthesis") -> bool:
    """Plot the lengths of queries and positives; return False without matplotlib."""
    from kalm_min.synthesis.pipeline import BIN

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = sorted({name for name, _, _ in work.lengths})
    figure = Figure(figsize=(8, 1 + 1.5 * len(names)), layout="constrained")
    for row, name in enumerate(names, 1):
        axes = figure.add_subplot(len(names), 1, row, ylabel=name)
        for key in ("query", "positive"):
            most = max(at for of, what, at in work.lengths if (of, what) == (name, key))
            bins = [work.lengths[name, key, at] for at in range(most + 1)]
            edges = [at * BIN for at in range(most + 2)]
            axes.stairs(bins, edges, label=key, fill=True, alpha=0.5)
        axes.legend(fontsize=8)
    with atomic_write(work.config.output / "README.png") as file:
        FigureCanvasAgg(figure).print_png(file)
    return True


if __name__ == "__main__":
    program.start("synthesize")
