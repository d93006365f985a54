"""Kernels for CUDA devices: sums of chunks, then the element-wise work, in two launches a pass, or in one.

One file per verb holds its loops beside their formula, as in `kernels.cpu`; `forward` and `backward` make one launch of
two verbs' loops. What the verbs share is elsewhere: `walk` tells a thread its feature and its elements, `block` sums
over a block's threads, `memory` reads and writes elements, `stage` keeps them on chip, `together` has blocks wait for
one another, `exact` sums float32 numbers without losing what they round away, `compiled` compiles and launches.

Work is cut by shapes, strides and dtypes alone, sums are merged in a fixed order and no number is added atomically: the
same input gives the same bits on every run, on every device, and in one launch as in two.
"""
