"""The two plots of the demo."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt


def loss(log: Path, picture: Path) -> None:
    """Plot the loss of each step and its running mean, from a run's log.jsonl."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps, losses = np.array([(row["step"], row["loss"]) for row in rows if "loss" in row]).T
    window = min(50, len(losses))
    means = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="one step")
    axes.plot(steps[window - 1 :], means, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", title="Training", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def dimensions(dims: Sequence[int], curves: Mapping[str, Sequence[float]], picture: Path) -> None:
    """Plot the score of each task against the number of leading dimensions kept."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, scores in curves.items():
        axes.plot(dims, scores, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.set(xlabel="dimensions kept", ylabel="main score", ylim=(0, 100))
    axes.set_title("Matryoshka: one vector, cut short")
    axes.legend(frameon=False, fontsize="small", ncols=2)
    figure.savefig(picture, dpi=150)
    plt.close(figure)
