"""What is no array of a served library, or more than one: refused with a way out, and the way out leads out."""

import array
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.lib.recfunctions  # one of the ways out needs it
import pytest

import bnarray as bn

VALUES = np.random.default_rng(0).normal(2, 3, (6, 3)).astype(np.float32)


def _way_out(refused: Any, function: Any = bn.moments) -> str:
    """The conversion that the error names."""
    with pytest.raises(TypeError) as caught:
        function(refused)
    found = re.search(r"(?:convert it, for example by|convert it by|pass) (.*)", str(caught.value))
    assert found, caught.value
    return found[1]


def _led_out(x: Any, **axis: Any) -> bn.Moments:
    """The moments of what the conversion makes of x, which is all that is done with it."""
    written = _way_out(x).partition(" (")[0].partition(", with")[0]
    return bn.moments(eval(written, {"numpy": np, "x": x}), **axis)


def _stand_in(module: str, name: str, **attributes: Any) -> Any:
    """An object that only says it is another library's: these libraries may not be installed."""
    return type(name, (), {"__module__": module, **attributes})()


class Quantity(np.ndarray):
    """Stands in for subclasses with units."""


with pytest.warns(PendingDeprecationWarning):
    MATRIX = np.matrix(VALUES)

REFUSED = {
    "list": (VALUES.tolist(), "x is a builtins.list"),
    "tuple": (tuple(map(tuple, VALUES.tolist())), "x is a builtins.tuple"),
    "memoryview": (memoryview(VALUES), "x is a builtins.memoryview"),
    "matrix": (MATRIX, "x is a numpy.matrix, whose meaning would be lost"),
    "recarray": (VALUES.view(np.recarray), "x is a numpy.rec.recarray"),
    "subclass": (VALUES.view(Quantity), "Quantity, whose meaning would be lost"),
    "structured": (VALUES.view([("a", "f4"), ("b", "f4"), ("c", "f4")]).reshape(6), "x has dtype"),
    "integers": (np.rint(VALUES * 100).astype(int), "x has dtype int64"),
    "strings": (VALUES.astype(str), "x has dtype <U"),
    "pandas, a stand-in": (
        _stand_in("pandas.core.frame", "DataFrame", to_numpy=lambda self: VALUES),
        "x is a pandas.core.frame.DataFrame",
    ),
    "xarray, a stand-in": (
        _stand_in("xarray.core.dataarray", "DataArray", data=VALUES),
        "x is a xarray.core.dataarray.DataArray",
    ),
    "pint, a stand-in": (_stand_in("pint", "Quantity", magnitude=VALUES), "x is a pint.Quantity"),
    "polars, a stand-in": (
        _stand_in("polars.dataframe.frame", "DataFrame", to_numpy=lambda self: VALUES),
        "x is a polars",
    ),
    "an object with __array__": (
        _stand_in("somewhere", "Holder", __array__=lambda self, dtype=None, copy=None: VALUES),
        "x is a somewhere.Holder",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_a_way_out(kind: str) -> None:
    x, message = REFUSED[kind]
    for function in (bn.batch_norm, bn.batch_norm_forward, bn.moments):
        with pytest.raises(TypeError, match=message):
            function(x)
    for keyword in ("weight", "bias", "where", "residual", "out"):
        with pytest.raises(TypeError, match=f"{keyword} "):
            bn.batch_norm(VALUES.copy(), **{keyword: x})
    tolerance = {"integers": 1e-2}.get(kind, 1e-6)
    expected = bn.moments(VALUES) if kind != "integers" else bn.moments((VALUES * 100).astype(np.float32))
    np.testing.assert_allclose(_led_out(x).mean, expected.mean, rtol=tolerance)


@pytest.mark.parametrize("kind", [array.array, bytes, bytearray])
def test_buffers(kind: Any) -> None:
    x = array.array("f", VALUES[:, 0].tolist()) if kind is array.array else kind(VALUES[:, 0].tobytes())
    np.testing.assert_allclose(_led_out(x, axis=()).mean, VALUES[:, 0].mean(), rtol=1e-6)


def test_scalars_and_nothing() -> None:
    for x in (1.5, 3, True):
        with pytest.raises(TypeError, match=f"x is a builtins.{type(x).__name__}"):
            bn.batch_norm(x, axis=())
    assert _led_out(1.5, axis=()).mean == 1.5
    with pytest.raises(TypeError, match=r"x is a builtins\.NoneType; it should be an array of NumPy.*standard$"):
        bn.batch_norm(None)
    with pytest.raises(TypeError, match=r"kernel is a builtins\.list.*numpy\.asarray\(kernel\)"):
        bn.fold([[1.0]], None, bn.BatchNorm(1))


def test_masked_array() -> None:
    """Its mask counts where the message says to put it."""
    x = np.ma.masked_greater(VALUES, 4)
    assert x.mask.any()
    assert "pass its data as x and where=~numpy.ma.getmaskarray(x)" in str(_refusal(x))
    m = bn.moments(x.data, where=~np.ma.getmaskarray(x))
    np.testing.assert_allclose(m.mean, x.mean(axis=0), rtol=1e-6)
    with pytest.raises(TypeError, match=r"weight is a masked array.*pass its data as weight alone"):
        bn.batch_norm(VALUES, np.ma.ones(3))


def _refusal(x: Any) -> TypeError:
    with pytest.raises(TypeError) as caught:
        bn.batch_norm(x)
    return caught.value


def test_memmap(tmp_path: Path) -> None:
    """A memmap's elements are an array's: all of the functions take it, and results are plain arrays."""
    x = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=VALUES.shape)
    x[:] = VALUES
    y, saved = bn.batch_norm_forward(x, residual=x, where=x > 0)
    gradients = bn.batch_norm_backward(x, saved)
    expected, again = bn.batch_norm_forward(VALUES, residual=VALUES, where=VALUES > 0)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(gradients.x, bn.batch_norm_backward(VALUES, again).x)
    for result in (y, gradients.x, bn.moments(x).mean, bn.RunningStats(3, like=x).mean, bn.BatchNorm(3, like=x).weight):
        assert type(result) is np.ndarray
    assert bn.batch_norm(x, out=x) is x


def test_pyarrow() -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the way out for its arrays is not verified")
    column = VALUES[:, 0].tolist()
    for x in (pa.array(column), pa.chunked_array([column[:2], column[2:]])):
        np.testing.assert_allclose(_led_out(x, axis=()).mean, np.mean(column), rtol=1e-6)
    holes = [None if i == 1 else number for i, number in enumerate(column)]
    for x in (pa.array(holes), pa.chunked_array([holes[:2], holes[2:]])):
        found = re.fullmatch(r"(.*) \(with nulls also where=(.*)\)", _way_out(x))
        assert found
        data, where = (eval(written, {"x": x}) for written in found.groups())
        m = bn.moments(data, axis=(), where=where)
        assert m.count == 5
        np.testing.assert_allclose(m.mean, np.mean(column[:1] + column[2:]), rtol=1e-6)
        y = bn.batch_norm(data, axis=(), where=where)
        np.testing.assert_array_equal(np.isnan(y), ~where)
    table = pa.table({name: VALUES[:, i] for i, name in enumerate("abc")})
    for x in (table, table.to_batches()[0], pa.Tensor.from_numpy(VALUES)):
        np.testing.assert_allclose(_led_out(x).mean, VALUES.mean(axis=0), rtol=1e-5)


def test_pandas() -> None:
    pd = pytest.importorskip("pandas", reason="pandas is not installed: its own frames are not verified")
    frame = pd.DataFrame(VALUES)
    np.testing.assert_allclose(_led_out(frame).mean, VALUES.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(_led_out(frame[0], axis=()).mean, VALUES[:, 0].mean(), rtol=1e-5)


def test_xarray() -> None:
    xr = pytest.importorskip("xarray", reason="xarray is not installed: its own arrays are not verified")
    x = xr.DataArray(VALUES, dims=("batch", "channel"))
    np.testing.assert_allclose(_led_out(x, axis=x.get_axis_num("channel")).mean, VALUES.mean(axis=0), rtol=1e-5)


def test_scipy() -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="SciPy is not installed: its arrays are not verified")
    x = sparse.csr_array(np.where(VALUES > 3, VALUES, 0))
    np.testing.assert_allclose(_led_out(x).mean, np.where(VALUES > 3, VALUES, 0).mean(axis=0), rtol=1e-5)
