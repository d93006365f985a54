"""Compiled kernels, a folder per device and a file per verb, and the one merge that all of them use."""
