"""`bnarray info`: what an installation is made of, and what it can use; which array libraries are served, and how."""

import ast
import os
import platform
import shutil
from importlib import metadata, util
from typing import Any

from bnarray import __version__
from bnarray.cuda import capabilities, obstacle
from bnarray.dispatch import Capabilities, built_in
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
    found = obstacle()
    if found is not None:
        return {"usable": False, **found._asdict()}
    return {"usable": True, "capabilities": [".".join(map(str, each)) for each in capabilities()]}


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
    capable = f"compute capability {', '.join(cuda.get('capabilities', ()))}"
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
        "cuda": f"usable ({capable}); not verified on a GPU" if cuda["usable"] else f"not usable: {cuda['why']}",
    }
    if not cuda["usable"] and cuda["install"]:
        rows["to install"] = cuda["install"]
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


_SUPPORT = """\
# What is supported, library by library

What each backend declares of itself (`CAPABILITIES`), written by `bnarray info --libraries`.

- *dtypes*: those of x; weight and bias may have any of them.
- *strides*: whether arrays have them, any will do, and results have those of x.
- *out=*: whether a result can be written into an array that is given.
- *lazy*: whether results are computed only when they are asked for.
- *devices*: whether arrays live on one of several; a call then takes all of them on one, and leaves its results there.
- *gradients*: how they are had; *transforms* of the library work on calls.

Libraries from outside come beside these, by `bn.register_backend` or an entry point: see [backends.md](backends.md).

"""


def _declared(module: str) -> Capabilities:
    """What a backend declares, read from its file: its library need not be installed, and is not imported."""
    spec = util.find_spec(f"bnarray.backends.{module}")
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="CAPABILITIES")], value=ast.Call(args=[], keywords=given)):
                return Capabilities(**{each.arg or "": ast.literal_eval(each.value) for each in given})
    return Capabilities()


def support() -> str:
    """Return the page of supported libraries, in Markdown."""
    rows = [["library", "dtypes", "strides", "out=", "lazy", "devices", "gradients", "transforms", "what works"]]
    rows.append(["---"] * len(rows[0]))
    modules = {name: name for name in built_in()} | {"any other of the Array API standard": "generic"}
    for library, module in modules.items():
        does = _declared(module)
        flags = ("yes" if flag else "no" for flag in (does.layouts, does.out, does.lazy, does.devices))
        listed = ", ".join(does.dtypes), *flags, does.gradients, ", ".join(does.transforms) or "none"
        rows.append([library, *listed, does.runs])
    return _SUPPORT + "".join(f"| {' | '.join(row)} |\n" for row in rows)
