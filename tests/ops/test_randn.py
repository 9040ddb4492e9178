"""randn: every backend and instruction set writes the reference's bits, in every dtype, from any number of threads."""

import numpy as np
import pytest
import torch
from compiling import count_compilations
from numerics import assert_bits_equal

from ddpm_fast import Noise
from ddpm_fast.backends import native
from ddpm_fast.noise.philox import noise_reference
from ddpm_fast.ops import q_sample, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),  # the smallest
    (2,),  # no dimension but the batch: one element a sample
    (1, 2),  # one Box-Muller pair
    (2, 3),  # less than a counter block
    (2, 5),  # a block and a tail of one
    (3, 1023),  # one short of the kernel's run of 1024
    (1, 1024),  # just a run
    (2, 1025),  # one over, and rows that are not aligned
    (1, 4099),  # a prime of several runs
    (0, 3),  # no samples
    (3, 0),  # empty samples
    (4, 3, 32, 32),  # a small batch of images
    (2, 3, 5, 7, 11),  # five dimensions
    (3, 16384),  # enough for the threads to share
]
KEY = Noise(seed=2**63 + 5, stream=2**31 + 1, first_sample=2**32 - 1)


def expected(shape, key, dtype):
    return noise_reference(shape, key.seed, key.stream, key.first_sample, torch.device("cpu")).to(dtype)


@pytest.mark.backends("randn")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(shape, dtype, backend):
    out = randn(shape, KEY, device=backend.device, dtype=dtype, backend=backend.name)
    assert out.device.type == backend.device.type
    assert out.is_contiguous()
    assert_bits_equal(out.cpu(), expected(shape, KEY, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype, isa, threads):
    shape = (5, 32771)
    assert_bits_equal(randn(shape, KEY, dtype=dtype, backend="cpu"), randn(shape, KEY, backend="cpu").to(dtype))
    torch.set_num_threads(1)
    alone = randn(shape, KEY, dtype=dtype, backend="cpu")
    torch.set_num_threads(threads)
    assert_bits_equal(randn(shape, KEY, dtype=dtype, backend="cpu"), alone)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference_rounds_once(dtype):
    assert_bits_equal(randn((2, 37), KEY, dtype=dtype, backend="reference"), expected((2, 37), KEY, torch.float32).to(dtype))


def test_float64_is_the_float32_value_widened():
    out = randn((2, 37), KEY, dtype=torch.float64)
    assert_bits_equal(out, expected((2, 37), KEY, torch.float32).double())


def test_materialize_is_randn():
    for dtype in (*DTYPES, torch.float64):
        assert_bits_equal(KEY.materialize((2, 5), dtype=dtype), randn((2, 5), KEY, dtype=dtype))
    assert_bits_equal(KEY.materialize(torch.Size((2, 5))), randn([2, 5], KEY))


# fp32 values whose conversion to a 16-bit type goes wrong first: bits, and why.
HARD_FLOATS = {
    0x7FC00000: "NaN", 0xFFC00001: "negative NaN", 0x7F800001: "a NaN whose payload is in the bits cut off", 0x7FFFFFFF: "all-ones NaN",
    0x7F800000: "infinity", 0xFF800000: "negative infinity", 0x00000000: "zero", 0x80000000: "negative zero",
    0x477FEFFF: "just below halves' overflow", 0x477FF000: "the tie that overflows a half", 0x477FE000: "the largest half",
    0x7F7FFFFF: "the largest float", 0xFF7F8000: "the tie that overflows bfloat16", 0x7F7F7FFF: "just below it",
    0x38800000: "the smallest normal half", 0x387FFFFF: "just below it, rounds up to normal", 0x387FE000: "the tie just below it",
    0x33800000: "the smallest subnormal half", 0x33000000: "half of it: a tie to zero", 0x33000001: "just above: rounds up",
    0x33C00000: "1.5 of it: a tie to even", 0x34200000: "2.5 of it: a tie to even", 0x32800000: "below all halves",
    0x00000001: "the smallest float", 0x00400000: "a subnormal float",
    0x80008000: "a subnormal tie of bfloat16", 0x00018000: "and the odd one",
    0x3F808000: "a tie of bfloat16, to even below", 0x3F818000: "a tie of bfloat16, to even above", 0x3F807FFF: "just below the tie",
    0x3F801000: "a tie of halves, to even below", 0x3F803000: "a tie of halves, to even above", 0x3F800FFF: "just below the tie",
    0x3FFFF000: "a tie that carries into the exponent", 0x3FFF8000: "the same in bfloat16",
}  # fmt: skip


def floats(bits):
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32))


def through_the_kernel(x):
    """x converted to fp32 and back by the kernel: q_sample with signal 1 and sigma 0, which turns -0 into 0."""
    one, zero = torch.ones(1), torch.zeros(1)
    return q_sample(x[None], torch.zeros(1, dtype=torch.int64), one, zero, torch.zeros_like(x)[None], backend="cpu")[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_survives_the_way_to_fp32_and_back(dtype, isa):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = through_the_kernel(every)
    assert_nan_equal(out, (every.float() + 0.0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(dtype, isa):
    """A 16-bit 1 times an fp32 signal, plus zero: the way to any fp32 value before the kernel's last rounding."""
    wanted = torch.cat([floats(list(HARD_FLOATS)), floats(np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32))])
    x = torch.ones(len(wanted), 1, dtype=dtype)
    t = torch.arange(len(wanted))
    out = q_sample(x, t, wanted, torch.zeros_like(wanted), torch.zeros_like(x), backend="cpu")[:, 0]
    assert_nan_equal(out, (wanted + 0.0).to(dtype))


def assert_nan_equal(actual, expected):
    """Bits equal where the value is a number; NaN where it is NaN: payloads are nobody's contract."""
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert_bits_equal(actual[number], expected[number])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: randn((2, 3), torch.zeros(2, 3)), TypeError, "noise must be a Noise, got Tensor"),
        (lambda: randn((2, 3), 0), TypeError, "noise must be a Noise, got int"),
        (
            lambda: randn((2, 3), KEY, dtype=torch.int32),
            TypeError,
            r"dtype must be float32, bfloat16, float16 or float64, got torch\.int32",
        ),
        (lambda: randn((), KEY), ValueError, r"shape must be \(N, \.\.\.\) with no negative size, got \(\)"),
        (lambda: randn((2, -1), KEY), ValueError, r"shape must be \(N, \.\.\.\) with no negative size, got \(2, -1\)"),
        (lambda: randn((1, 2**34 + 1), KEY), ValueError, r"a sample may have at most 2\^34 elements, got 17179869185"),
        (lambda: randn((2, 3), KEY, backend="tpu"), ValueError, "backend must be one of reference, cpu, triton, cuda, got 'tpu'"),
        (lambda: randn((2, 3), KEY, device="meta", backend="cpu"), ValueError, "backend 'cpu' of randn takes CPU tensors, got meta"),
        (lambda: randn((2, 3), KEY, backend="cuda"), ValueError, "randn has no cuda backend; it has reference, cpu, triton"),
        (
            lambda: randn((2, 3), KEY, dtype=torch.float64, backend="cpu"),
            ValueError,
            r"takes float32, bfloat16 or float16, got torch\.float64",
        ),
    ],
    ids=lambda value: value.replace("\\", "") if isinstance(value, str) else "",
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_cuda_device_where_there_is_none_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(Exception, match=r"CUDA|NVIDIA"):
        randn((2, 3), KEY, device="cuda")


def operator_arguments(shape=(3, 5), dtype=torch.float32):
    return shape, -(2**63) + 5, 2**31 + 1, -1, dtype, torch.device("cpu")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.ddpm_fast.randn.default, operator_arguments(dtype=dtype))


def test_operator_takes_unsigned_keys_in_signed_arguments():
    out = torch.ops.ddpm_fast.randn(*operator_arguments())
    assert_bits_equal(out, expected((3, 5), Noise(2**63 + 5, 2**31 + 1, 2**64 - 1), torch.float32))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_and_does_not_recompile_for_each_stream(backend):
    torch._dynamo.reset()
    compile_graph, graphs = count_compilations(backend)

    @torch.compile(fullgraph=True, backend=compile_graph)
    def double(x, noise):
        return x + 2 * randn(x.shape, noise, dtype=x.dtype)

    x = torch.zeros(3, 5)
    for step in range(6):
        key = Noise(seed=7 + step, stream=step, first_sample=10 * step)
        assert_bits_equal(double(x, key), x + 2 * randn((3, 5), key))
    assert len(graphs) <= 2, f"{len(graphs)} graphs for six keys"


def test_compiled_with_a_seed_beyond_int64():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, noise: x + randn(x.shape, noise), fullgraph=True, backend="aot_eager")
    x = torch.zeros(3, 5)
    for key in (KEY, Noise(2**64 - 1, 2**32 - 1, 2**64 - 1), Noise(2**63), Noise(3)):
        assert_bits_equal(compiled(x, key), x + randn((3, 5), key))


@pytest.mark.backends("randn")
def test_global_random_state_is_left_alone(backend):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    randn((3, 40000), KEY, device=backend.device, backend=backend.name)
    KEY.fold_in(3).integers(10, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


class DrawOneSample(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return randn((1, 3, 40000), KEY.at(first_sample=index))[0]


def test_dataloader_workers_draw_the_same():
    """Workers are forked after this process has used OpenMP, whose threads do not survive that."""
    whole = randn((6, 3, 40000), KEY.at(first_sample=0))
    loader = torch.utils.data.DataLoader(DrawOneSample(), batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=600)
    assert_bits_equal(torch.cat(list(loader)), whole)


def test_native_module_is_built():
    """Without it every test of the CPU kernels above was skipped, which a source tree may do and a release may not."""
    if native is None:
        pytest.skip("ddpm_fast._C was not built")
    assert native.isa() == native.build_info()["isas"][0]
