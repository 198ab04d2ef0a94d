"""The page of the fresh runs, ``docs/results.md``: scores by task with baselines, ceilings, median and range; times; the runs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from cm3leon.evaluation.calibration import BASELINES, CEILINGS, calibrations_of, lower_is_better
from cm3leon.evaluation.reference import FreshRun, Spread, comparable, main_scores, spreads

WANTED, WANTED_ELSEWHERE = 5, 2
"""Runs that a headline is the median of, and how many of them are to be on another kind of processor or thread count."""
COUNTS = "/prompts"
"""End of the names of scores that are numbers of prompts."""
OTHER_PROMPTS = {"_seen_prompts": "text to image, seen prompts", "_new_combinations": "text to image, new combinations"}
"""End of the name of a score of other prompts than unseen ones -> its task."""
TASK_OF = {
    "composition": "text to image, unseen prompts",
    "clip_score": "text to image, unseen prompts",
    "fd_": "text to image, unseen prompts",
    "kd_": "text to image, unseen prompts",
    "coverage_": "text to image, unseen prompts",
    "write/": "text to image, letters",
    "layout/": "layouts",
    "condition/": "condition images",
    "edit/": "edits",
    "infill/": "inpainting",
    "vqa_": "VQA",
    "bleu_": "captions",
    "rouge_": "captions",
    "cider": "captions",
    "long_caption/": "long captions",
    "reasoning/": "reasoning",
    "super_resolution_": "upscaler",
}
"""Beginning of a score's name -> its task; another score is one of a task by the name before the slash."""
WORDS = {
    "real": "real images",
    "real_halves": "one half of the real images against the other",
    "majority": "most frequent answer",
    "one_reference": "the first reference",
    "left_out": "region left gray",
    "unchanged": "image unchanged",
}
"""Calibrations as the documentation calls them; others by their names."""
HEADLINES = {
    "composition": "**composition**: every stated attribute of the prompt is right; prompts whose content no training image shows",
    "composition_one_candidate": "the same, one candidate each, unranked",
    "composition_seen_prompts": "the same, prompts that stand in training",
    "composition_new_combinations": "the same, with a color or a relation of shapes that training never shows",
    "vqa_accuracy": "**VQA** accuracy",
    "edit/done_and_kept": "**edits** in which the change is made and the rest kept",
    "layout/iou": "**layouts**: IoU of requested and generated boxes",
    "cider_beside_one_reference": "**captions**, CIDEr against all but the first reference",
    "condition/agreement": "**condition images**: agreement of requested and extracted condition",
    "reasoning/accuracy": "**reasoning** accuracy, with explanation",
    "infill/composition": "**inpainting**: composition of images of which a region with an object was generated anew",
}
"""Scores, or calibrations that are the model's own, that the README quotes, with its words."""
READING = (
    "A range is from the worst to the best run. Baselines and ceilings are medians of the same runs. "
    "[evaluation.md](evaluation.md#the-record) defines the scores."
)
HEADLINE_HEAD = "| score | median | range | baseline | ceiling |"


def page(runs: Sequence[FreshRun]) -> str:
    """The page, Markdown; also of no runs."""
    counted = comparable(runs)
    parts = ["# Results", f"Written by `python -m benchmarks.repeat` from [results.json](results.json). {_about(counted)}"]
    if others := len(runs) - len(counted):
        parts.append(f"Left out, because they were asked something else than the newest: {_count(others, 'run')}.")
    if counted:
        parts += [
            READING,
            "## Headlines",
            headlines(runs),
            "## Scores by task",
            "\n".join(_scores(counted)),
            "## Minutes by stage",
            "\n".join(_minutes(counted)),
            "## Runs",
            "\n".join(_runs(counted)),
        ]
    return "\n\n".join(parts) + "\n"


def headlines(runs: Sequence[FreshRun]) -> str:
    """The table that the README quotes as it is: the headlines with two decimals. Those that no run has are left out."""
    table = _Table(comparable(runs), two_decimals)
    lines = [HEADLINE_HEAD, "|---|---|---|---|---|"]
    for name, words in HEADLINES.items():
        if found := table.spreads.get(name):
            lines.append(
                f"| {words} | **{two_decimals(found.median)}** | {table.range(found)} | {table.baseline(name)} | {table.ceiling(name)} |"
            )
    return "\n".join(lines)


def two_decimals(value: float) -> str:
    """ "0.72"."""
    return f"{value:.2f}"


def three_digits(value: float) -> str:
    """Three decimals, fewer for large values and more for small ones: "0.721", "32.4", "0.00012"."""
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


class _Table:
    """Scores and calibrations of runs as cells."""

    def __init__(self, runs: Sequence[FreshRun], number: Callable[[float], str]) -> None:
        self.number = number
        self.scores = spreads(run.scores for run in runs)
        calibration = spreads(run.calibration for run in runs)
        self.calibration = {name: found.median for name, found in calibration.items()}
        ends = (*BASELINES, *CEILINGS)
        read = {f"{name}_{end}" for name in self.scores for end in calibrations_of(self.calibration, name, ends)}
        self.own = {name: found for name, found in calibration.items() if name not in read}
        """Calibrations that are neither baseline nor ceiling: the model's scores in other settings."""
        self.spreads = {**self.scores, **self.own}

    def range(self, found: Spread) -> str:
        return f"{self.number(found.worst)}–{self.number(found.best)}"

    def baseline(self, name: str) -> str:
        return self._cell(calibrations_of(self.calibration, name, BASELINES))

    def ceiling(self, name: str) -> str:
        """In other settings, such as with one candidate, the ceiling is that of the score itself."""
        score = name if name in self.scores else max((s for s in self.scores if name.startswith(f"{s}_")), key=len, default=name)
        return self._cell(calibrations_of(self.calibration, score, CEILINGS))

    def _cell(self, found: Mapping[str, float]) -> str:
        return "; ".join(f"{self.number(value)}, {WORDS.get(end, end.replace('_', ' '))}" for end, value in found.items())


def task_of(name: str) -> str:
    """The task of a score, as the page calls it."""
    ends = (task for end, task in OTHER_PROMPTS.items() if name.endswith(end))
    found = next(ends, None) or next((task for start, task in TASK_OF.items() if name.startswith(start)), None)
    return found or name.partition("/")[0].replace("_", " ")


def _about(runs: Sequence[FreshRun]) -> str:
    """How many runs of what, and what is missing for a headline, in sentences."""
    if not runs:
        return f"**There is no run yet**; a headline is the median of {WANTED}."
    processors = Counter((run.processor, run.threads) for run in runs)
    where = ", ".join(f"{count} on {name} with {_count(threads, 'thread')}" for (name, threads), count in processors.most_common())
    commits = [f"`{commit[:7]}`" for commit in dict.fromkeys(run.commit for run in runs)]
    seeds = len({run.seed for run in runs})
    each = "with a seed each" if seeds == len(runs) else f"of {_count(seeds, 'seed')}"
    sentences = [f"Profile `{runs[0].profile}`, {_count(len(runs), 'fresh training')} {each}, scores of the test split: {where}."]
    sentences.append(f"{'Commit' if len(commits) == 1 else 'Commits'} {', '.join(commits)}.")
    if len(runs) < WANTED:
        sentences.append(f"**There are {len(runs)} of {WANTED} runs.**" if len(runs) > 1 else f"**There is one run of {WANTED}.**")
    elsewhere = len(runs) - processors.most_common(1)[0][1]
    if elsewhere < WANTED_ELSEWHERE:
        missing = WANTED_ELSEWHERE - elsewhere
        sentences.append(
            f"**{_count(missing, 'run')} on another kind of processor or thread count {'is' if missing == 1 else 'are'} missing.**"
        )
    return " ".join(sentences)


def _scores(runs: Sequence[FreshRun]) -> Iterator[str]:
    table = _Table(runs, three_digits)
    tasks = list(dict.fromkeys(["text to image, unseen prompts", *OTHER_PROMPTS.values(), *TASK_OF.values()]))
    named = sorted((tasks.index(task) if task in tasks else len(tasks), task, name) for name in table.spreads for task in [task_of(name)])
    yield "| task | score | baseline | ceiling | median | range | runs |"
    yield "|---|---|---|---|---:|---:|---:|"
    before = ""
    for _, task, name in named:
        if name.endswith(COUNTS):
            continue
        found = table.spreads[name]
        shown = f"`{name}`{', lower is better' if lower_is_better(name) else ''}"
        cells = ("" if task == before else task, shown, table.baseline(name), table.ceiling(name))
        yield f"| {' | '.join(cells)} | **{three_digits(found.median)}** | {table.range(found)} | {found.count} |"
        before = task


def _minutes(runs: Sequence[FreshRun]) -> Iterator[str]:
    timed = [run for run in runs if run.minutes is not None]
    if not timed:
        yield "No run has times that count: they were interrupted, or other work ran beside them."
        return
    yield f"Of {_count(len(timed), 'run')} that went through without an interruption; shortest to longest."
    yield ""
    yield "| stage | median | range |"
    yield "|---|---:|---:|"
    for stage in timed[0].seconds:
        minutes = [run.seconds[stage] / 60 for run in timed if stage in run.seconds]
        yield _row([stage, f"{statistics.median(minutes):.1f}", _span(minutes, 1, "–")])
    whole = [run.minutes for run in timed if run.minutes is not None]
    yield _row(["**all**, with what is between the stages", f"**{statistics.median(whole):.1f}**", _span(whole, 1, "–")])
    if peaks := [run.peak_megabytes / 1024 for run in timed if run.peak_megabytes]:
        yield ""
        yield f"Largest process: {_span(peaks, 2, ' to ')} GiB."


def _span(values: Sequence[float], digits: int, between: str) -> str:
    """The least and the greatest of some values, or the value if there is only one."""
    return between.join(f"{value:.{digits}f}" for value in ((min(values), max(values)) if len(values) > 1 else values))


def _runs(runs: Sequence[FreshRun]) -> Iterator[str]:
    names = main_scores({name for run in runs for name in run.scores})
    yield _row(["seed", "processor", "threads", "minutes", "date", "commit", *(f"`{name}`" for name in names)])
    yield _row(["---"] * (6 + len(names)))
    for run in runs:
        minutes = "not counted" if run.minutes is None else f"{run.minutes:.1f}"
        scores = [three_digits(run.scores[name]) if name in run.scores else "" for name in names]
        yield _row([str(run.seed), run.processor, str(run.threads), minutes, run.date[:10], f"`{run.commit[:7]}`", *scores])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
