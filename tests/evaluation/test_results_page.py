"""The page of the fresh runs, as git has it and for made-up runs; the README quotes it."""

from pathlib import Path

import pytest
from results_support import fresh_run

from cm3leon.evaluation.reference import RESULTS, FreshRun, read_runs
from cm3leon.evaluation.results_page import HEADLINE_HEAD, headlines, page, task_of, three_digits

ROOT = Path(__file__).parents[2]
FIVE = [fresh_run(seed, **({"processor": "Intel Xeon, AVX-512"} if seed > 2 else {})) for seed in range(5)]


def rows(text: str, first: str = "|") -> list[list[str]]:
    """Cells of the rows of tables, of those that begin as given."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(first)]


def score_row(runs: list[FreshRun], name: str) -> list[str]:
    [row] = [row for row in rows(page(runs)) if len(row) == 7 and row[1].startswith(f"`{name}`")]
    return row


def quoted(readme: str, runs: list[FreshRun]) -> bool:
    """Whether a README has the headlines of runs as its only table of them, word by word."""
    return readme.count(HEADLINE_HEAD) == 1 and f"\n\n{headlines(runs)}\n\n" in readme


def test_the_page_is_what_its_file_of_runs_gives() -> None:
    assert (ROOT / RESULTS).with_suffix(".md").read_text() == page(read_runs(ROOT / RESULTS))


def test_the_readme_quotes_the_headlines() -> None:
    runs = read_runs(ROOT / RESULTS)
    readme = (ROOT / "README.md").read_text()
    if runs:
        assert quoted(readme, runs), f"the README's table of scores is to be:\n\n{headlines(runs)}"
    else:
        assert HEADLINE_HEAD not in readme and "These are of one fresh run" in readme


def test_a_readme_with_another_number_does_not_quote_the_page() -> None:
    readme = f"# cm3leon\n\n{headlines(FIVE)}\n\nmore\n"
    assert quoted(readme, FIVE)
    assert not quoted(readme.replace("0.72", "0.73"), FIVE) and not quoted(readme.replace("0.70–0.74", "0.70–0.75"), FIVE)
    assert not quoted(readme.replace("\n\nmore", "\n| more | 1 |\n"), FIVE) and not quoted(readme, FIVE[:2])


def test_runs_of_one_seed_are_told_from_runs_of_several() -> None:
    assert "5 fresh trainings with a seed each" in page(FIVE)
    assert "6 fresh trainings of 5 seeds" in page([*FIVE, fresh_run(0, threads=1)])


def test_scores_have_median_range_and_number_of_runs() -> None:
    assert score_row(FIVE, "composition")[2:] == ["0.020, other captions", "0.840, reconstructions", "**0.720**", "0.700–0.740", "5"]
    assert score_row(FIVE, "fd_encoder")[4:] == ["**0.070**", "0.090–0.050", "5"]  # the worst first
    without = [*FIVE[:4], fresh_run(4, scores={"composition": 0.1})]
    assert score_row(without, "vqa_accuracy")[-1] == "4" and score_row(without, "composition")[-2] == "0.100–0.730"
    assert "composition/prompts" not in page(FIVE)


def test_the_model_in_other_settings_is_a_row_below_the_same_ceiling() -> None:
    assert score_row(FIVE, "composition_one_candidate")[2:6] == ["", "0.840, reconstructions", "**0.470**", "0.450–0.490"]
    assert score_row(FIVE, "cider_beside_one_reference")[3] == "5.400, the first reference"


def test_seen_and_unseen_prompts_and_unknown_scores_have_places_of_their_own() -> None:
    assert task_of("composition_seen_prompts") == "text to image, seen prompts" != task_of("composition")
    assert task_of("clip_score_new_combinations") == "text to image, new combinations"
    assert task_of("some_new_task/share") == "some new task"
    new = [fresh_run(0, scores={"some_new_task/share": 0.25, "composition_of_new_things": 0.5})]
    assert score_row(new, "some_new_task/share")[0] == "some new task"
    assert score_row(new, "composition_of_new_things")[4] == "**0.500**"
    assert "`composition_of_new_things`" in page(new).partition("## Runs")[2]


def test_times_are_of_the_runs_that_were_not_interrupted() -> None:
    runs = [*FIVE, fresh_run(5, minutes=None, seconds={}, peak_megabytes=None)]
    text = page(runs)
    assert "Of 5 runs that went through" in text and "| sft | 10.0 | 10.0–10.1 |" in text
    assert "**32.0** | 30.0–34.0 |" in text and "Largest process: 2.00 to 4.00 GiB." in text
    assert [row[3] for row in rows(text.partition("## Runs")[2])[2:]] == ["30.0", "31.0", "32.0", "33.0", "34.0", "not counted"]
    assert "No run has times that count" in page([runs[-1]])
    assert "| sft | 10.0 | 10.0 |" in page(FIVE[:1]) and "Largest process: 2.00 GiB." in page(FIVE[:1])


@pytest.mark.parametrize(
    ("runs", "sentences"),
    [
        ([], ["There is no run yet"]),
        (FIVE[:1], ["There is one run of 5.", "2 runs on another kind of processor or thread count are missing"]),
        (FIVE[:4], ["There are 4 of 5 runs.", "1 run on another kind of processor or thread count is missing"]),
        ([*FIVE[:4], fresh_run(4, threads=1)], []),
        (FIVE, []),
    ],
)
def test_the_page_says_what_is_missing(runs: list[FreshRun], sentences: list[str]) -> None:
    text = page(runs)
    assert all(sentence in text for sentence in sentences)
    assert text.count("missing") + text.count(" of 5 runs.") + text.count("run of 5.") == len(sentences) - (not runs)


def test_runs_that_were_asked_something_else_are_left_out_and_counted() -> None:
    text = page([*FIVE, fresh_run(7, evaluation="old", date="2026-01-01")])
    assert "something else than the newest: 1 run." in text and "| 7 |" not in text


def test_numbers_have_three_digits() -> None:
    assert [three_digits(value) for value in (0.0, 0.7213, -0.0214, 5.1234, 32.41, 0.00012345)] == [
        "0.000", "0.721", "-0.021", "5.123", "32.4", "0.00012",
    ]  # fmt: skip
