"""
Print the differences to SDXL that the evaluation found, beside the published ones.

    python published_models.py published-models-50/results.json --steps 50
"""

import argparse
import json
from pathlib import Path


SCORERS = ("pickscore", "hps_no_antialias", "imagereward", "aesthetic")

# {steps: {source: {model: PickScore, HPS v2.1, ImageReward, Aesthetic}}}, all of SDXL at 1024 px with guidance 5.
PUBLISHED = {
    50: {
        "card of mapo-t2i/mapo-beta (MaPO's version 1), Pick-a-Pic v2 test": {
            "base": (22.4, 30.0, None, 6.03),
            "dpo": (22.7, 31.1, None, 6.03),
            "mapo": (22.5, 31.2, None, 6.17),
        },
        "Table 2 of MaPO's version 2 (arXiv 2406.06424v2), Pick-a-Pic v2 test; its MaPO is another model": {
            "base": (22.4, 30.0, None, 6.03),
            "dpo": (22.9, 31.1, None, 6.03),
            "inpo": (22.5, 30.2, None, 6.14),
            "smpo": (23.0, 30.8, None, 6.18),
        },
        "SmPO paper, HPDv2 test, medians": {
            "base": (22.75, 28.45, 0.881, 6.114),
            "dpo": (23.13, 30.06, 1.184, 6.112),
            "mapo": (22.81, 29.11, 1.224, 6.309),
            "smpo": (23.62, 32.53, 1.331, 6.264),
        },
    },
    20: {
        "SPO paper, Pick-a-Pic v1 validation_unique, DDIM": {
            "base": (21.95, 26.95, 0.538, 5.950),
            "dpo": (22.64, 29.31, 0.944, 6.015),
            "mapo": (22.11, 28.22, 0.717, 6.096),
            "spo": (23.06, 31.80, 1.080, 6.364),
        },
        "LPO paper, the same prompts": {
            "base": (21.65, 26.05, 0.478, 5.920),
            "dpo": (22.22, 28.47, 0.853, 5.939),
            "mapo": (21.89, 27.44, 0.766, 6.095),
            "spo": (22.70, 31.15, 0.995, 6.343),
        },
    },
}


def published_differences(table, model):
    """Differences to SDXL by scorer, of a published table."""
    differences = {}
    for scorer, score, base in zip(SCORERS, table.get(model, ()), table["base"]):
        if score is not None:
            differences[scorer] = score - base
    return differences


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json of the evaluation")
    parser.add_argument("--steps", type=int, choices=sorted(PUBLISHED), required=True)
    args = parser.parse_args()
    if not args.results.exists():
        parser.error(f"{args.results} does not exist: run the evaluation first")
    results = json.loads(args.results.read_text())["results"]
    sources = PUBLISHED[args.steps]

    letters = "ABC"[: len(sources)]
    print(f"Differences to SDXL, {args.steps} steps, guidance 5. Published:\n")
    for letter, source in zip(letters, sources):
        print(f"- {letter}: {source}")
    print(f"\n| model | scorer | here | {' | '.join(letters)} |\n|{'---|' * (3 + len(letters))}")
    for row in results:
        if row["model"] == "base":
            continue
        cells = [row["model"], row["scorer"], f"{row['difference']:+.3f} ± {row['difference_error']:.3f}"]
        for table in sources.values():
            published = published_differences(table, row["model"]).get(row["scorer"])
            cells.append("" if published is None else f"{published:+.3f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
