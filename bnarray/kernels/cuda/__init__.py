"""Kernels for CUDA devices, in two launches a pass: sums of chunks, then the element-wise work.

One file per verb holds its loops beside their formula, as in `kernels.cpu`. What the verbs share is elsewhere: `walk`
tells a thread its feature and its elements, `block` sums over a block's threads, `memory` reads and writes elements,
`exact` sums float32 numbers without losing what they round away, `compiled` compiles and launches.

Work is cut by shapes alone, sums are merged in a fixed order and nothing is added atomically: the same input gives the
same bits on every run, and on every device.
"""
