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
    loads = "kalm_min.synthesis.pipeline"
    return run(
        SynthesisConfig, synthesize, argv, program="synthesize.py", loads=loads, resumable=True
    )


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
    accepted = sum(count for (_, what), count in work.counts.items() if what == "accepted")
    sys.stderr.write(
        f"{accepted:,} of {work.decided:,} samples accepted -> {config.output}; "
        f"report: {config.output}/README.md\n"
    )
    return 0


def preview(plan: "Plan") -> str:
    """One request of each prompt, the number of requests, and an estimate of their tokens."""
    parts, tokens, stages = list[str](), 0.0, 0
    repeats = plan.config.instructions_per_persona * plan.config.samples_per_instruction
    for number, (task, _) in enumerate(plan.pairs[:: len(plan.languages)]):
        sample = plan.sample(number * len(plan.languages))
        values = sample.values | {"number": str(plan.config.instructions_per_persona)}
        values["instruction"] = sample.prompt.instruction or "(an instruction of the first stage)"
        for prompt in filter(None, [plan.prompts.get(f"{task}.instructions"), sample.prompt]):
            count = plan.total / len(plan.pairs) * len(plan.languages)
            if prompt is not sample.prompt:
                count = -(-count // (repeats * len(plan.languages))) * len(plan.languages)
            body = plan.body(prompt, values, "preview", 0)
            messages = [f"{one['role']}: {one['content']}" for one in body["messages"]]
            answer = sum(sum(span) for span in prompt.lengths.values())
            tokens += count * (sum(map(len, messages)) / _TOKEN + answer)
            stages += round(count)
            parts.append("\n\n".join([f"--- {prompt.name}", *messages]))
    sums = f"--- {stages:,} requests, some {tokens:,.0f} tokens, if no answer is rejected"
    return printable("\n\n".join([*parts, sums])) + "\n"


def write_report(work: "Synthesis") -> None:
    """Write README.md and, if matplotlib is installed, README.png into the output."""
    names = sorted({name for name, _ in work.counts})
    reasons = sorted({what for _, what in work.counts} - {"asked", "accepted"})
    rows = [
        [name, *(f"{work.counts[name, what]:,}" for what in ("asked", "accepted"))]
        for name in names
    ]
    rejected = [
        [reason, *(f"{work.counts[name, reason]:,}" for name in names)] for reason in reasons
    ]
    config, sums = (
        work.config,
        [sum(work.counts[n, w] for n in names) for w in ("asked", "accepted")],
    )
    done = "" if work.decided == work.plan.total else f" (broken off: {work.plan.total:,} wanted)"
    origin = (
        f"{sums[1]:,} of {sums[0]:,} samples were accepted{done}. Model {printable(config.model)}, "
        f"seed {config.seed}, temperature {config.temperature}, {len(work.plan.personas):,} "
        f"personas, {work.tokens:,} tokens. `README.provenance/` holds the origin of each line."
    )
    parts = [
        "# Synthetic training data",
        origin,
        table(["file", "asked", "accepted"], rows, {1, 2}),
        "## Rejected answers\n\nA sample is lost after three of them.",
        table(["reason", *names], rejected, range(1, len(names) + 1)),
        "![lengths in words](README.png)" if _plot(work) else "",
    ]
    write_text(config.output / "README.md", "\n\n".join(filter(None, parts)) + "\n")


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
    for row, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, row + 1, ylabel=name)
        for key in ("query", "positive"):
            bins = {
                at: n for (of, what, at), n in work.lengths.items() if (of, what) == (name, key)
            }
            edges = [at * BIN for at in range(max(bins) + 2)]
            axes.stairs(
                [bins.get(at, 0) for at in range(max(bins) + 1)],
                edges,
                label=key,
                fill=True,
                alpha=0.5,
            )
        axes.legend(fontsize=8)
    with atomic_write(work.config.output / "README.png") as file:
        FigureCanvasAgg(figure).print_png(file)
    return True


if __name__ == "__main__":
    program.start("synthesize")
