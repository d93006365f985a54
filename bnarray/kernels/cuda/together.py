"""How the blocks of a tile of features wait for one another, inside one launch.

A block takes a ticket when it begins, and that is its number: blocks of lower numbers have begun. It leaves its chunk's
partial results and reports. Who reports last merges all of them, in their fixed order, and lets the others go on. So
each tile is merged once, and what is merged, and how, does not depend on who does it.

Nobody waits forever. A block that has looked in vain for `PATIENCE` times leaves its chunk to the last one and makes
room on its multiprocessor; the last one then does the rest of that chunk, from memory, with the same bits. So there is
progress however few blocks a device holds at a time and whatever else runs there, if only at the speed of one block a
tile. Tickets make that rare: of all that wait, those of the lowest tile can only wait for one that will begin next.

The sums of a pass of two launches (`moments`, `grad_sums`) report in the same way, and whoever is last merges, once for
each tile and not in every block of the second launch; there nobody waits.

Integers alone are counted atomically. All are 0 before a launch, and after it::

    words = [tickets, reports of tile 0, of tile 1, …, order to block 0, to block 1, …]

A report releases what the block's threads have written (before a barrier) and acquires what others reported; so do
orders. Blocks that are alone in their tile touch none of this.
"""

from functools import cache

import numpy as np

from bnarray.kernels.cuda import compiled
from bnarray.kernels.cuda.compiled import IS_SIMULATED, THREADS, cuda, machinery, pointer, types

#: As kernels take it.
words_type = pointer(types.uint32)

#: An order to a block: to go on; or what it left there itself, that it is gone.
NONE, GO_ON, GONE = range(3)

#: How many times a block looks for its order, and nanoseconds of sleep between. A look takes half a microsecond or so
#: besides: together about a millisecond, some dozen times what siblings need that run side by side.
PATIENCE, NAP = 1500, 200

#: Numbers that thread 0 tells the others of its block, each in a place of its own, so that none is overwritten unread.
TOLD = 3

#: Blocks on a multiprocessor at a time, where shared memory has room for as many: for 80 registers a thread.
BLOCKS = 3

if IS_SIMULATED:
    count_up = put_first = look = None  # the simulator's
else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    _WORD, _ADDRESS = ir.IntType(32), ir.IntType(64)

    def _do(builder, code, words, at, *operands):
        """Let an instruction of PTX work on a word in global memory, and return what it found there."""
        where = builder.addrspacecast(builder.gep(words, [at]), _WORD.as_pointer(1))
        operands = [builder.ptrtoint(where, _ADDRESS), *(builder.trunc(each, _WORD) for each in operands)]
        code = ir.InlineAsm(
            ir.FunctionType(_WORD, [each.type for each in operands]),
            code, f"=r,l{',r' * (len(operands) - 1)},~{{memory}}", side_effect=True,
        )  # fmt: skip
        return builder.zext(builder.call(code, operands), _ADDRESS)

    @intrinsic
    def count_up(typingctx, words, at, last):
        """Add 1 to a word, or make it 0 if it is `last`; return what it was."""

        def generate(context, builder, signature, arguments):
            return _do(builder, "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;", *arguments)

        return types.int64(words, types.int64, types.int64), generate

    @intrinsic
    def put_first(typingctx, words, at, order):
        """Write an order where there is none; return what was there."""

        def generate(context, builder, signature, arguments):
            return _do(builder, "atom.acq_rel.gpu.global.cas.b32 $0, [$1], 0, $2;", *arguments)

        return types.int64(words, types.int64, types.int64), generate

    @intrinsic
    def look(typingctx, words, at):
        """Return a word."""

        def generate(context, builder, signature, arguments):
            return _do(builder, "ld.acquire.gpu.global.u32 $0, [$1];", *arguments)

        return types.int64(words, types.int64), generate


#: Bytes of shared memory of a block, at most; and from which compute capability on elements can be copied there.
SHARED, OLDEST = 49152, (8, 0)


def most_parts(device: int) -> int:
    """How many blocks may wait for one another: a quarter of what the device, or this part of it, holds at a time.

    None, where Numba's dispatcher launches (`compiled`): in one launch it need not find the bits of two.
    """
    return 0 if compiled.obstacles else _most_parts(device)


@cache
def _most_parts(device: int) -> int:
    try:
        from cuda.core import Device
    except ImportError:
        return 0
    if tuple(Device(device).compute_capability) < OLDEST:
        return 0
    about = Device(device).properties
    blocks = min(
        BLOCKS,
        about.max_threads_per_multiprocessor // THREADS,
        about.max_shared_memory_per_multiprocessor // (SHARED + about.reserved_shared_memory_per_block),
    )
    return int(blocks * about.multiprocessor_count // 4)


def needed(tiles: int, blocks: int) -> int:
    """How many words a launch needs."""
    return 1 + tiles + blocks


@machinery
def ticket(words, chunks, told):
    """Return the block's number, to all of its threads; `told` is shared memory for `TOLD` numbers."""
    if chunks == 1:
        return np.int64(cuda.blockIdx.x)
    if cuda.threadIdx.x == 0:
        told[0] = count_up(words, 0, np.int64(cuda.gridDim.x) - 1)
    cuda.syncthreads()
    return told[0]


@machinery
def is_last(words, tile, chunks, told):
    """Report that the block's partial results are there; return whether so are all others of the tile."""
    cuda.syncthreads()
    if chunks == 1:
        return True
    if cuda.threadIdx.x == 0:
        told[1] = count_up(words, 1 + tile, chunks - 1)
    cuda.syncthreads()
    return told[1] == chunks - 1


@machinery
def is_let_go(words, order, patience, told):
    """Wait for the last block's word; return whether it came. If not, the last block has to do this one's chunk."""
    if cuda.threadIdx.x == 0:
        found = look(words, order)
        while found == NONE and patience > 0:
            cuda.nanosleep(NAP)
            patience -= 1
            found = look(words, order)
        if found == NONE:
            found = put_first(words, order, GONE)
        if found != NONE:
            words[order] = NONE
        told[2] = found
    cuda.syncthreads()
    return told[2] != NONE


@machinery
def let_go(words, orders, part, chunks, threads):
    """Let the other blocks of the tile go on; return whether some are gone."""
    gone = 0
    cuda.syncthreads()
    for other in range(np.int64(cuda.threadIdx.x), chunks, threads):
        if other != part and put_first(words, orders + other, GO_ON) == GONE:
            gone = 1
    return cuda.syncthreads_or(np.int32(gone))


@machinery
def is_gone(words, order):
    """Whether a block is gone, and with this call forgotten."""
    found = look(words, order)
    cuda.syncthreads()
    if found == GONE and cuda.threadIdx.x == 0:
        words[order] = NONE
    return found == GONE
