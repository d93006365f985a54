"""Draw the results in `benchmarks/results` for the documentation: ``python -m benchmarks.report``.

Writes `docs/performance.md` and SVGs beside it, of every machine that has results; needs no network, and the same
results give the same files. Of each benchmark the newest commit that has it is shown, and in the history all of them.
"""

import ast
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import compare

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "benchmarks" / "results"
_COMPARED = _ROOT / "benchmarks" / "compared"
_PAGE = _ROOT / "docs" / "performance.md"
_COLOURS = ["#3b8ed0", "#e0822f", "#3aa66b", "#c2619c", "#9a8bd0", "#b5a030"]  # on white and on black
_INK = "#010203"  # what is drawn in it takes the page's colour
_PAGES = (
    "<style>svg:root { color: #1f2328 } @media (prefers-color-scheme: dark) { svg:root { color: #dfe3e8 } }</style>"
)

_HEAD = """# Performance

Made by `python -m benchmarks.report` from the results in `benchmarks/results` and `benchmarks/compared`: what they are,
and how to measure your own machine, is told in [benchmarks](benchmarks.md). Times differ by some 10 % between runs of
the same code; what is about memory and accuracy does not.
"""
#: By name of the benchmark in `peers`: title, column of `benchmarks.compare` and its power, meaning.
_RATIOS = {
    "limit": (
        "Against the limit",
        "bnarray out= / limit",
        1,
        "time over what the bytes that must move take at the speed of the fastest copy",
    ),
    "peers": ("Against the best peer", "best peer / bnarray", -1, "time over that of the fastest other library"),
}
_SCALES = {"ms": 1e3, "µs": 1e6}
_PASSES = {
    "forward": "passes.Forward.time_forward",
    "evaluation": "passes.Evaluation.time_evaluation",
    "backward": "passes.Backward.time_backward",
}
_CALLS = {"calls": "overhead.Overhead.time_call"}
#: From a new interpreter.
_STARTS = {
    "import": "startup.Startup.timeraw_import",
    "first result": "startup.Startup.timeraw_first_result",
    "first result, with kernels to compile": "startup.Cold.timeraw_first_result",
}
#: Of the newest commit: benchmark, unit, and how many of asv's units it is.
_NUMBERS = {
    "Calls on 8×4": ("overhead.Overhead.time_call", "µs", 1e-6),
    "Most memory of the process, 103 MB in an array": ("memory.Peak.peakmem_call", "MB", 1e6),
    "Most memory of `bnarray normalize`, by MB of the file": ("streams.Normalize.peakmem_normalize", "MB", 1e6),
    "Farthest from float64: y, by dtype and mean in deviations": ("accuracy.Accuracy.track_y", "ulp", 1),
    "Farthest from float64: dx": ("accuracy.Accuracy.track_dx", "ulp", 1),
}

Row = tuple[Any, ...]  # the values of a benchmark's parameters
Values = dict[Row, float]


class Commit(NamedTuple):
    """The results of one commit on one machine."""

    name: str
    values: dict[str, Values]  # by the benchmark's name, without what is n/a


def read(folder: Path) -> list[Commit]:
    """Return a machine's results, in the order of the commits' dates."""
    from asv.results import iter_results

    dated = []
    for results in iter_results(str(folder)):
        values = {}
        for name in results.get_all_result_keys():
            params = results.get_result_params(name)
            found = results.get_result_value(name, params)
            rows = [tuple(map(ast.literal_eval, row)) for row in itertools.product(*params)]
            values[name] = {
                row: value
                for row, value in zip(rows, found or [None] * len(rows), strict=True)
                if value is not None and not math.isnan(value)
            }
        dated.append((results.date, Commit(results.commit_hash[:7], values)))
    return [commit for _, commit in sorted(dated, key=lambda each: each[0])]


def newest(commits: Iterable[Commit], name: str) -> Values:
    """Return the results of the last commit that has any of a benchmark."""
    return next((each.values[name] for each in reversed(list(commits)) if each.values.get(name)), {})


def _figure(width: float, height: float, panels: int) -> Any:
    """Axes without a background."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inked = ["text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"]
    plain = {
        "svg.fonttype": "none",
        "svg.hashsalt": "bnarray",
        "font.size": 9,
        "grid.color": "#808080",
        "grid.alpha": 0.3,
    }
    matplotlib.rcParams.update(dict.fromkeys(inked, _INK) | plain)
    return plt.subplots(1, panels, squeeze=False, sharey=True, figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    file = io.StringIO()
    metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # the same bytes each time; no other picture's names
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    plt.close(figure)
    head, tag, rest = file.getvalue().replace(_INK, "currentColor").partition("<defs>")
    path.parent.mkdir(exist_ok=True)
    path.write_text(head + _PAGES + tag + rest)


def _name_ticks(axis: Any) -> None:
    """Name 1, 2, 5, 10, … of a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def draw_ratios(rows: Mapping[str, Mapping[str, float]], label: str, path: Path) -> None:
    """Draw a line of dots for each array, one dot for each step; left of 1 is faster."""
    figure, ((panel,),) = _figure(7.5, 1 + 0.24 * len(rows), 1)
    for step, colour in zip(compare.STEPS, _COLOURS, strict=False):
        points = [(each[step], i) for i, each in enumerate(rows.values()) if step in each]
        if points:
            panel.scatter(*zip(*points, strict=True), color=colour, label=step, s=26, alpha=0.9, linewidths=0)
    panel.axvline(1, color=_INK, linewidth=1)
    panel.set(xscale="log", xlabel=label)
    _name_ticks(panel.xaxis)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.invert_yaxis()
    panel.grid(visible=True)
    figure.legend(loc="outside upper center", ncols=len(compare.STEPS), frameon=False)
    _save(figure, path)


def draw_history(commits: list[Commit], panels: Mapping[str, Mapping[str, list[float]]], unit: str, path: Path) -> None:
    """Draw a panel for each benchmark, a line for each array, over the commits."""
    figure, (axes,) = _figure(10, 4.4, len(panels))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, values in lines.items():
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            panel.plot(range(len(commits)), values, color=colour, marker=".", label=name)
        panel.set(title=title, yscale="log")
        _name_ticks(panel.yaxis)
        panel.set_xticks(range(len(commits)), [commit.name for commit in commits], rotation=90, fontsize=7)
        panel.grid(visible=True)
    axes[0].set_ylabel(unit)
    handles = {}
    for panel in axes:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
    _save(figure, path)


def _array(shape: str, layout: str, dtype: str = "float32") -> str:
    plane = shape.count("x") == 1
    return ", ".join([shape.replace("x", "×"), *([] if plane else [layout]), *([] if dtype == "float32" else [dtype])])


def ratios_of_suite(values: Values) -> dict[str, dict[str, float]]:
    """By array and step, what a benchmark over shape × layout × dtype × step has."""
    found: dict[str, dict[str, float]] = {}
    for (shape, layout, dtype, step), value in values.items():
        found.setdefault(_array(shape, layout, dtype), {})[step] = value
    return found


def ratios_of_rows(rows: list[dict[str, Any]], ratio: str, power: int) -> dict[str, dict[str, float]]:
    """The same of what `benchmarks.compare` wrote, for its most threads."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["threads"] == max(each["threads"] for each in rows):
            array = _array("x".join(map(str, row["shape"])), row["layout"], row["dtype"])
            found.setdefault(array, {})[row["step"]] = row[ratio] ** power
    return found


def lines_over(commits: list[Commit], name: str, scale: float) -> dict[str, list[float]]:
    """By array, a benchmark's values over the commits, where several have it."""
    rows = list(dict.fromkeys(row for commit in commits for row in commit.values.get(name, {})))
    lines = {row: [scale * commit.values.get(name, {}).get(row, math.nan) for commit in commits] for row in rows}
    several = {row: line for row, line in lines.items() if sum(not math.isnan(each) for each in line) > 1}
    return {_array(*row[1:4]) if len(row) > 1 else row[0]: line for row, line in several.items()}


def table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def ratio_table(ratios: Mapping[str, Mapping[str, float]]) -> str:
    steps = [step for step in compare.STEPS if any(step in each for each in ratios.values())]
    cells = ([name, *(f"{each[step]:.2f}" if step in each else "" for step in steps)] for name, each in ratios.items())
    return table(["array", *steps], cells)


class Machine:
    """The results of one machine, and what the page says of them."""

    def __init__(self, folder: Path) -> None:
        self.description = json.loads((folder / "machine.json").read_text())
        self.name = self.description["machine"]
        self.commits = read(folder)
        compared = _COMPARED / f"{self.name}.json"
        self.compared = json.loads(compared.read_text()) if compared.exists() else []

    def text(self) -> str:
        what = ", ".join(self.description[key] for key in ("cpu", "ram", "os") if key in self.description)
        last = f" The newest commit measured is {self.commits[-1].name}." if self.commits else ""
        parts = [f"## {self.name}\n", f"{what}.{last}\n", *self._ratios(), *self._history(), *self._numbers()]
        return "\n".join(parts)

    def _picture(self, kind: str) -> Path:
        return _PAGE.with_suffix("") / f"{self.name}-{kind}.svg"

    def _ratios(self) -> Iterator[str]:
        for kind, (title, key, power, meaning) in _RATIOS.items():
            if self.compared:
                source, ratios = "benchmarks.compare", ratios_of_rows(self.compared, key, power)
            else:
                source, ratios = "benchmarks.peers", ratios_of_suite(newest(self.commits, f"peers.Peers.track_{kind}"))
            if ratios:
                draw_ratios(ratios, meaning, self._picture(kind))
                yield f"### {title}\n\nThe {meaning}: lower is better (`{source}`).\n"
                yield f"{_image(self._picture(kind), title)}\n"
                yield ratio_table(ratios)

    def _history(self) -> Iterator[str]:
        yield from self._over_commits("passes", "The passes over commits", "ms", _PASSES)
        yield from self._over_commits("calls", "Calls on 8×4 over commits", "µs", _CALLS)

    def _over_commits(self, kind: str, title: str, unit: str, names: Mapping[str, str]) -> Iterator[str]:
        commits = [each for each in self.commits if any(each.values.get(name) for name in names.values())]
        if len(commits) > 1:
            lines = {panel: lines_over(commits, name, _SCALES[unit]) for panel, name in names.items()}
            draw_history(commits, lines, unit, self._picture(kind))
            yield f"### {title}\n\nIn {unit}, by the date of the commit (`benchmarks.history`).\n"
            yield f"{_image(self._picture(kind), title)}\n"

    def _numbers(self) -> Iterator[str]:
        starts = {title: newest(self.commits, name) for title, name in _STARTS.items()}
        if any(starts.values()):
            yield "### From a new interpreter\n"
            yield table(["to", "ms"], ([title, f"{1e3 * each[()]:.0f}"] for title, each in starts.items() if each))
        for title, (name, unit, scale) in _NUMBERS.items():
            values = newest(self.commits, name)
            if values:
                yield f"### {title}\n"
                yield table(
                    [f"`{name}`", unit],
                    ([", ".join(map(str, row)), f"{value / scale:.3g}"] for row, value in values.items()),
                )


def _image(path: Path, alt: str) -> str:
    return f"![{alt}]({path.parent.name}/{path.name})"


def main() -> None:
    machines = [Machine(path.parent) for path in sorted(_RESULTS.glob("*/machine.json"))]
    _PAGE.write_text("\n".join([_HEAD, *(machine.text() for machine in machines)]))


if __name__ == "__main__":
    main()
