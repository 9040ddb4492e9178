"""words: the first word of each sample's first block. Writes 8 bytes a sample, reads nothing."""

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.triton import _launch
from ddpm_fast.ops.triton._philox import philox4x32_10

BLOCK = 128


@triton.jit(do_not_specialize=["samples", "seed", "noise_stream", "first_sample"])
def _words_kernel(
    words_ptr,  # (samples,) int64
    samples: tl.int64,
    seed: tl.uint64,
    noise_stream: tl.uint32,
    first_sample: tl.uint64,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample = first_sample.to(tl.uint64) + n.to(tl.uint64)
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    zero = low ^ low
    word, _, _, _ = philox4x32_10(zero, noise_stream.to(tl.uint32) | zero, low, high, seed.to(tl.uint64))
    tl.store(words_ptr + n, word.to(tl.int64), mask=n < samples)


def words(count, seed, stream, first_sample, device):
    made = torch.empty(count, dtype=torch.int64, device=device)
    if count:
        numbers = dict(samples=count, seed=seed, noise_stream=stream, first_sample=first_sample)
        _launch.start(made.device, _words_kernel, (-(-count // BLOCK), 1, 1), {}, dict(words_ptr=made), numbers, dict(BLOCK=BLOCK))
    return made
