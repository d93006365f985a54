"""The same calls, drawn by atheris: ``python -m tests.fuzz.guided -max_total_time=600``.

It varies its choices by which branches of the library they have reached. (``pip install atheris``; it has wheels for a
few versions of Python only.) Kernels are left out: Numba compiles them from the bytecode that atheris changes.
"""

import sys
from random import Random

import atheris

with atheris.instrument_imports(include=["bnarray"], exclude=["bnarray.kernels"]):
    from tests.fuzz import calls
from tests.fuzz.memory import forget_plans, guarded_library


class Choices(Random):
    """Random numbers that are read from bytes; zeros when these are used up."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data, self._at = data, 0

    def getrandbits(self, k: int, /) -> int:
        size = -(-k // 8)
        taken = self._data[self._at : self._at + size].ljust(size, b"\0")
        self._at += size
        return int.from_bytes(taken) >> (8 * size - k)

    def random(self) -> float:
        return self.getrandbits(16) / 2**16


_number = 0


def judge(data: bytes) -> None:
    global _number
    _number += 1
    if _number % 500 == 0:
        forget_plans()
    calls.run(Choices(data))


if __name__ == "__main__":
    with guarded_library():
        atheris.Setup(sys.argv, judge)
        atheris.Fuzz()
