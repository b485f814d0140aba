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
    """A function that shows a line of the log; what was shown of steps after `step` goes."""
    if kind == "tensorboard":
        module = import_module("torch.utils.tensorboard")
        writer = module.SummaryWriter(output / kind, purge_step=step + 1)
        add, flush = writer.add_scalar, writer.flush
    else:
        wandb, run_id = import_module("wandb"), digest(str(output.resolve()))[:16]
        wandb.init(project="kalm_min", name=output.name, dir=output, id=run_id, resume="allow")
        add, flush = lambda name, value, step: wandb.log({name: value}, step=step), int

    def show(line: LogLine) -> None:
        scores = {f"validation/{k}": score for k, score in line.get("validation", {}).items()}
        for name, value in (line | scores).items():
            if isinstance(value, int | float):
                add(name, value, line["step"])
        flush()

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
    for name, points, color in (("loss", losses, "C0"), ("validation MRR", scores, "C1")):
        if points:
            axis.plot(*zip(*points, strict=True), f"{color}.-", linewidth=1, markersize=3)
            axis.set_ylabel(name, color=color)
            axis = axis.twinx()
    axis.set_axis_off()
    with atomic_write(output / "curve.png") as file:
        figure.savefig(file, format="png", dpi=150)
