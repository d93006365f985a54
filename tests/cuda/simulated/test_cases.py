"""The table of cases, on a pretended device, against the formula in float64."""

import numpy as np
import pytest

from bnarray.testing import check_case
from tests.cases import Options, draw, table

# Memory that is not aligned to its elements is not for kernels: a backend copies it first.
_CASES = [case for case in table() if case.values[2] != "unaligned" and np.prod(case.values[0]) < 2000]


@pytest.mark.parametrize(("shape", "kept", "layout", "dtype", "options"), _CASES[::7])
def test_simulated_kernels(
    simulated: object, shape: tuple[int, ...], kept: tuple[int, ...], layout: str, dtype: str, options: Options
) -> None:
    case = draw(shape, kept, layout, dtype, options, seed=len(shape) + len(layout))
    check_case(
        lambda array: array, np.asarray, case.x, case.dy, kept, relu=case.relu, statistics=case.statistics, **case.call
    )
