"""Every kind of kernel becomes machine code that keeps to its budget; this needs no GPU, and shows nothing of speed."""

import os
import re
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed; compilation for CUDA is not verified")
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("Numba simulates devices here; compilation for CUDA is not verified", allow_module_level=True)

from bnarray.kernels.cuda import (
    backward,
    forward,
    gate,
    grad_input,
    grad_sums,
    memory,
    moments,
    normalize,
    running,
    together,
)
from bnarray.kernels.cuda.compiled import Kernel, entries
from bnarray.kernels.cuda.walk import Shape

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
OLDEST = (7, 5)
DTYPES = [memory.FLOAT16, memory.BFLOAT16, memory.FLOAT32, memory.FLOAT64]

#: Channels first, channels last, and a slice whose axes do not join.
SHAPES = [Shape(1, 1, 1), Shape(32, 1, 1), Shape(32, 2, 2)]

#: Channels last, of which each thread has four.
ABREAST = Shape(8, 1, 1, 4, abreast=True)

_DISASSEMBLER = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin/nvdisasm"


def _kernels(kind: int, shape: Shape) -> list[Kernel]:
    """With the most operands, and with the fewest."""
    batch, weighted = grad_input.BATCH, grad_input.WEIGHTED
    return [
        moments.kernel(kind, None, shape),
        moments.kernel(kind, memory.BOOL, shape),
        normalize.kernel(kind, False, shape),
        normalize.kernel(kind, True, shape),
        grad_sums.kernel(kind, kind, gate.OPEN, shape),
        grad_sums.kernel(kind, kind, gate.RELU_ONTO, shape),
        grad_input.kernel(kind, kind, None, gate.RELU, batch, shape),
        grad_input.kernel(kind, kind, None, gate.RELU_ONTO, batch, shape),
        grad_input.kernel(kind, kind, memory.FLOAT32, gate.RELU_ONTO, weighted, shape),
    ]


def _by_vectors() -> list[Kernel]:
    """Some that access 16 bytes at once, in each dtype; and four features."""
    made = []
    for kind, onto, gates in (
        (memory.FLOAT16, False, (gate.RELU_ONTO,)),
        (memory.BFLOAT16, False, ()),
        (memory.FLOAT32, False, (gate.RELU,)),
        (memory.FLOAT64, True, ()),
    ):
        shape = SHAPES[0]._replace(width=memory.width_of(kind))
        made += [normalize.kernel(kind, onto, shape)]
        made += [grad_input.kernel(kind, kind, None, each, grad_input.BATCH, shape) for each in gates]
    return [
        *made,
        normalize.kernel(memory.FLOAT32, False, ABREAST),
        normalize.kernel(memory.FLOAT16, True, ABREAST),
        grad_input.kernel(memory.FLOAT32, memory.FLOAT32, None, gate.RELU_ONTO, grad_input.BATCH, ABREAST),
        grad_input.kernel(memory.BFLOAT16, memory.BFLOAT16, None, gate.RELU, grad_input.BATCH, ABREAST),
    ]


def _sums_by_vectors() -> list[Kernel]:
    """Some that read 16 bytes at once, or four features, and write nothing of that size."""
    single, half = (SHAPES[0]._replace(width=memory.width_of(kind)) for kind in (memory.FLOAT32, memory.FLOAT16))
    return [
        moments.kernel(memory.FLOAT32, None, single),
        moments.kernel(memory.BFLOAT16, None, half),
        grad_sums.kernel(memory.FLOAT32, memory.FLOAT32, gate.RELU, single),
        moments.kernel(memory.FLOAT32, None, ABREAST),
        moments.kernel(memory.FLOAT16, None, ABREAST),
        grad_sums.kernel(memory.FLOAT32, memory.FLOAT32, gate.RELU, ABREAST),
        grad_sums.kernel(memory.BFLOAT16, memory.BFLOAT16, gate.RELU_ONTO, ABREAST),
    ]


def _of_one_launch() -> list[Kernel]:
    """Kernels whose blocks wait for one another, in vectors and one by one."""
    last = SHAPES[1]
    single, half, brain = (SHAPES[0]._replace(width=memory.width_of(kind)) for kind in (2, 0, 1))
    return [
        forward.kernel(memory.FLOAT32, single),
        forward.kernel(memory.BFLOAT16, brain),
        forward.kernel(memory.FLOAT16, last),
        backward.kernel(memory.FLOAT32, gate.RELU, single),
        backward.kernel(memory.FLOAT16, gate.RELU_ONTO, half),
        backward.kernel(memory.FLOAT32, gate.OPEN, last),
        forward.kernel(memory.FLOAT32, ABREAST),
        forward.kernel(memory.BFLOAT16, ABREAST),
        backward.kernel(memory.FLOAT16, gate.RELU, ABREAST),
        backward.kernel(memory.FLOAT32, gate.RELU_ONTO, ABREAST),
    ]


def _width(kernel: Kernel) -> str:
    """What instructions say of how much they access at once."""
    if "_by_" not in kernel.name and "_abreast_" not in kernel.name:
        return ""
    return ".64" if re.search(r"float16.*_abreast_", kernel.name) else ".128"


@cache
def _compiled(kernel: Kernel, capability: tuple[int, int]) -> tuple[bytes, str]:
    return kernel.compile(capability)


def _cases() -> list[Any]:
    """Every kernel in every shape, dtypes and capabilities in turns."""
    kernels = [
        kernel
        for shape, kinds in zip(SHAPES, (DTYPES[1:3], DTYPES[:1], DTYPES[3:]), strict=True)
        for kind in kinds
        for kernel in _kernels(kind, shape)
    ]
    kernels += [running.kernel()]
    cases = [(kernel, CAPABILITIES[i % 3]) for i, kernel in enumerate(kernels)]
    cases += [(kernel, OLDEST) for kernel in (*_kernels(memory.FLOAT16, SHAPES[1])[:5:4], running.kernel())]
    cases += [(kernel, (9, 0)) for kernel in (*_by_vectors(), *_sums_by_vectors())]
    cases += [(kernel, CAPABILITIES[i % 3]) for i, kernel in enumerate(_of_one_launch())]
    return [pytest.param(*case, id="{}-sm_{}{}".format(case[0].name, *case[1])) for case in cases]


@pytest.mark.parametrize(("kernel", "capability"), _cases())
def test_registers_are_enough(kernel: Kernel, capability: tuple[int, int]) -> None:
    code, log = _compiled(kernel, capability)
    assert len(entries(code)) == 1

    def said(pattern: str) -> int:
        (number,) = re.findall(pattern, log)
        return int(number)

    assert said(r"Used (\d+) registers") <= {4: 64, 3: 80}[kernel.blocks]
    # With two axes more than usual to divide by, or three operands to sum, some numbers that loops do not need wait in
    # memory.
    has_many = kernel.name.startswith(("grad_sums_2", "backward"))
    most = 64 if kernel.name.endswith(str(SHAPES[2])) else 32 if has_many else 0
    if "abreast" in kernel.name:  # and those of one launch have both kinds of loops
        most = {"forward": 64, "backward": 208, "grad_sums": 32}.get(re.match("(grad_)?[a-z]+", kernel.name)[0], 0)
    assert "smem" not in log or said(r"(\d+) bytes smem") <= together.SHARED
    assert said(r"(\d+) bytes stack frame") <= most
    assert said(r"(\d+) bytes spill stores") <= most
    assert said(r"(\d+) bytes spill loads") <= 2 * most


def _assembly(code: bytes, folder: Path) -> list[str]:
    file = folder / "kernel.cubin"
    file.write_bytes(code)
    done = subprocess.run([_DISASSEMBLER, "-c", file], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)")


def _loops(code: bytes, folder: Path) -> list[list[str]]:
    """The instructions of every innermost loop: from a label to a jump back to it, with none such between."""
    lines = _assembly(code, folder)
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    jumps = [
        (labels[match[1]], i)
        for i, line in enumerate(lines)
        if (match := re.search(r"BRA(?:\.\S+)? .*`\((\.L_x_\d+)\)", line)) and labels[match[1]] < i
    ]
    inner = [(a, b) for a, b in jumps if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in jumps)]
    return [[match[1] for line in lines[a : b + 1] if (match := _INSTRUCTION.search(line))] for a, b in inner]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(memory.FLOAT32, SHAPES[0]), (memory.BFLOAT16, SHAPES[1])],
    ids=["float32 channels first", "bfloat16 channels last"],
)
def test_loops_over_elements_do_without_float64(kind: int, shape: Shape, tmp_path: Path) -> None:
    if not _DISASSEMBLER.exists():
        pytest.skip("nvidia-cuda-nvdisasm is not installed; what kernels' loops compute in is not verified")
    for kernel in (
        moments.kernel(kind, None, shape),
        normalize.kernel(kind, False, shape),
        grad_sums.kernel(kind, kind, gate.RELU, shape),
        grad_input.kernel(kind, kind, None, gate.RELU, grad_input.BATCH, shape),
    ):
        loops = _loops(_compiled(kernel, (9, 0))[0], tmp_path)
        reading = [loop for loop in loops if any(each.startswith("LDG") for each in loop)]
        # What is beyond float32 has loops in float64 of its own, and so have the merges.
        single = [loop for loop in reading if not any(re.match(r"D(ADD|MUL|FMA|SETP)", each) for each in loop)]
        assert any(re.match(r"F(ADD|MUL|FMA)", each) for loop in single for each in loop), kernel.name
        # Nor are products and sums fused that the formula does not fuse.
        writing = [loop for loop in single if any(each.startswith("STG") for each in loop)]
        assert not any(each.startswith("FFMA") for loop in writing for each in loop), kernel.name


@pytest.mark.parametrize("kernel", _by_vectors(), ids=lambda kernel: kernel.name)
def test_vectors_are_accessed_at_once(kernel: Kernel, tmp_path: Path) -> None:
    if not _DISASSEMBLER.exists():
        pytest.skip("nvidia-cuda-nvdisasm is not installed; how wide kernels' accesses are is not verified")
    loops = _loops(_compiled(kernel, (9, 0))[0], tmp_path)
    accesses = [{each for each in loop if each.startswith(("LDG", "STG", "LDL", "STL"))} for loop in loops]
    # What is beyond float32 has a loop of its own, over elements.
    assert any(
        loop and all(_width(kernel) in each for each in loop)
        for loop in accesses
        if any("STG" in each for each in loop)
    )


@pytest.mark.parametrize("kernel", _sums_by_vectors(), ids=lambda kernel: kernel.name)
def test_sums_read_vectors_at_once(kernel: Kernel, tmp_path: Path) -> None:
    if not _DISASSEMBLER.exists():
        pytest.skip("nvidia-cuda-nvdisasm is not installed; how wide kernels' accesses are is not verified")
    loops = _loops(_compiled(kernel, (9, 0))[0], tmp_path)
    single = [loop for loop in loops if not any(each.startswith(("DADD", "DMUL", "DFMA")) for each in loop)]
    accesses = [[each for each in loop if each.startswith(("LDG", "LDL", "STL"))] for loop in single if "FADD" in loop]
    assert any(loop and all(_width(kernel) in each for each in loop) for loop in accesses)


@pytest.mark.parametrize("kernel", _of_one_launch(), ids=lambda kernel: kernel.name)
def test_what_waits_on_chip_is_read_once(kernel: Kernel, tmp_path: Path) -> None:
    """There are loops that copy to shared memory, that add up what is there, and that write what follows from it."""
    if not _DISASSEMBLER.exists():
        pytest.skip("nvidia-cuda-nvdisasm is not installed; how kernels of one launch read is not verified")
    code, _ = next(_compiled(*case.values) for case in _cases() if case.values[0] is kernel)
    doubles, width = ("DADD", "DMUL", "DFMA", "DSETP"), _width(kernel)
    loops = [[each for each in loop if each[0] != "U"] for loop in _loops(code, tmp_path)]
    single = [loop for loop in loops if not any(each.startswith(doubles) for each in loop)]

    def accesses(loop: list[str], *names: str) -> set[str]:
        return {each for each in loop if each.startswith(names)}

    if width or "float32" in kernel.name:
        copying = [accesses(loop, "LDGSTS", "LDG") for loop in single]
        assert any(found and all("LDGSTS" in each and width in each for each in found) for found in copying)
    if "backward_2" not in kernel.name:  # a residual does not wait there
        single = [loop for loop in single if not accesses(loop, "LDG")]
    single = [loop for loop in single if all(width in each for each in accesses(loop, "LDS", "LDG", "STG", "STL"))]
    assert any(accesses(loop, "FADD") for loop in single if not accesses(loop, "STG"))
    writing = [loop for loop in single if accesses(loop, "LDS") and accesses(loop, "STG")]
    assert any(accesses(loop, "FMUL") for loop in writing)
    assert not any(accesses(loop, "FFMA") for loop in writing)  # the formula's bits, whichever kernel it is part of


@pytest.mark.parametrize("kernel", [*_sums_by_vectors()[::3], *_of_one_launch()], ids=lambda kernel: kernel.name)
def test_integers_alone_are_counted_atomically(kernel: Kernel, tmp_path: Path) -> None:
    if not _DISASSEMBLER.exists():
        pytest.skip("nvidia-cuda-nvdisasm is not installed; what kernels do atomically is not verified")
    code, _ = next(_compiled(*case.values) for case in _cases() if case.values[0] is kernel)
    found = {match[1] for line in _assembly(code, tmp_path) if (match := _INSTRUCTION.search(line))}
    counting, waiting = {"ATOMG.E.INC.STRONG.GPU"}, {"ATOMG.E.CAS.STRONG.GPU"}
    waits = kernel.name.startswith(("forward", "backward"))
    assert {each for each in found if each.startswith(("ATOM", "RED."))} == (counting | waiting if waits else counting)
    # Who merges, or waits, looks past the multiprocessor's own cache, which is emptied then, and sleeps in between.
    assert {"CCTL.IVALL", "MEMBAR.ALL.GPU", *(("LDG.E.STRONG.GPU", "NANOSLEEP") if waits else ())} <= found
