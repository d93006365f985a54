"""`bnarray info`: what an installation is made of, and what it can use."""

import ctypes
import os
import platform
import shutil
import sys
from importlib import metadata, util
from typing import Any

from bnarray import __version__
from bnarray.kernels import disk

_PACKAGES = ("numpy", "numba", "llvmlite", "array-api-compat", "numba-cuda", "cupy", "torch", "jax", "dask", "zarr")


def _versions() -> dict[str, str | None]:
    """The versions of installed packages; CuPy's is named after a version of CUDA."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        found[name] = None
        for candidate in (name, f"{name}-cuda12x", f"{name}-cuda13x"):
            try:
                found[name] = metadata.version(candidate)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _files() -> list[os.DirEntry[str]]:
    """The compiled kernels in the cache folder; of what else may lie there nothing."""
    folder = disk.folder()
    if folder is None or not folder.is_dir():
        return []
    return [
        kernel
        for entry in os.scandir(folder)
        if entry.is_dir(follow_symlinks=False) and disk.is_key(entry.name)
        for kernel in os.scandir(entry)
    ]


def clear_cache() -> None:
    """Delete the compiled kernels, and nothing else."""
    for folder in {os.path.dirname(kernel.path) for kernel in _files()}:
        shutil.rmtree(folder)


def _cuda() -> dict[str, Any]:
    """Whether CUDA is usable and, if not, why not and what to install."""
    missing = [name for name in ("numba_cuda", "cupy") if util.find_spec(name) is None]
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return {"usable": False, "why": "no NVIDIA driver is installed", "install": "the driver, for an NVIDIA GPU"}
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return {"usable": False, "why": f"the NVIDIA driver finds no GPU (code {code})", "install": None}
    if missing:
        version = ctypes.c_int(0)
        driver.cuDriverGetVersion(ctypes.byref(version))
        extra = "cuda13" if version.value >= 13000 else "cuda12"
        why = f"{' and '.join(missing)} not installed"
        return {"usable": False, "why": why, "install": f"pip install 'bnarray[{extra}]'"}
    return {"usable": False, "why": "this version of bnarray has no kernels for it yet", "install": None}


def facts() -> dict[str, Any]:
    """Return everything, as JSON would hold it."""
    from bnarray.kernels.cpu.pool import threads

    kernels = _files()
    return {
        "bnarray": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "cpu": {"name": _processor(), "cores": _cores()},
        "threads": threads(),
        "threading_layer": "bnarray's own (Numba's is not used)",
        "cache": {
            "folder": str(disk.folder()),
            "kernels": len(kernels),
            "bytes": sum(kernel.stat().st_size for kernel in kernels),
        },
        "cuda": _cuda(),
    }


def table(facts: dict[str, Any]) -> str:
    """Return the facts as lines of name and value."""
    cache, cuda, cpu = facts["cache"], facts["cuda"], facts["cpu"]
    rows = {
        "bnarray": facts["bnarray"],
        "python": facts["python"],
        "platform": facts["platform"],
        **{name: version or "not installed" for name, version in facts["packages"].items()},
        "cpu": f"{cpu['name']}, {cpu['cores']} cores",
        "threads": facts["threads"],
        "threading layer": facts["threading_layer"],
        "cache folder": cache["folder"],
        "cached kernels": f"{cache['kernels']}, {cache['bytes'] / 2**20:.1f} MB",
        "cuda": "usable" if cuda["usable"] else f"not usable: {cuda['why']}",
    }
    if not cuda["usable"] and cuda["install"]:
        rows["to install"] = cuda["install"]
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
