"""Where a run's log is shown besides log.jsonl: TensorBoard or Weights & Biases, and a picture."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from kalm_min.files import atomic_write, digest, read_jsonl

LogLine = dict[str, Any]  # a line of log.jsonl: a step's, or {"step": ..., "validation": ...}


def open_tracker(
    kind: Literal["tensorboard", "wandb"], output: Path, step: int
) -> Callable[[LogLine], None]:
    """A function that shows a line of the log; what was shown of later steps than `step` goes.

    Raises ImportError without the package.
    """
    if kind == "tensorboard":
        module = import_module("torch.utils.tensorboard")
        writer = module.SummaryWriter(output / "tensorboard", purge_step=step + 1)

        def add(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()
    else:
        wandb = import_module("wandb")
        run_id = digest(str(output.resolve()))[:16]
        wandb.init(project="kalm_min", name=output.name, dir=output, id=run_id, resume="allow")

        def add(values: dict[str, float], step: int) -> None:
            wandb.log(values, step=step)

    def show(line: LogLine) -> None:
        scores = line.get("validation", {})
        values = line | {f"validation/{name}": score for name, score in scores.items()}
        add({k: v for k, v in values.items() if isinstance(v, int | float)}, line["step"])

    return show


def draw_curve(output: Path) -> None:
    """Draw the loss and the validation's MRR in log.jsonl to curve.png, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = [line for _, line in read_jsonl(output / "log.jsonl")]
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    scores = [(line["step"], line["validation"]["mrr"]) for line in lines if "validation" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel("step")
    for name, points, style in (("loss", losses, "C0-"), ("validation MRR", scores, "C1o-")):
        if points:
            axis.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4)
            axis.set_ylabel(name, color=style[:2])
            axis = axis.twinx()
    axis.set_axis_off()
    with atomic_write(output / "curve.png") as file:
        figure.savefig(file, format="png", dpi=150)
