"""Files of statistics that come from anywhere: statistics or a ValueError, in little memory, and nothing is run."""

import io
import json
import os
import struct
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnarray as bn


@pytest.fixture(params=["npz", "safetensors"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed: files of its format are not verified")
    return tmp_path / f"stats.{request.param}"


def _stats(**keywords: Any) -> bn.RunningStats:
    stats = bn.RunningStats(3, **{"update_rate": None} | keywords)
    bn.batch_norm(np.random.default_rng(0).normal(3, 2, (9, 3)), stats=stats)
    return stats


def _assert_equal(one: bn.RunningStats, other: bn.RunningStats) -> None:
    assert repr(one) == repr(other)
    assert type(one.count) is type(other.count)
    for name in ("mean", "var", "count"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def _refused(path: Path, *words: str) -> None:
    """The file is refused, with the words, without a warning and in memory of its own size."""
    limit = 20 * path.stat().st_size + 2_000_000
    tracemalloc.start()
    try:
        with warnings.catch_warnings(), pytest.raises(ValueError, match="holds no statistics saved by") as raised:
            bn.RunningStats.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("update_rate", [None, 0.25])
@pytest.mark.parametrize("shape", [3, (), (2, 3), 0, (0, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_there_and_back(path: Path, update_rate: float | None, shape: Any, masked: bool) -> None:
    stats = bn.RunningStats(shape, update_rate=update_rate, correction=0.5, nonfinite="raise")
    x = np.random.default_rng(0).normal(3, 2, (9, *stats.features_shape))
    where = np.random.default_rng(1).random(x.shape) < 0.7 if masked else None
    bn.batch_norm(x, stats=stats, axis=tuple(range(1, x.ndim)), where=where)
    stats.save(path)
    read = bn.RunningStats.load(path)
    _assert_equal(read, stats)
    m = bn.moments(x + 1, axis=tuple(range(1, x.ndim)))
    _assert_equal(read.updated(m), stats.updated(m))
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_exact_variances_to_the_bit(path: Path) -> None:
    """As they were loaded from elsewhere, not as their sums of squares, which are saved too, would have them again."""
    stats, var = bn.RunningStats(500, update_rate=None), np.random.default_rng(0).uniform(0.5, 3, 500)
    stats.load_state_dict(stats.state_dict() | {"running_var": var, "count": 7, "num_updates": 3})
    stats.save(path)
    np.testing.assert_array_equal(bn.RunningStats.load(path).var, var)


def test_paths_of_bytes(path: Path) -> None:
    _stats().save(os.fsencode(path))
    _assert_equal(bn.RunningStats.load(os.fsencode(path)), _stats())


def test_no_files(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bn.RunningStats.load(path)
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        bn.RunningStats.load(path)
    path.rmdir()
    with pytest.raises(FileNotFoundError):
        _stats().save(path / "no folder" / path.name)


def test_every_truncation(path: Path) -> None:
    _stats().save(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="holds no statistics saved by bnarray"):
            bn.RunningStats.load(path)


@pytest.mark.parametrize("changes", [1, 3])
def test_bits_that_flip(path: Path, changes: int) -> None:
    """What is read is what was saved, or nothing."""
    stats = _stats()
    stats.save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(changes)
    places = rng.integers(0, 8 * len(whole), (1500, changes))
    refused = 0
    for each in places:
        damaged = bytearray(whole)
        for bit in each:
            damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            _assert_equal(bn.RunningStats.load(path), stats)
        except ValueError as error:
            refused += "holds no statistics saved by bnarray" in str(error)
    assert refused > len(places) / 2


def test_junk(path: Path) -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 7, 8, 9, 22, 100, 5000):
        for begin in (b"", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b"\x08\0\0\0\0\0\0\0", b"\x80\x04"):
            path.write_bytes(begin + rng.bytes(size))
            _refused(path)


def test_an_array_alone(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    _refused(path)


# -- What a file says, by changes to one that is right -----------------------------------------------------------------

_ABOUT = {
    "format": "bnarray.RunningStats",
    "version": 1,
    "update_rate": None,
    "correction": 1.0,
    "nonfinite": "skip",
    "num_updates": 1,
    "num_skipped": 0,
}


def _content(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    stats = _stats()
    arrays = {"mean": stats.mean, "var": stats.var, "m2": stats.var * 8, "count": np.array(9)}
    about = _ABOUT | {name: value for name, value in changes.items() if name not in arrays}
    arrays |= {name: value for name, value in changes.items() if name in arrays}
    return about, {name: array for name, array in arrays.items() if array is not None}


def _write(path: Path, about: Any, arrays: dict[str, Any]) -> None:
    """As the library writes, whatever it is."""
    from bnarray.backends import _archive

    text = about if isinstance(about, str) else json.dumps(about)
    with path.open("wb") as file:
        _archive._container(str(path)).write(file, _archive._Content(text, arrays))


def test_the_files_of_these_tests_are_right(path: Path) -> None:
    _write(path, *_content())
    _assert_equal(bn.RunningStats.load(path), _stats())


_NAN, _INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "torch"}, "something else"),
        ({"version": 0}, "version is 0"),
        ({"version": 2}, "version is 2; this bnarray reads version 1"),
        ({"version": "1"}, "version is 1"),
        ({"more": 1}, "settings are not those"),
        ({"update_rate": 0.1}, "arrays are count, m2, mean, var"),
        ({"update_rate": 2.0, "m2": None}, "update_rate is 2.0"),
        ({"update_rate": _NAN, "m2": None}, "update_rate is nan"),
        ({"update_rate": "0.1", "m2": None}, "update_rate is '0.1'"),
        ({"update_rate": [], "m2": None}, "update_rate is []"),
        ({"correction": -1}, "correction is -1"),
        ({"correction": _INF}, "correction is inf"),
        ({"nonfinite": "explode"}, "nonfinite is 'explode'"),
        ({"nonfinite": {}}, "nonfinite is {}"),
        ({"num_updates": -1}, "num_updates is -1"),
        ({"num_updates": 1.5}, "num_updates is 1.5"),
        ({"num_skipped": None}, "num_skipped is None"),
        ({"mean": None}, "arrays are count, m2, var"),
        ({"m2": None}, "arrays are count, mean, var"),
        ({"mean": np.zeros(3, np.int64)}, "mean holds int64"),
        ({"mean": np.zeros(3, np.float16)}, "mean holds float16"),
        ({"count": np.array(True)}, "holds bool"),
        ({"count": np.array(-9)}, "count is -9"),
        ({"count": np.array(_NAN)}, "count is nan"),
        ({"count": np.array(_INF)}, "count is inf"),
        ({"count": np.array([9.0, -9.0, 9.0])}, "count holds a negative"),
        ({"count": np.array([9.0, 9.0])}, "count has shape"),
        ({"mean": np.array([1, _NAN, 1.0])}, "holds a NaN"),
        ({"mean": np.array([1, _INF, 1.0])}, "holds a NaN or an infinity"),
        ({"var": np.array([1, _NAN, 1.0])}, "holds a NaN"),
        ({"var": np.array([1, -1e-300, 1.0])}, "negative"),
        ({"m2": np.array([1, _NAN, 1.0])}, "m2 holds a NaN"),
        ({"m2": np.array([1, _INF, 1.0])}, "m2 holds a NaN or an infinity"),
        ({"m2": np.array([1, -1.0, 1.0])}, "m2 holds a negative"),
        ({"m2": np.array([_NAN, -1.0, 1.0]), "nonfinite": "propagate"}, "m2 holds a negative"),
        ({"var": np.array([_NAN, -1.0, 1.0]), "nonfinite": "propagate"}, "negative"),
        ({"var": np.ones(4)}, "running_var has shape (4,)"),
        ({"m2": np.ones((3, 1))}, "m2 has shape (3, 1)"),
    ],
    ids=str,
)
def test_what_no_statistics_are(path: Path, changes: dict[str, Any], words: str) -> None:
    _write(path, *_content(**changes))
    _refused(path, words)


@pytest.mark.parametrize("about", ["", "[]", "null", "{}", "[" * 50_000, '{"version": ' + "9" * 6000 + "}"])
def test_lines_that_say_nothing(path: Path, about: str) -> None:
    _write(path, about, _content()[1])
    _refused(path)


def test_numbers_that_are_not_finite_where_they_may_be(path: Path) -> None:
    stats = bn.RunningStats(2, nonfinite="propagate", update_rate=None)
    stats.update(bn.moments(np.array([[1.0, np.nan], [2.0, 3.0]])))
    stats.save(path)
    _assert_equal(bn.RunningStats.load(path), stats)


def test_a_failed_load_changes_nothing() -> None:
    layer = bn.BatchNorm(3)
    layer(np.random.default_rng(0).normal(size=(8, 3)))
    good = layer.state_dict()
    before = (layer.weight, layer.bias, layer.stats, layer.stats._state)
    for name, value in (
        *[(each, good[each][:2]) for each in ("weight", "bias", "running_mean", "running_var")],
        *[(each, [1.0, 1.0, 1.0]) for each in ("weight", "bias", "running_mean", "running_var")],
        *[(each, np.ones(3, np.complex64)) for each in ("weight", "running_mean")],
        *[("running_var", np.array([1.0, bad, 1.0])) for bad in (np.nan, np.inf, -1.0)],
        *[("count", bad) for bad in (-1, np.nan, "many", None, np.ones(4), np.array([1.0, -1.0, 1.0]))],
        *[(each, bad) for each in ("num_updates", "num_skipped") for bad in (-1, 1.5, "1", None)],
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            layer.load_state_dict(good | {name: value})
        assert (layer.weight, layer.bias, layer.stats, layer.stats._state) == before
    for name in good:
        with pytest.raises(KeyError, match=name):
            layer.load_state_dict({each: good[each] for each in good if each != name})
        assert (layer.weight, layer.bias, layer.stats, layer.stats._state) == before


# -- Archives made by hand ---------------------------------------------------------------------------------------------


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _header(text: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """A .npy member whose header says anything."""
    text += " " * (-len(text) - 11 & 63) + "\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<I", len(text)) + text.encode() + data


def _archive(path: Path, *, compression: int = zipfile.ZIP_STORED, **members: bytes | None) -> None:
    """An archive that is right, but for some members."""
    about, arrays = _content()
    made = {"about": _npy(np.array(json.dumps(about))), **{name: _npy(array) for name, array in arrays.items()}}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in (made | members).items():
            if data is not None:
                file.writestr(f"{name}.npy", data)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    path = tmp_path / "stats.npz"
    _archive(path)
    _assert_equal(bn.RunningStats.load(path), _stats())
    return path


class _Ran(BaseException):
    """What a pickle raises that is read: nothing catches it."""


def _run() -> None:
    raise _Ran


class _Pickled:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _run, ()


@pytest.mark.parametrize("name", ["about", "mean", "count"])
def test_pickles_are_not_read(npz: Path, name: str) -> None:
    _archive(npz, **{name: _npy(np.array([_Pickled()] * 3, object))})
    with pytest.raises(_Ran), np.load(npz, allow_pickle=True) as archive:
        archive[name]
    _refused(npz, "holds object")


@pytest.mark.parametrize("shape", ["(3,)", "()"])
@pytest.mark.parametrize("descr", ["'|O'", "[('a', '|O')]", "'<c16'", "'<M8[s]'", "'|V8'", "'|S8'", "'no dtype'", "3"])
def test_dtypes_of_headers(npz: Path, descr: str, shape: str) -> None:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    _archive(npz, mean=_header(text, bytes(24)))
    _refused(npz)


@pytest.mark.parametrize(
    "shape",
    [
        *("(10**18,)", "(1000000000000,)", "(2000000000,)", "(4,)", "(2,)", "(-3,)", "(-1, -3)", "(3.0,)", "3", "'3'"),
        *("(0, 1 << 62)", "(4611686018427387904, 4)", "(True, True)", f"({'1,' * 70}3)", "(" * 3000 + ")" * 3000),
    ],
)
def test_shapes_of_headers(npz: Path, shape: str) -> None:
    """Memory is taken for what is there, not for what is said."""
    _archive(npz, mean=_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}", bytes(24)))
    _refused(npz)


def test_more_than_a_header_says(npz: Path) -> None:
    _archive(npz, mean=_npy(_stats().mean) + bytes(8))
    _refused(npz, "another size")


@pytest.mark.parametrize("version", [b"\2\0", b"\3\0", b"\4\0", b"\xff\xff"])
def test_versions_of_headers(npz: Path, version: bytes) -> None:
    text = "{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }"
    _archive(npz, mean=_header(text, bytes(24), version))
    _refused(npz, "another version of .npy")


def test_a_huge_header(npz: Path) -> None:
    _archive(npz, mean=_header("{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }" + " " * 60_000, bytes(24)))
    _refused(npz, "header")


def test_orders_that_numpy_may_write(npz: Path) -> None:
    """Foreign byte order, and Fortran's order."""
    stats = _stats()
    _archive(npz, mean=_npy(stats.mean.astype(">f8")))
    read = bn.RunningStats.load(npz)
    assert read.mean.dtype.isnative
    _assert_equal(read, stats)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb(npz: Path, compression: int) -> None:
    """A hundred megabytes in some kilobytes, honestly declared."""
    _archive(npz, compression=compression, mean=_npy(np.zeros(12_500_000)))
    assert npz.stat().st_size < 200_000
    _refused(npz, "is compressed")


def _patched(path: Path, name: str, offset: int, value: bytes) -> None:
    """Change a field in a member's entry of the central directory, and in its own header."""
    data = bytearray(path.read_bytes())
    entry = data.rindex(name.encode()) - 46
    assert data[entry : entry + 4] == b"PK\1\2"
    data[entry + offset : entry + offset + len(value)] = value
    begin = data.index(name.encode()) - 30
    assert data[begin : begin + 4] == b"PK\3\4"
    data[begin + offset - 2 : begin + offset - 2 + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize("size", [2**32 - 2, 2**31, 10**6, 0, 100])
def test_sizes_that_are_not_true(npz: Path, size: int) -> None:
    for fields in ((20,), (24,), (20, 24)):  # compressed, uncompressed
        _archive(npz)
        for offset in fields:
            _patched(npz, "mean.npy", offset, struct.pack("<I", size))
        _refused(npz)


def test_encrypted_members(npz: Path) -> None:
    _patched(npz, "mean.npy", 8, b"\1\0")
    _refused(npz)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_come_twice(npz: Path) -> None:
    with zipfile.ZipFile(npz, "a") as file:
        file.writestr("mean.npy", _npy(np.ones(3)))
    _refused(npz, "a name comes twice")


@pytest.mark.parametrize(
    "name", ["../mean.npy", "/etc/passwd", "mean", "mean.npy/", "C:\\mean.npy", "mean.npy\0.txt", ""]
)
def test_members_of_other_names(npz: Path, name: str) -> None:
    with zipfile.ZipFile(npz, "a") as file:
        file.writestr(zipfile.ZipInfo("x" * len(name)), b"anything")
    data = npz.read_bytes().replace(b"x" * len(name) if name else b"\0\0never", name.encode())
    npz.write_bytes(data)
    _refused(npz)


def test_many_members(npz: Path) -> None:
    with zipfile.ZipFile(npz, "w") as file:
        for i in range(5000):
            file.writestr(str(i), b"")
    _refused(npz)


def test_entries_that_share_their_bytes(npz: Path) -> None:
    """All arrays at one place in the file, which as many entries point to."""
    data = bytearray(npz.read_bytes())
    place = data[data.rindex(b"mean.npy") - 4 : data.rindex(b"mean.npy")]
    for name in (b"var.npy", b"m2.npy"):
        entry = data.rindex(name)
        data[entry - 4 : entry] = place
    npz.write_bytes(data)
    _refused(npz)


def test_another_archive(npz: Path) -> None:
    with zipfile.ZipFile(npz, "w") as file:
        file.writestr("word/document.xml", "<w/>")
    _refused(npz, "word/document.xml besides")
    np.savez(npz, np.zeros(3), mean=np.zeros(3))
    _refused(npz, "arr_0.npy besides")
    np.savez_compressed(npz, mean=np.zeros(3))
    _refused(npz, "compressed")


# -- safetensors -------------------------------------------------------------------------------------------------------


@pytest.fixture
def safe(tmp_path: Path) -> Path:
    pytest.importorskip("safetensors", reason="safetensors is not installed: files of its format are not verified")
    path = tmp_path / "stats.safetensors"
    _write(path, *_content())
    return path


def _rewritten(path: Path, change: Callable[[dict[str, Any]], object], more: bytes = b"") -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :] + more)


def test_the_file_is_as_other_programs_read_it(safe: Path) -> None:
    from safetensors import safe_open

    with safe_open(safe, "numpy") as archive:
        assert json.loads(archive.metadata()["bnarray"])["version"] == 1
        np.testing.assert_array_equal(archive.get_tensor("mean"), _stats().mean)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("__metadata__"),
        lambda header: header["__metadata__"].pop("bnarray"),
        lambda header: header["__metadata__"].pop("blake2b"),
        lambda header: header["__metadata__"].update(blake2b="0" * 32),
        lambda header: header["mean"].update(shape=[10**15]),
        lambda header: header["mean"].update(shape=[3, 2**62]),
        lambda header: header["mean"].update(shape=[-3]),
        lambda header: header["mean"].update(dtype="I64"),
        lambda header: header["mean"].update(dtype="F4"),
        lambda header: header["mean"].update(data_offsets=header["var"]["data_offsets"]),
        lambda header: header["mean"].update(data_offsets=[0, 2**63]),
        lambda header: header.pop("mean"),
        lambda header: header.update(other=header.pop("mean")),
    ],
)
def test_headers_of_safetensors(safe: Path, change: Callable[[dict[str, Any]], object]) -> None:
    _rewritten(safe, change)
    _refused(safe)


def test_more_than_the_header_says(safe: Path) -> None:
    _rewritten(safe, lambda header: None, more=bytes(8))
    _refused(safe)


def test_a_huge_header_of_safetensors(safe: Path) -> None:
    safe.write_bytes(struct.pack("<Q", 2**62) + safe.read_bytes()[8:])
    _refused(safe)
    safe.write_bytes(struct.pack("<Q", 10**8 - 1) + safe.read_bytes()[8:])
    _refused(safe)


def test_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before anything is written."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    path = tmp_path / "stats.safetensors"
    with pytest.raises(ImportError, match=r"pip install 'bnarray\[safetensors\]'"):
        _stats().save(path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install 'bnarray\[safetensors\]'"):
        bn.RunningStats.load(path)


def test_a_layer_through_safetensors(tmp_path: Path) -> None:
    """`state_dict` is arrays and numbers, which come back as arrays."""
    safetensors = pytest.importorskip(
        "safetensors.numpy", reason="safetensors is not installed: layers in its files are not verified"
    )
    for update_rate in (0.1, None):
        layer, again = bn.BatchNorm(3, update_rate=update_rate), bn.BatchNorm(3, update_rate=update_rate)
        rng = np.random.default_rng(0)
        layer.weight += rng.normal(size=3)
        for _ in range(3):
            layer(rng.normal(3, 2, (9, 3)))
        path = tmp_path / "layer.safetensors"
        safetensors.save_file({name: np.array(value) for name, value in layer.state_dict().items()}, path)
        again.load_state_dict(safetensors.load_file(path))
        x = rng.normal(size=(5, 3))
        for mode in (False, True, False):
            np.testing.assert_array_equal(again.train(mode)(x), layer.train(mode)(x))
        assert (again.stats.count, again.stats.num_updates) == (layer.stats.count, layer.stats.num_updates) == (32, 4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here: that one is left alone is not verified")
def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    """As root, a device would be replaced by the file."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        bn.RunningStats(3).save(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        bn.RunningStats(3).save(tmp_path)
    assert (tmp_path / "pipe").is_fifo()
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]
