"""What the documentation site is made with. (The site itself is built, and its links checked, by `.ci/run`.)"""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn", reason="the demo extra is not installed: what draws the site's pictures is not verified")

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a script of docs/, without its main."""
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return lambda name: runpy.run_path(str(DOCS / name))


def test_links(docs: Any, tmp_path: Path) -> None:
    broken = docs("check.py")["broken"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "second.html").write_text('<p id="place"></p><a href="../first.html#top">up</a>')
    first = tmp_path / "first.html"
    right = '<a id="top" href="folder/second.html#place"></a><a href="https://elsewhere.org">out</a><img src="data:,">'
    first.write_text(right)
    assert list(broken(tmp_path)) == []
    for wrong, what in (
        ('<a href="third.html">', "third.html is not there"),
        ('<img src="picture.png">', "picture.png is not there"),
        ('<a href="folder/second.html#other">', "has no such place"),
        ('<a href="#other">', "has no such place"),
        ('<script src="https://elsewhere.org/a.js">', "from elsewhere"),
        ('<link rel="stylesheet" href="//elsewhere.org/a.css">', "from elsewhere"),
    ):
        first.write_text(right + wrong)
        (fault,) = broken(tmp_path)
        assert what in fault
    assert list(broken(tmp_path / "nothing")) == [f"{tmp_path / 'nothing'} has no pages"]


def test_pictures_are_in_the_color_of_the_page(docs: Any, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    draw = docs("draw.py")
    written = []
    with plt.rc_context():
        for name in ("a", "a", "b"):
            draw["use_style"]()
            figure, axes = plt.subplots()
            axes.plot([0, 1], "o")
            axes.set_title("Title")
            draw["save"](figure, tmp_path / f"{name}.svg")
            plt.close(figure)
            written.append((tmp_path / f"{name}.svg").read_text(encoding="utf-8"))
    first, again, other = written
    assert first == again
    assert "currentColor" in first
    assert draw["INK"] not in first
    assert "Title" in first  # as text
    places, others = ({part.split('"')[0] for part in svg.split(' id="')[1:]} for svg in (first, other))
    assert places
    assert not places & others  # so that both can be in one page


def test_claims(docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import matplotlib.pyplot as plt

    arguments = ["--seeds", "2", "--steps", "3", "--demo-steps", "20", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["claims.py", *arguments])
    with plt.rc_context():
        docs("claims.py")["main"]()
        plt.close("all")
    tables = capsys.readouterr().out
    for what in ("learning rate", "deviation of the first weights", "examples in a batch"):
        assert f"| {what} | without | with |" in tables
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claims-sweeps.svg", "claims-training.svg"]


def test_every_script_of_the_gallery_is_an_example() -> None:
    scripts = sorted((DOCS / "examples").glob("*.py"))
    assert scripts
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert text.startswith(('"""\n', 'r"""\n'))
        assert "# %%" in text
