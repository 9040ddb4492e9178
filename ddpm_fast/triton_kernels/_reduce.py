"""The second launch of the ops that give one value a sample: sums of the programs' sums, in an order that the size alone decides."""
import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)


@triton.jit(do_not_specialize=["tiles"])
def sum_kernel(
    sums_ptr,  # (rows, tiles) fp32
    result_ptr,  # (rows,)
    tiles: tl.int64,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    lanes = tl.zeros([BLOCK], tl.float32)
    for first in range(0, tiles, BLOCK):
        lanes += tl.load(sums_ptr + row * tiles + first + at, mask=first + at < tiles, other=0.0)
    tl.store(result_ptr + row, tl.sum(lanes, 0))
