"""Files, through Python: any format, order and axis, and the same bits whatever is in memory at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import bnarray as bn
from bnarray.formats import cut, lengths, regions

Array = npt.NDArray[Any]


def _data(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    return np.random.default_rng(0).normal(5, 2, shape).astype(dtype)


SHAPES = [
    ((60_000, 16), 1),
    ((60_000, 16), -1),
    ((40, 3, 90, 90), 1),
    ((40, 90, 90, 3), 3),
    ((2, 3, 400, 400), (0, 1)),
    ((2, 700_000), 0),
    ((2, 700_000), 1),
    ((1_000_003,), ()),
    ((1, 1, 900_001), ()),
    ((7, 5), 1),
    ((), ()),
]


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_equals_the_array_and_not_the_blocks(
    tmp_path: Path, shape: tuple[int, ...], axis: int | tuple[int, ...], order: Any
) -> None:
    x = np.asarray(_data(shape), order=order)
    np.save(tmp_path / "x.npy", x)
    results = []
    for chunk_mb in (8, 13, 200):
        done = bn.normalize_file(
            tmp_path / "x.npy", tmp_path / "y.npy", axis=axis, chunk_mb=chunk_mb, force=True, eps=1e-3
        )
        results.append((tmp_path / "y.npy").read_bytes())
        assert isinstance(done, bn.Normalized)
    assert results[0] == results[1] == results[2]
    y = np.load(tmp_path / "y.npy")
    assert y.dtype == x.dtype
    assert y.flags.f_contiguous == x.flags.f_contiguous
    np.testing.assert_allclose(y, bn.batch_norm(x, axis=axis, eps=1e-3), rtol=0, atol=1e-6)
    expected = bn.moments(x, axis=axis)
    assert done.before.count == expected.count
    np.testing.assert_allclose(done.before.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(done.before.m2, expected.m2, rtol=1e-9)
    after = bn.moments(y, axis=axis)
    np.testing.assert_allclose(done.after.mean, after.mean, atol=1e-12)
    np.testing.assert_allclose(done.after.m2, after.m2, rtol=1e-9)


@pytest.mark.parametrize("shape", [(60_000, 16), (40, 3, 90, 90)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["per sample", "per element", "weights", "one axis"])
def test_where(tmp_path: Path, shape: tuple[int, ...], order: Any, kind: str) -> None:
    x = np.asarray(_data(shape), order=order)
    rng = np.random.default_rng(1)
    per_sample = (shape[0],) + (1,) * (len(shape) - 1)
    where: Array = {
        "per sample": rng.random(per_sample) < 0.7,
        "per element": np.asarray(rng.random(shape) < 0.7, order=order),
        "weights": np.asarray(rng.random((*shape[:-1], 1)), order=order),
        "one axis": rng.random(shape[-1:]) < 0.7 if order == "C" else rng.random(per_sample) < 0.7,
    }[kind]
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "where.npy", where)
    done = bn.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", where=tmp_path / "where.npy")
    expected = bn.moments(x, where=where)
    assert isinstance(done, bn.Normalized)
    np.testing.assert_allclose(done.before.count, expected.count, rtol=1e-12)
    np.testing.assert_allclose(done.before.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), bn.batch_norm(x, where=where), rtol=0, atol=1e-6)
    found = bn.file_moments(tmp_path / "x.npy", where=tmp_path / "where.npy")
    np.testing.assert_array_equal(found.m2, done.before.m2)


@pytest.mark.parametrize("held", ["<f2", "<f4", ">f4", "<f8", "|u1", "<i4", "|b1"])
@pytest.mark.parametrize("written", [None, "float16", "float32", "float64"])
def test_dtypes(tmp_path: Path, held: str, written: str | None) -> None:
    x = _data((70_000, 9), np.float64).astype(held)
    np.save(tmp_path / "x.npy", x)

    def run() -> bn.Normalized:
        done = bn.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", dtype=written)
        assert isinstance(done, bn.Normalized)
        return done

    if written is None and x.dtype.kind != "f":
        with pytest.raises(TypeError, match="has no fractions"):
            run()
        assert not (tmp_path / "y.npy").exists()
        found = bn.file_moments(tmp_path / "x.npy")
    else:
        found = run().before
        y = np.load(tmp_path / "y.npy")
        assert y.dtype == np.dtype(written or held).newbyteorder("=")
        wide = x.astype(np.float64)
        exact = bn.batch_norm(wide)
        np.testing.assert_allclose(y, exact, rtol=16 * np.finfo(y.dtype).eps, atol=16 * np.finfo(y.dtype).eps)
    near = 1e-8 if x.dtype.itemsize == 2 and x.dtype.kind == "f" else 1e-12  # halves are summed in float32
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(axis=0), rtol=near)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archive(tmp_path: Path, save: Callable[..., None]) -> None:
    members: dict[str, Any] = {
        "a": _data((50_000, 8)), "b": _data((3, 4, 5), np.float64), "labels": np.arange(5), "flag": np.array("text")
    }  # fmt: skip
    save(tmp_path / "x.npz", **members)
    done = bn.normalize_file(tmp_path / "x.npz", tmp_path / "y.npz")
    assert isinstance(done, dict)
    assert sorted(done) == ["a", "b"]
    with np.load(tmp_path / "y.npz") as y:
        assert sorted(y.files) == sorted(members)
        for name in ("a", "b"):
            np.testing.assert_allclose(y[name], bn.batch_norm(members[name]), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(y["labels"], members["labels"])
        assert y["flag"] == "text"
    one = bn.normalize_file(tmp_path / "x.npz", tmp_path / "one.npz", member="b")
    assert isinstance(one, bn.Normalized)
    with np.load(tmp_path / "one.npz") as y:
        np.testing.assert_array_equal(y["a"], members["a"])
        np.testing.assert_allclose(y["b"], bn.batch_norm(members["b"]), rtol=0, atol=1e-12)
    bn.normalize_file(tmp_path / "x.npz", tmp_path / "b.npy", member="b")
    np.testing.assert_allclose(np.load(tmp_path / "b.npy"), bn.batch_norm(members["b"]), rtol=0, atol=1e-12)
    assert bn.file_moments(tmp_path / "x.npz", member="a").count == 50_000
    for wrong in ({"member": "c"}, {}):
        with pytest.raises(ValueError, match=r"member|choose"):
            bn.file_moments(tmp_path / "x.npz", **wrong)


def test_one_mask_for_members_of_either_order(tmp_path: Path) -> None:
    x, where = _data((500, 6)), np.arange(500)[:, None] % 2 > 0
    np.savez(tmp_path / "x.npz", a=np.asfortranarray(x), b=x, c=np.asfortranarray(x))
    np.save(tmp_path / "where.npy", where)
    bn.normalize_file(tmp_path / "x.npz", tmp_path / "y.npz", where=tmp_path / "where.npy")
    with np.load(tmp_path / "y.npz") as y:
        for name in "abc":
            np.testing.assert_allclose(y[name], bn.batch_norm(x, where=where), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["C", "F"])
def test_zarr(tmp_path: Path, order: Any) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: zarr arrays are not verified")
    x = np.asarray(_data((3000, 7, 40)), order=order)
    if order == "C":
        zarr.create_array(str(tmp_path / "x.zarr"), shape=x.shape, chunks=(500, 7, 40), dtype=x.dtype)[:] = x
    else:
        np.save(tmp_path / "x.npy", x)
    src = tmp_path / ("x.zarr" if order == "C" else "x.npy")
    for force in (False, True):
        bn.normalize_file(src, tmp_path / "y.zarr", force=force)
    np.testing.assert_allclose(zarr.open_array(str(tmp_path / "y.zarr"))[:], bn.batch_norm(x), rtol=0, atol=1e-6)
    bn.normalize_file(src, tmp_path / "z.npy")
    np.testing.assert_allclose(np.load(tmp_path / "z.npy"), bn.batch_norm(x), rtol=0, atol=1e-6)
    np.testing.assert_allclose(bn.file_moments(src).mean, bn.moments(x).mean, rtol=1e-12)
    assert not list(tmp_path.glob(".*"))


def test_given_statistics(tmp_path: Path) -> None:
    """Saved statistics give the bits that the data's own gave."""
    x = _data((60_000, 16))
    np.save(tmp_path / "x.npy", x)
    own = bn.normalize_file(tmp_path / "x.npy", tmp_path / "own.npy")
    assert isinstance(own, bn.Normalized)
    given = bn.normalize_file(tmp_path / "x.npy", tmp_path / "given.npy", stats=own.before)
    assert (tmp_path / "own.npy").read_bytes() == (tmp_path / "given.npy").read_bytes()
    assert isinstance(given, bn.Normalized)
    np.testing.assert_array_equal(given.before.mean, own.before.mean)
    nothing = bn.Moments(np.zeros(16), np.zeros(16), np.zeros(16))
    bn.normalize_file(tmp_path / "x.npy", tmp_path / "same.npy", stats=nothing, eps=0)
    np.testing.assert_array_equal(np.load(tmp_path / "same.npy"), x)
    with pytest.raises(ValueError, match="stats has features of shape"):
        bn.normalize_file(tmp_path / "x.npy", tmp_path / "no.npy", stats=bn.RunningStats(3))
    assert not (tmp_path / "no.npy").exists()


def test_many_files_are_one_array(tmp_path: Path) -> None:
    x = _data((100_000, 6))
    for name, part in (("a", x[:1]), ("b", x[1:70_000]), ("empty", x[:0]), ("c", x[70_000:])):
        np.save(tmp_path / f"{name}.npy", part)
    found = bn.file_moments([tmp_path / f"{name}.npy" for name in ("a", "b", "empty", "c")])
    expected = bn.moments(x)
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.var(), expected.var(), rtol=1e-12)
    np.save(tmp_path / "d.npy", x[:, :5])
    with pytest.raises(ValueError, match=r"d\.npy has features of shape \(5,\)"):
        bn.file_moments([tmp_path / "a.npy", tmp_path / "d.npy"])
    with pytest.raises(ValueError, match="paths is empty"):
        bn.file_moments([])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "x.npy", np.empty(shape, np.float32))
    done = bn.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy")
    assert np.load(tmp_path / "y.npy").shape == shape
    assert isinstance(done, bn.Normalized)
    assert done.before.mean.shape == shape[1:]


def test_nan_stays_in_its_feature(tmp_path: Path) -> None:
    x = _data((1000, 3))
    x[5, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    bn.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy")
    assert np.isnan(np.load(tmp_path / "y.npy")).any(axis=0).tolist() == [False, True, False]


def test_progress(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", _data((3_000_000, 2)))
    seen: list[tuple[int, int]] = []
    bn.normalize_file(tmp_path / "x.npy", tmp_path / "y.npy", chunk_mb=8, progress=lambda *step: seen.append(step))
    assert len(seen) > 10
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (48_000_000, 48_000_000)

    class StopError(Exception): ...

    def stop(done: int, total: int) -> None:
        if done > 30_000_000:
            raise StopError

    with pytest.raises(StopError):
        bn.normalize_file(tmp_path / "x.npy", tmp_path / "z.npy", chunk_mb=8, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "y.npy"]


def test_mistakes_leave_the_older_output(tmp_path: Path) -> None:
    x = _data((1000, 4))
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "y.npy").write_text("older")
    np.save(tmp_path / "objects.npy", np.array([None, 1]), allow_pickle=True)
    np.save(tmp_path / "complex.npy", np.zeros((3, 3), complex))
    np.save(tmp_path / "negative.npy", -np.ones((1000, 1)))
    np.save(tmp_path / "long.npy", np.ones((1001, 1)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    (tmp_path / "header.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:20])
    (tmp_path / "text.npy").write_text("no array")
    archive = tmp_path / "x.npz"
    np.savez(archive, x=x)
    (tmp_path / "cut.npz").write_bytes(archive.read_bytes()[:-30])
    locked = bytearray(archive.read_bytes())
    locked[6] |= 1
    locked[locked.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.npz").write_bytes(locked)
    placed = bytearray(archive.read_bytes())
    placed[placed.index(b"PK\5\6") + 18] ^= 0x80  # where the directory begins: members seem to lie before the file
    (tmp_path / "placed.npz").write_bytes(placed)
    damaged = bytearray(archive.read_bytes())
    damaged[5000] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.npy").symlink_to(tmp_path / "x.npy")
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("none.npy", {}, FileNotFoundError, "none.npy"),
        ("x.npy", {"axis": 2}, ValueError, "axis is 2"),
        ("x.npy", {"axis": "1"}, TypeError, "axis is '1'"),
        ("x.npy", {"eps": -1}, ValueError, "eps is -1"),
        ("x.npy", {"dtype": "int32"}, TypeError, "dtype is int32"),
        ("x.npy", {"dtype": "float31"}, TypeError, "dtype is 'float31'"),
        ("x.npy", {"member": "x"}, ValueError, "no archive"),
        ("x.npy", {"chunk_mb": -1}, ValueError, "chunk_mb"),
        ("x.npy", {"where": tmp_path / "none.npy"}, FileNotFoundError, "none.npy"),
        ("x.npy", {"where": tmp_path / "negative.npy"}, ValueError, "negative"),
        ("x.npy", {"where": tmp_path / "long.npy"}, ValueError, "does not broadcast"),
        ("x.npy", {"where": archive}, ValueError, "archive"),
        ("x.npy", {"stats": 3}, TypeError, "stats is a int"),
        ("objects.npy", {"axis": 0}, TypeError, "Python objects"),
        ("complex.npy", {}, TypeError, "complex128"),
        ("cut.npy", {}, ValueError, "truncated"),
        ("header.npy", {}, ValueError, "damaged"),
        ("text.npy", {}, ValueError, "neither"),
        ("cut.npz", {"member": "x"}, ValueError, "damaged"),
        ("damaged.npz", {"member": "x"}, ValueError, "damaged"),
        ("locked.npz", {"member": "x"}, ValueError, "encrypted: x.npy"),
        ("placed.npz", {"member": "x"}, ValueError, "damaged"),
        ("folder", {}, ValueError, "holds no zarr array"),
    ]
    for src, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            bn.normalize_file(tmp_path / src, tmp_path / "y.npy", force=True, **options)
        assert (tmp_path / "y.npy").read_text() == "older", src
    for dst, kind in (
        ("y.npy", FileExistsError), ("x.npy", ValueError), ("link.npy", ValueError), ("x.txt", ValueError),
        ("x.npz", FileExistsError), ("new.npz", ValueError), ("no/folder.npy", FileNotFoundError),
    ):  # fmt: skip
        with pytest.raises(kind):
            bn.normalize_file(tmp_path / "x.npy", tmp_path / dst)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("shape", [(1000, 7), (3, 5, 11, 13), (1, 1, 999), (997,), (2, 500)])
@pytest.mark.parametrize("most", [1, 10, 64, 5000])
def test_regions_cover_everything_once_in_order(shape: tuple[int, ...], most: int) -> None:
    number = np.arange(np.prod(shape)).reshape(shape)
    unit = cut(shape, most)
    seen = [number[region].ravel() for region in regions(shape, unit)]
    assert max(part.size for part in seen) <= max(most, 1)
    np.testing.assert_array_equal(np.concatenate(seen), number.ravel())
    assert all(lengths(region) == number[region].shape for region in regions(shape, unit))
