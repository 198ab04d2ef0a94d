"""The study's page: a section for each claim, with its table and plot."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study.runs import Study
from benchmarks.study.section import Section

HEAD = """# The paper's claims, measured again

Written by `make study`. Small decoders on scenes of the `shapes` source, {tokens:,} tokens each, {seeds} seeds a setting; (c) and (e) are
of the decoders of {runs} pipeline runs. Scores are of {prompts} prompts of the val split. The decoders are a thousand times smaller than
the paper's, and their images are simpler than any photograph: what holds here may not hold there, and vice versa.

An effect is a mean difference over trainings, by pairs of a seed or of a run, with its 95 % interval over trainings (Student's). A
claim holds if the interval excludes 0 on its side, and is undecided if the interval includes 0. Brackets are 95 % intervals over the
prompts of one training.
"""
COLUMNS = ["claim", "effect", "95 % interval", "verdict"]


def write(study: Study, sections: dict[str, Section], out: Path) -> None:
    """Write ``study.md`` and its plots, ``study-NAME.png``."""
    out.mkdir(parents=True, exist_ok=True)
    head = HEAD.format(tokens=study.tokens, seeds=study.seeds, runs=len(study.runs), prompts=len(study.captions))
    summary = [[section.title[:3], *finding.cells] for section in sections.values() for finding in section.findings]
    blocks = [head, _table([["", *COLUMNS], *summary]) + "\n"]
    for name, section in sections.items():
        plot = f"![{section.title}](study-{name}.png)\n\n" if section.curves else ""
        findings = _table([COLUMNS, *[finding.cells for finding in section.findings]])
        blocks.append(
            f"## {section.title}\n\nThe paper: {section.paper}\n\n{findings}\n\n{section.note}\n\n{plot}{_table(section.table)}\n"
        )
        if section.curves:
            _plot(section, out / f"study-{name}.png")
    (out / "study.md").write_text("\n".join(blocks))


def _table(rows: list[list[str]]) -> str:
    header, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *others))


def _plot(section: Section, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colors: dict[str, str] = {}  # all seeds of a setting have one color and one entry in the legend
    for name, points in section.curves.items():
        group = name.partition(", seed ")[0]
        label = "_" if group in colors else group
        color = colors.setdefault(group, f"C{len(colors)}")
        xs, ys, lows, highs = zip(*points, strict=True)
        axes.plot(xs, ys, marker="o", markersize=3, label=label, color=color)
        axes.fill_between(xs, lows, highs, alpha=0.12, color=color)
    if section.logarithmic == "x":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    elif section.logarithmic == "y":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(section.axes[0])
    axes.set_ylabel(section.axes[1])
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
