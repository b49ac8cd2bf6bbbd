"""Results of the evaluation: means, win rates, comparisons, and the files that contain them."""

import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image
from sampling import SCORERS, records_of, results_of


pytest_plugins = "sampling_fixtures"


# Statistics ----------------------------------------------------------------------------------------------------------
def test_mean_and_standard_error_over_prompts(evaluation):
    """One prompt has no standard error."""
    # The prompts' means are 2, 4 and 9: mean 5, deviations -3, -1 and 4.
    scores = np.array([[1.0, 3.0], [4.0, 4.0], [8.0, 10.0]])

    mean, error = evaluation.mean_and_error(scores)
    single = evaluation.mean_and_error(scores[:1])

    assert mean == 5
    assert error == pytest.approx(math.sqrt((9 + 1 + 16) / 2) / math.sqrt(3))
    assert single == (2, None)


def test_comparison_counts_images_and_averages_prompts(evaluation):
    base = np.zeros((4, 2))
    candidate = np.array([[1, 1], [1, -1], [0, -1], [0, 1]])

    row = evaluation.compare(candidate, base)

    assert (row["wins"], row["ties"], row["losses"]) == (4, 2, 2)
    assert row["win_rate"] == 5 / 8
    # The prompts' differences are 1, 0, -0.5 and 0.5.
    assert row["difference"] == 0.25
    assert row["difference_error"] == pytest.approx(math.sqrt(1.25 / 3) / 2)


def test_win_rate_has_a_wilson_interval(evaluation):
    base = np.zeros((4, 2))
    z = 1.959964

    all_won = evaluation.win_rate(base + 1, base)
    all_tied = evaluation.win_rate(base, base)

    # n wins of n: from n / (n + z^2) to 1. Half of them: z / 2 / sqrt(n + z^2) to either side.
    half_width = z / 2 / math.sqrt(4 + z**2)
    assert all_won == pytest.approx((1, 4 / (4 + z**2), 1))
    assert all_tied == pytest.approx((0.5, 0.5 - half_width, 0.5 + half_width))


def test_interval_covers_the_true_win_rate_of_few_prompts(evaluation):
    """Five prompts, each won with a probability of 97 %; a bootstrap would cover this in 15 of 100 cases."""
    covered = 0
    for num_won in range(6):
        scores = np.zeros((5, 1))
        scores[:num_won] = 1

        _, low, high = evaluation.win_rate(scores, np.full((5, 1), 0.5))

        probability = math.comb(5, num_won) * 0.97**num_won * 0.03 ** (5 - num_won)
        if low <= 0.97 <= high:
            covered += probability

    assert covered == pytest.approx(0.859, abs=1e-3)


def test_interval_of_many_images_is_normal_and_counts_images_that_agree_once(evaluation):
    """Independent images of a prompt count like prompts."""
    wins = (np.random.default_rng(1).random((400, 1)) < 0.6) * 1.0

    rate, low, high = evaluation.win_rate(wins, np.full((400, 1), 0.5))
    repeated = evaluation.win_rate(np.repeat(wins, 4, axis=1), np.full((400, 4), 0.5))
    grouped = evaluation.win_rate(wins.reshape(100, 4), np.full((100, 4), 0.5))

    half_width = 1.96 * math.sqrt(rate * (1 - rate) / 400)
    assert [low, high] == pytest.approx([rate - half_width, rate + half_width], abs=0.002)
    assert repeated == pytest.approx((rate, low, high))
    assert grouped == pytest.approx((rate, low, high), abs=0.01)


def test_candidates_are_compared_with_each_other_and_by_category(evaluation):
    # Scores of the base model and of the candidates a and b, for three prompts with one image each.
    tables = {"clip": np.array([[[1.0], [2.0], [3.0]], [[2.0], [2.0], [9.0]], [[0.0], [4.0], [3.0]]])}

    summary = evaluation.summarize(["clip"], ["base", "a", "b"], tables, ["dog", "dog", "cat"])
    without_categories = evaluation.summarize(["clip"], ["base", "a", "b"], tables, [None, None, None])

    (pair,) = summary["pairs"]
    expected = {"model": "b", "against": "a", "wins": 1, "ties": 0, "losses": 2}
    assert expected.items() <= pair.items()
    means = {row["category"]: row["clip"] for row in summary["categories"] if row["model"] == "a"}
    assert means == {"dog": 2, "cat": 9, "mean of categories": 5.5}
    assert without_categories["categories"] == []


# Files ---------------------------------------------------------------------------------------------------------------
def test_files_have_a_record_per_image_and_a_row_per_scorer_and_model(scored):
    images = list(itertools.product(["red", "blue"], [0, 1, 2], [0]))
    rows = list(itertools.product(SCORERS, ["red", "blue"]))

    records = records_of(scored)
    results = results_of(scored)

    assert [(record["model"], record["prompt_index"], record["image"]) for record in records] == images
    assert results.keys() == {"results", "pairs", "categories", "settings"}
    assert [(row["scorer"], row["model"]) for row in results["results"]] == rows


@pytest.mark.parametrize("scorer", SCORERS)
def test_results_summarize_the_scores(scored, scorer):
    records = records_of(scored)
    red = np.array([record[scorer] for record in records if record["model"] == "red"])
    blue = np.array([record[scorer] for record in records if record["model"] == "blue"])

    row_of_red, row = [row for row in results_of(scored)["results"] if row["scorer"] == scorer]

    assert row_of_red["mean"] == pytest.approx(red.mean())
    assert row["mean"] == pytest.approx(blue.mean())
    difference = blue - red
    assert row["difference"] == pytest.approx(difference.mean())
    assert row["difference_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(3))
    assert row["wins"] == (difference > 0).sum()
    assert row["losses"] == (difference < 0).sum()
    assert row["win_rate"] == pytest.approx(np.mean(blue > red))
    assert 0 <= row["win_rate_low"] <= row["win_rate"] <= row["win_rate_high"] <= 1


def test_settings_name_models_and_scorers(scored, inputs, scorers):
    settings = results_of(scored)["settings"]

    assert settings["models"]["blue"]["source"] == str(inputs / "blue")
    assert settings["hps_weights"] == str(scorers["hps_weights"])
    assert settings["scorer_versions"]["hps"].keys() == {"model", "weights"}
    assert settings["num_distinct_prompts"] == 3


def test_markdown_has_a_table_of_models_and_scorers_and_the_settings(scored, scorers):
    results = results_of(scored)
    means = [f"{row['mean']:.3f}" for row in results["results"] if row["model"] == "blue"]

    text = (scored / "results.md").read_text()

    header, _, red, blue = text.splitlines()[:4]
    assert header == f"| model | {' | '.join(SCORERS)} |"
    assert "%" not in red
    assert blue == f"| blue | {' | '.join(means)} |"
    assert f"- clip: {scorers['clip_model']}" in text
    assert json.loads(text.split("```json")[1].strip("`\n")) == results["settings"]


def test_grid_shows_largest_wins_and_largest_losses(evaluation, tmp_path):
    names = "abcdefghijkl"
    gains = [1, -1, 5, -5, 0, 7, 3, -3, -9, -2, 2, 9]
    colours = {}
    pairs = []
    for i, (name, gain) in enumerate(zip(names, gains, strict=True)):
        colours[name] = tuple(np.random.default_rng(i).integers(256, size=3).tolist())
        records = []
        for model, colour, score in (("base", colours[name], 20), ("new", colours[name][::-1], 20 + gain)):
            file = tmp_path / f"{model}-{name}.png"
            Image.new("RGB", (8, 8), colour).save(file)
            records.append({"prompt": f"prompt {name}", "model": model, "file": str(file), "clip": score})
        pairs.append(tuple(records))

    grid = evaluation.draw_grid("clip", pairs)

    # Four wins from the largest on, and four losses up to the largest. A tile is 384 x 384 below 40 pixels of text.
    assert grid.size == (2 * 384, 8 * 424)
    for row, name in enumerate("lfcgjhdi"):
        middle = row * 424 + 40 + 192
        assert grid.getpixel((192, middle)) == colours[name]
        assert grid.getpixel((384 + 192, middle)) == colours[name][::-1]
