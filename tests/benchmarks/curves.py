"""
Plot the held-out metrics of three runs of first_run.py: a healthy one, SFT, and a beta that is too small.

    python tests/benchmarks/curves.py tests/benchmarks/results/first_run.jsonl tests/benchmarks/results/curves.png
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


RUNS = {"whole UNet, beta 64": "healthy (beta 64)", "whole UNet, SFT": "SFT", "beta 0.1": "beta too small (0.1)"}
METRICS = ("eval_loss", "eval_chosen_mse", "eval_rejected_mse", "eval_margin", "eval_accuracy")


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("results", type=Path, help="first_run.jsonl")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    metrics_of_runs = {line["name"]: line.get("metrics") for line in lines}

    figure, axes = plt.subplots(1, len(METRICS), figsize=(15, 2.8), layout="constrained")
    for axis, metric in zip(axes, METRICS):
        for run, label in RUNS.items():
            points = metrics_of_runs[run][metric]
            axis.plot([int(step) for step in points], list(points.values()), label=label)
        axis.set_title(metric)
        axis.set_xlabel("step")
        if metric in ("eval_loss", "eval_chosen_mse", "eval_rejected_mse"):
            axis.set_yscale("log")
    axes[0].legend(fontsize="small")
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
