"""README's table of libraries: its lines are run."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnarray as bn

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LINES = re.search(r"```python\n(x = \.\.\.\n.*?dx = \.\.\.\n)```", README, re.DOTALL)
_, *ROWS = re.findall(r"^\| ([\w.]+) \| `(.+)` \| `(.+)` \|$", README, re.MULTILINE)  # without the head


def test_the_table_is_found() -> None:
    assert LINES is not None
    assert [row[0] for row in ROWS] == ["numpy", "torch", "jax", "autograd", "dask.array", "array_api_strict"]


@pytest.mark.parametrize(("library", "make", "differentiate"), ROWS, ids=[row[0] for row in ROWS])
def test_five_lines(library: str, make: str, differentiate: str) -> None:
    root = library.partition(".")[0]
    module = pytest.importorskip(root, reason=f"{root} is not installed: its lines in README are not verified")
    import_module(library)
    values, dy = np.random.default_rng(0).normal(5, 2, (2, 60, 3)).astype(np.float32)
    names: dict[str, Any] = {"bn": bn, "np": np, "values": values, "dy": dy, root: module}
    assert LINES is not None
    exec(LINES[1].replace("x = ...", f"x = {make}", 1).replace("dx = ...", f"dx = {differentiate}"), names)
    expected = bn.batch_norm_backward(dy, bn.batch_norm_forward(values)[1]).x
    kind = type(names["x"])
    assert type(names["y"]) is type(names["z"]) is type(names["dx"]) is kind
    y, dx = (np.asarray(each.detach() if root == "torch" else each) for each in (names["y"], names["dx"]))
    np.testing.assert_allclose(y, bn.batch_norm(values), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)
    assert names["stats"].num_updates == 1
