"""Kernels for the CPU.

One file per verb holds the bare loops beside their formula. What the verbs share is elsewhere: `walk` finds a tile's
place in memory, `memory` turns it into a contiguous tile of float32 or float64 and back, `compiled` compiles and keeps
kernels on disk, `pool` hands out their work to threads, which `handover` reaches without the interpreter.
"""
