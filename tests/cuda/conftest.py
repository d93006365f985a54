"""Tests of the CUDA kernels on machines without a GPU: none of them shows that anything runs on one."""

import os

# Numba decides when it is imported whether devices are simulated: those tests need a process of their own, which
# test_simulation.py starts.
collect_ignore = [] if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" else ["simulated"]
