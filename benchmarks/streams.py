"""`bnarray normalize` of a file, in this process: time, and memory that should not grow with the file."""

import tempfile
from functools import lru_cache
from pathlib import Path

from benchmarks import files, parameters


def _normalize(folder: Path) -> None:
    from bnarray.cli import main

    if main(["normalize", str(folder / "x.npy"), str(folder / "y.npy"), "--force", "--chunk-mb", "16"]):
        raise RuntimeError("bnarray normalize failed")


@lru_cache(maxsize=1)
def _check() -> None:
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        files.make(Path(folder) / "x.npy", 2**24)
        _normalize(Path(folder))
        y = np.load(Path(folder) / "y.npy")[:, :3].astype(np.float64)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(0), 1, atol=1e-4)


class Normalize:
    """From a file in the page cache to another one."""

    params = [[64, 512]]
    param_names = ["MB"]
    rounds, warmup_time, repeat = 1, 0, (3, 10, 5.0)

    def setup(self, megabytes: int) -> None:
        parameters.need("bnarray.files")
        _check()
        self.folder = tempfile.TemporaryDirectory()
        files.make(Path(self.folder.name) / "x.npy", megabytes * 2**20)

    def teardown(self, _: int) -> None:
        self.folder.cleanup()

    def time_normalize(self, _: int) -> None:
        _normalize(Path(self.folder.name))

    def peakmem_normalize(self, _: int) -> None:
        _normalize(Path(self.folder.name))
