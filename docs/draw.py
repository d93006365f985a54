"""Pictures for pages that are light or dark: ``python docs/draw.py`` draws those of docs/figures/ anew.

Text and lines are of the ``currentColor``. Inside a page that is the page's (``_sphinx/inline_svg.py``); a picture that
is shown on its own goes by the reader's preference.
"""

import io
import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

DOCS = Path(__file__).parent

#: What matplotlib draws in this colour becomes the page's.
INK = "#010203"
_LIGHT_AND_DARK = (
    "<style>svg:root { color: #1f2328 } @media (prefers-color-scheme: dark) { svg:root { color: #dfe3e8 } }</style>"
)
#: Examples whose picture other pages show.
SHOWN = ("batch_size", "cancellation", "far_from_zero", "merge")
#: To be told apart on white and on black.
COLORS = ("#3b82c4", "#d9730d", "#2a9d6f", "#a06cd5", "#888888")


def use_style(*_: Any) -> None:
    """Make matplotlib draw for both kinds of page; nothing is wider than a telephone can show legibly."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "axes.edgecolor": INK,
            "axes.facecolor": "none",
            "axes.labelcolor": INK,
            "axes.prop_cycle": matplotlib.cycler(color=COLORS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": "medium",
            "figure.constrained_layout.use": True,
            "figure.facecolor": "none",
            "figure.figsize": (5.4, 3.2),
            "font.family": "sans-serif",
            "legend.frameon": False,
            "svg.fonttype": "none",
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same numbers, that can stand in a page beside others."""
    with matplotlib.rc_context({"svg.hashsalt": path.stem}), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
        svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"\n?<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(<svg[^>]*>)", rf"\1{_LIGHT_AND_DARK}", svg, count=1)
    path.write_text(svg, encoding="utf-8")


def scraper(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save a gallery example's figures, and return how its page shows them."""
    import matplotlib.pyplot as plt

    shown = []
    for number, place in zip(plt.get_fignums(), block_vars["image_path_iterator"], strict=False):
        path, figure = Path(place).with_suffix(".svg"), plt.figure(number)
        save(figure, path)
        alt = figure.get_suptitle() or "; ".join(axes.get_title() for axes in figure.axes if axes.get_title())
        shown.append(f".. image:: /{path.relative_to(gallery_conf['src_dir'])}\n   :alt: {alt}\n")
    plt.close("all")
    return "\n".join(shown)


def main() -> None:
    import matplotlib.pyplot as plt

    for name in SHOWN:
        matplotlib.rcdefaults()
        use_style()
        runpy.run_path(str(DOCS / "examples" / f"{name}.py"))
        save(plt.gcf(), DOCS / "figures" / f"{name}.svg")
        plt.close("all")


if __name__ == "__main__":
    main()
