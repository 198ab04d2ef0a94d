"""The study's page: a section for each claim, with its table and plot."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study.runs import Study
from benchmarks.study.section import Section

HEAD = """# The paper's claims, measured again

Written by `make study`. Small decoders on scenes of the `shapes` source, {tokens:,} tokens each, several seeds where a row says so; scores
on {prompts} prompts of the val split, with 95 % intervals over prompts in brackets. The decoders are a thousand times smaller than the
paper's, and their images are simpler than any photograph: what holds here may not hold there, and vice versa.
"""


def write(study: Study, sections: dict[str, Section], out: Path) -> None:
    """Write ``study.md`` and its plots, ``study-NAME.png``."""
    out.mkdir(parents=True, exist_ok=True)
    head = HEAD.format(tokens=study.tokens, prompts=len(study.captions))
    blocks = [head, "| claim | here |\n|---|---|\n" + "\n".join(f"| {s.title} | {s.verdict} |" for s in sections.values()) + "\n"]
    for name, section in sections.items():
        header, *rows = section.table
        table = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
        plot = f"![{section.title}](study-{name}.png)\n\n" if section.curves else ""
        blocks.append(f"## {section.title}\n\nThe paper: {section.paper}\n\n{section.verdict}\n\n{plot}{table}\n")
        if section.curves:
            _plot(section, out / f"study-{name}.png")
    (out / "study.md").write_text("\n".join(blocks))


def _plot(section: Section, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

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
        axes.xaxis.set_major_formatter(ScalarFormatter())
    elif section.logarithmic == "y":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel(section.axes[0])
    axes.set_ylabel(section.axes[1])
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
