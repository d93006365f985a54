"""dask arrays on worker processes: results, state that stays on the client, and memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnarray as bn

da = pytest.importorskip("dask.array", reason="dask.array is not installed: work on dask's processes is not verified")
distributed = pytest.importorskip("distributed", reason="distributed is not installed: its workers are not verified")
pytest.importorskip("zarr", reason="zarr is not installed: arrays in files larger than memory are not verified")
benchmark = pytest.importorskip("benchmarks.distributed")


@pytest.fixture
def client() -> Iterator[Any]:
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        yield client


def test_training_step_on_workers(client: Any) -> None:
    values = np.random.default_rng(0).normal(3, 2, (400, 12)).astype(np.float32)
    x = da.from_array(values, chunks=(70, 5))
    layer, expected = (
        bn.BatchNorm(12, update_rate=None, activation="relu"),
        bn.BatchNorm(12, update_rate=None, activation="relu"),
    )
    y = layer(x)
    dx = layer.backward(x).persist()
    assert layer.stats.num_updates == 1
    for _ in range(2):
        np.testing.assert_allclose(y.compute(), expected.forward(values), atol=1e-5)
    np.testing.assert_allclose(dx.compute(), expected.backward(values), atol=1e-5)
    assert (layer.stats.num_updates, layer.stats.count) == (1, 400)
    np.testing.assert_allclose(layer.grad_weight, expected.grad_weight, rtol=1e-5)
    np.testing.assert_allclose(layer.stats.var, bn.moments(values).var(1), rtol=1e-6)
    assert len(client.scheduler_info()["workers"]) == 2


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="no /proc: the memory that workers take is not verified"
)
def test_memory_of_workers(tmp_path: Path) -> None:
    """Far less than the array: a few chunks a worker, whose limit is kept."""
    src, dst = tmp_path / "x.zarr", tmp_path / "y.zarr"
    size, chunk = 2**27, 2**21
    benchmark.make(src, size, chunk)
    moments = benchmark.streamed(src)
    took = benchmark.measure(benchmark.by_bnarray, src, dst, moments, workers=2, memory="400MB", rounds=1)
    grown = [peak - before for before, peak in zip(took.before, took.peaks, strict=True)]
    assert max(grown) < size / 4, grown
    assert took.distance < 4e-6
