"""Bugs to plant in the kernels, of the kinds that are made there, and the tests that are to catch each: what mutate.py runs.

``good`` stands once in its file, a file of csrc or of the Triton kernels.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    kind: str  # barrier, wait, mask, tail, stride, fragment, coefficient, column, sum or index
    what: str
    file: str
    good: str
    bad: str
    tests: str  # pytest's arguments: files in tests/*/, and -k of one word
    quick: str = ""  # one test that catches it in seconds, for the suite's sample


GROUP_NORM = "csrc/cuda/group_norm.cuh"
GROUP_NORM_BACKWARD = "csrc/cuda/group_norm_backward.cuh"
ATTENTION = "csrc/cuda/attention.cu"
ATTENTION_BACKWARD = "csrc/cuda/attention_backward.cu"
TILE = "csrc/cuda/attention_tile.cuh"
TRITON = "ddpm_fast/ops/triton/"

CUDA = [
    Mutation("barrier", "no __syncwarp before the centre is overwritten", GROUP_NORM,
             "    __syncwarp();  // all lanes have read the centre that is written next\n", "", "test_group_norm_cuda.py",
             "test_group_norm_wrong_cuda.py::test_the_kernels_compiled_so_are_right_without_an_edit[forward]"),
    Mutation("barrier", "no barrier behind the first means", GROUP_NORM,
             "table.centre[c] = mean;\n  });\n  __syncthreads();\n", "table.centre[c] = mean;\n  });\n", "test_group_norm_cuda.py"),
    Mutation("tail", "the last tile is as long as the others", "csrc/cuda/group_norm_tile.cuh",
             "place.end = int32_t(min(begin + tile.positions, all));", "place.end = int32_t(begin + tile.positions);",
             "test_group_norm_cuda.py"),
    Mutation("stride", "rows of the scale taken for dense", GROUP_NORM,
             "place.sample * a.scale.stride + channel", "place.sample * a.channels + channel", "test_group_norm_cuda.py"),
    Mutation("coefficient", "FiLM without its 1 +", GROUP_NORM,
             "= 1.0f + read(a.scale.view", "= read(a.scale.view", "test_group_norm_cuda.py"),
    Mutation("sum", "tiles merged without their offsets", GROUP_NORM,
             "sum += m.count * (m.origin - origin + m.offset);", "sum += m.count * (m.origin - origin);", "test_group_norm_cuda.py"),
    Mutation("mask", "one word of the mask serves all", GROUP_NORM,
             "keep[bit / 64 % words] >> bit % 64", "keep[0] >> bit % 64", "test_group_norm_cuda.py"),
    Mutation("sum", "half a warp is summed", "csrc/cuda/reduce.cuh",
             "for (int offset = 16; offset >= 1; offset /= 2) x += across(x, offset);",
             "for (int offset = 8; offset >= 1; offset /= 2) x += across(x, offset);", "test_group_norm_cuda.py"),
    Mutation("barrier", "no barrier between warps and their total", GROUP_NORM_BACKWARD,
             "partial[1][warp] = linear;\n  __syncthreads();", "partial[1][warp] = linear;", "test_group_norm_backward_cuda.py"),
    Mutation("barrier", "no barrier before the samples' sums", GROUP_NORM_BACKWARD,
             "partial[1][threadIdx.y][threadIdx.x] = bias;\n  __syncthreads();", "partial[1][threadIdx.y][threadIdx.x] = bias;",
             "test_group_norm_backward_cuda.py"),
    Mutation("sum", "one of three sums lost between tiles", GROUP_NORM_BACKWARD,
             "sums[first + c] = {upstream, product, normalised};", "sums[first + c] = {upstream, product, 0.0f};",
             "test_group_norm_backward_cuda.py"),
    Mutation("index", "some samples left out of the parameters' gradient", GROUP_NORM_BACKWARD,
             "sample += group_norm_rows) {", "sample += 2 * group_norm_rows) {", "test_group_norm_backward_cuda.py"),
    Mutation("mask", "a query's padding, > for >=", ATTENTION_BACKWARD,
             ">= tokens) grad_logits[n][i] = 0;", "> tokens) grad_logits[n][i] = 0;", "test_attention_cuda.py"),
    Mutation("mask", "a key's padding, > for >=", ATTENTION,
             ">= tokens) weights[n][i] = -INFINITY;", "> tokens) weights[n][i] = -INFINITY;", "test_attention_cuda.py"),
    Mutation("barrier", "no barrier before the values", ATTENTION,
             "    __syncthreads();  // the values are there, and the keys have been used\n", "", "test_attention_cuda.py"),
    Mutation("wait", "values used before they are copied", ATTENTION,
             "    wait_for_copies();\n    __syncthreads();  // the values are there", "    __syncthreads();  // the values are there",
             "test_attention_cuda.py"),
    Mutation("coefficient", "the sum of weights not rescaled", ATTENTION, "      total[half] *= shrink;\n", "", "test_attention_cuda.py"),
    Mutation("sum", "a shuffle of the total forgotten", ATTENTION,
             "    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);\n", "", "test_attention_cuda.py"),
    Mutation("wait", "the next queries copied over those in use", ATTENTION_BACKWARD,
             "load_queries(first + queries, buffer ^ 1);", "load_queries(first + queries, buffer);", "test_attention_cuda.py"),
    Mutation("barrier", "no barrier before the next queries", ATTENTION_BACKWARD,
             "    __syncthreads();  // this pair is there, and the one before has been used\n    if (first + queries < tokens)",
             "    if (first + queries < tokens)", "test_attention_cuda.py"),
    Mutation("sum", "half of a row's lanes summed", ATTENTION_BACKWARD,
             "lanes < lanes_of_row; lanes *= 2", "lanes < lanes_of_row / 2; lanes *= 2", "test_attention_cuda.py"),
    Mutation("coefficient", "a gradient without the scale", ATTENTION_BACKWARD,
             "grad_q, {scale, scale}", "grad_q, {1.0f, 1.0f}", "test_attention_cuda.py"),
    Mutation("coefficient", "sums of values not rescaled", ATTENTION, "sums[n][2 * half] *= shrink;", "", "test_attention_cuda.py"),
    Mutation("index", "delta of the wrong head", ATTENTION_BACKWARD,
             "delta[(sample * heads + head) * tokens + token] = sum", "delta[row] = sum", "test_attention_cuda.py"),
    Mutation("fragment", "halves of a column exchanged", TILE,
             "b.set(0, words[2 * step]);\n        b.set(1, words[2 * step + 1]);",
             "b.set(0, words[2 * step + 1]);\n        b.set(1, words[2 * step]);", "test_attention_cuda.py"),
    Mutation("stride", "every sample writes the first one's rows", TILE,
             "return {out + share.sample * tokens * stride + share.head * channels", "return {out + share.head * channels",
             "test_attention_cuda.py"),
    Mutation("tail", "rows beyond the last stored", TILE, "if (first + row < head.rows && c *", "if (c *", "test_attention_cuda.py"),
    Mutation("tail", "rows beyond the last copied", TILE,
             "channels_exist && first + row + i < head.rows", "channels_exist", "test_attention_cuda.py"),
    Mutation("index", "every head reads the first one's rows", TILE,
             "(which * heads + share.head) * channels", "which * heads * channels", "test_attention_cuda.py"),
    Mutation("stride", "chunks of shared memory not permuted", TILE, "(c % 8 ^ mixed)", "(c % 8)", "test_attention_cuda.py"),
    Mutation("fragment", "one of tf32's small products left out", "csrc/cuda/mma.cuh",
             "mma<T>(rest, a.big, b.small);", "", "test_attention_cuda.py"),
    Mutation("barrier", "no __syncwarp before the stage is read", TILE,
             "  __syncwarp();\n  constexpr uint32_t chunks", "  constexpr uint32_t chunks", "test_attention_cuda.py"),
]  # fmt: skip

TRITON_KERNELS = [
    Mutation("coefficient", "a gradient by the other table", f"{TRITON}q_sample.py",
             "entry(sigma_ptr, t, known) * grad", "entry(signal_ptr, t, known) * grad", "test_triton_simulated.py -k q_sample",
             "test_triton_simulated.py::test_results_and_gradients[q_sample, tensor-(6, 2, 7, 13)-float32-sm_80]"),
    Mutation("coefficient", "history by the wrong coefficient", f"{TRITON}p_step.py",
             "x_next + previous * read", "x_next + x_t * read", "test_triton_simulated.py -k p_step"),
    Mutation("coefficient", "guidance forgotten in a gradient", f"{TRITON}p_step.py",
             "(from_out - through) * g_start", "from_out * g_start", "test_triton_simulated.py -k p_step"),
    Mutation("column", "bounds of the variance exchanged", f"{TRITON}_output.py",
             "entry(table_ptr, at + 4, known), entry(table_ptr, at + 5, known), entry(table_ptr, at + 6, known)",
             "entry(table_ptr, at + 4, known), entry(table_ptr, at + 6, known), entry(table_ptr, at + 5, known)",
             "test_triton_simulated.py -k learned",
             "test_triton_simulated.py::test_results_and_gradients[vlb_terms learned, clipped, erf-(6, 2, 7, 13)-float32-sm_80]"),
    Mutation("stride", "a doubled output taken for a single one", f"{TRITON}simple_loss.py",
             "n[:, None] * elements * DOUBLED + i", "n[:, None] * elements + i", "test_triton_simulated.py -k half",
             "test_triton_simulated.py::test_results_and_gradients[simple_loss with a variance half, tensor-(6, 2, 7, 13)-float32-sm_80]"),
    Mutation("mask", "a sample beyond the last", f"{TRITON}_tile.py", "(n < samples)[:, None] & (i", "(n <= samples)[:, None] & (i",
             "test_triton_simulated.py -k noise",
             "test_triton_simulated.py::test_noise_of_extreme_keys[Noise(seed=0, stream=0, first_sample=0)]"),
    Mutation("mask", "t equal to T is read with", f"{TRITON}_tile.py",
             "(t >= 0) & (t < steps)", "(t >= 0) & (t <= steps)", "test_triton_simulated.py -k outside"),
    Mutation("coefficient", "a sign in the gradient of the second mean", f"{TRITON}gaussian_kl.py",
             "sums_ptr, -pull, place", "sums_ptr, pull, place", "test_triton_simulated.py -k gaussian"),
    Mutation("fragment", "words of the generator exchanged", f"{TRITON}_philox.py",
             "c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)", "c3, c1 = p1.to(tl.uint32), p0.to(tl.uint32)",
             "test_triton_simulated.py -k noise",
             "test_triton_simulated.py::test_noise_of_extreme_keys[Noise(seed=0, stream=0, first_sample=0)]"),
    Mutation("index", "eight normals a thread in the wrong order", f"{TRITON}_philox.py",
             "even, odd = tl.join(tl.join(a, e), tl.join(c, g))", "even, odd = tl.join(tl.join(a, c), tl.join(e, g))",
             "test_triton_simulated.py -k noise",
             "test_triton_simulated.py::test_noise_has_the_bits_of_the_contract[(5, 1024)-torch.bfloat16]"),
    Mutation("tail", "normals beyond a row's end stored", f"{TRITON}randn.py",
             "mask=inside)", "mask=(n < samples)[:, None])", "test_triton_simulated.py -k noise",
             "test_triton_simulated.py::test_noise_has_the_bits_of_the_contract[(3, 1023)-torch.float32]"),
    Mutation("stride", "rows of normals as long as a tile", f"{TRITON}randn.py",
             "n[:, None] * elements + i", "n[:, None] * COLUMNS + i", "test_triton_simulated.py -k noise"),
    Mutation("index", "sample numbers of 32 bits", f"{TRITON}_philox.py",
             "first_sample.to(tl.uint64) + n[:, None].to(tl.uint64), seed",
             "(first_sample.to(tl.uint32) + n[:, None].to(tl.uint32)).to(tl.uint64), seed", "test_triton_simulated.py -k noise"),
    Mutation("mask", "an end of the clipping range has no gradient", f"{TRITON}_elementary.py",
             "(x >= -limit)", "(x > -limit)", "test_triton_simulated.py -k ends"),
    Mutation("tail", "a sum's tiles beyond the last", f"{TRITON}_reduce.py",
             "range(0, tiles, BLOCK)", "range(0, tiles - 1, BLOCK)", "test_triton_reduce.py"),
]  # fmt: skip

CPU = [
    Mutation("index", "every sample at the first one's time", "csrc/cpu/q_sample.cpp",
             "a.t ? a.t[sample] : sample", "a.t ? a.t[0] : sample", "test_q_sample.py -k cpu"),
    Mutation("coefficient", "guidance forgotten in a gradient", "csrc/cpu/p_step.cpp",
             "without = row.from_out - with;", "without = row.from_out;", "test_p_step.py test_ops_gradients.py"),
    Mutation("stride", "the variance half read from the mean's", "csrc/cpu/p_step.cpp",
             "sample * a.model_output.stride + a.sizes.elements + first, count, state.raw",
             "sample * a.model_output.stride + first, count, state.raw", "test_p_step.py -k cpu"),
    Mutation("coefficient", "half a gradient", "csrc/cpu/simple_loss.cpp",
             "float(2.0 / double", "float(1.0 / double", "test_simple_loss.py -k cpu"),
    Mutation("mask", "a gradient of a bin that is missed", "csrc/cpu/vlb_terms.cpp",
             "missed ? 0.0f : -bin.by_mean", "-bin.by_mean", "test_vlb_terms.py -k cpu"),
    Mutation("sum", "the last block's gradient alone", "csrc/cpu/gaussian_kl.cpp",
             "totals[1 + k] += sum(grads[k], count)", "totals[1 + k] = sum(grads[k], count)", "test_ops_system.py -k whole"),
    Mutation("tail", "the last element of a block not summed", "csrc/cpu/block.h",
             "i + lane < count; ++lane", "i + lane + 1 < count; ++lane", "test_simple_loss.py -k cpu"),
    Mutation("index", "chunks of a large sample overlap", "csrc/cpu/block.h",
             "task % chunks * chunk :", "task % chunks * block_elements :", "test_ops_system.py -k whole"),
    Mutation("mask", "the end of the clipping range has no gradient", "csrc/common/diffusion_math.h",
             "(x >= -limit) & (x <= limit)", "(x > -limit) & (x < limit)", "test_ops_gradients.py -k ends"),
    Mutation("coefficient", "a key of the generator off by one", "csrc/common/philox.h",
             "k0 += 0x9E3779B9u", "k0 += 0x9E3779B8u", "test_group_norm_cuda.py -k philoxs"),
    Mutation("coefficient", "a key of the normals' generator off by one", "csrc/cpu/normals.h",
             "k0 += 0x9E3779B9u", "k0 += 0x9E3779B8u", "test_randn.py"),
    Mutation("sum", "segments merged without their weights", "csrc/cpu/group_norm.cpp",
             "distance * distance * (count * share)", "distance * distance * share", "test_group_norm.py -k cpu"),
    Mutation("coefficient", "a mean not taken off for each pixel", "csrc/cpu/group_norm_backward.cpp",
             "double(cut_.pixels) * constant - linear", "constant - linear", "test_group_norm.py -k cpu"),
    Mutation("tail", "a row below the image", "csrc/cpu/conv3x3.cpp",
             "(h < a.height) & (w >= 0)", "(h <= a.height) & (w >= 0)", "test_conv3x3.py"),
    Mutation("fragment", "a sign of the output's transform", "csrc/cpu/conv3x3.cpp",
             "y[1] = m[1] - m[2] - m[3];", "y[1] = m[1] - m[2] + m[3];", "test_conv3x3.py"),
    Mutation("stride", "the residual of the first channels for all", "csrc/cpu/conv3x3.cpp",
             "get(a.residual + place + channel)", "get(a.residual + place)", "test_conv3x3.py"),
]  # fmt: skip

MUTATIONS = [*CUDA, *TRITON_KERNELS, *CPU]
