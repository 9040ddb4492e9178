"""The Triton kernels, compiled for a GPU and executed in the simulator: results and gradients, odd sizes, and what must not happen.

The calls are op_cases.py's; the simulator stops at accesses that are out of bounds or misaligned and at reads of what was never
written. How much is moved, and by how many instructions, is in test_triton_traffic.py; test_triton_interpreted.py is the wider
sweep over shapes and options.
"""

import contextlib
import importlib

import pytest
import torch
from interpreter import INTERPRETED
from numerics import assert_as_accurate, assert_bits_equal
from op_cases import CLIPPED, NAMES, every_case, everything, make, upstreams, with_guesses_at_the_ends
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import Noise
from ddpm_fast._pytorch import goes_through_dispatcher
from ddpm_fast.noise.philox import noise_reference
from ddpm_fast.noise.philox import philox4x32_10 as philox_reference
from ddpm_fast.ops import gaussian_kl, p_step, q_sample, randn, simple_loss, vlb_terms

pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

import triton
import triton.language as tl
from ptxsim.triton_runner import run_triton
from simulator import simulated

from ddpm_fast.ops.triton import _launch
from ddpm_fast.ops.triton._philox import philox4x32_10

SUMMED = ("simple_loss", "vlb_terms", "gaussian_kl mean")  # their sums run in another order than the CPU kernels'
# (shape, dtype, architecture). Unaligned rows of 182 elements, five to a program; two tiles with a tail; 128 tiny samples to a
# program and some left over; rows that keep 16-bit vectors aligned.
SIZES = [
    ((6, 2, 7, 13), torch.float32, 80),
    ((2, 1, 1, 1500), torch.float32, 80),
    ((131, 1, 1, 3), torch.float32, 80),
    ((3, 2, 7, 13), torch.bfloat16, 80),
    ((2, 1, 1, 1504), torch.bfloat16, 80),
    ((3, 1, 8, 8), torch.float16, 80),
    ((2, 1, 1, 1504), torch.float32, 90),
    ((3, 2, 7, 13), torch.bfloat16, 90),
]


def is_summed(name):
    return name.startswith(SUMMED)


def native_bits(name, case, grads):
    """Of the CPU kernels, by name: all that is not a sum. The losses' gradients are those of backward itself.

    In fp32 a loss's forward writes them ahead, for an upstream of ones: rounded otherwise.
    """
    if not is_summed(name):
        return everything(case, grads, backend="cpu")
    op = importlib.import_module(f"ddpm_fast.ops._{case.op}")._op
    make_arguments = op.gradients.Arguments
    needs = make_arguments(**{name: name in case.leaves for name in case.arguments})
    found = op.gradients.kernels[op.backends.implementations["cpu"]](make_arguments(**case.arguments), needs, grads)
    elementwise = [leaf for leaf in case.leaves if case.arguments[leaf].numel() >= case.arguments[case.leaves[0]].numel()]
    return {f"gradient of {leaf}": found[leaf] for leaf in elementwise}


@pytest.mark.parametrize("name", CLIPPED)
def test_the_ends_of_the_clipping_range_pass_a_gradient(name):
    case = with_guesses_at_the_ends(make(name, None if name.startswith("vlb") else "tensor", (3, 2, 7, 13)))
    grads = upstreams(case())
    exact, baseline = everything(case.in_float64(), [g.double() for g in grads]), everything(case, grads, backend="reference")
    with simulated(80):
        got = everything(case, grads, backend="triton")
    for what, x in got.items():
        assert_as_accurate(x, baseline[what], exact[what], floor=4.0, what=what)


@pytest.mark.parametrize("shape, dtype, arch", SIZES, ids=[f"{shape}-{str(dtype)[6:]}-sm_{arch}" for shape, dtype, arch in SIZES])
@every_case
def test_results_and_gradients(name, given, shape, dtype, arch):
    case = make(name, given, shape, dtype)
    grads = upstreams(case())
    exact = everything(case.in_float64(), [g.double() for g in grads])
    baseline = everything(case, grads, backend="reference")
    native = native_bits(name, case, grads)
    with simulated(arch):
        got = everything(case, grads, backend="triton")
    for what, x in got.items():
        # 4 ulps: a chain of roundings, of which the baseline's may happen to cancel.
        assert_as_accurate(x, baseline[what], exact[what], floor=4.0, what=what)
        if what in native:
            assert_bits_equal(x, native[what], f"{what}, against the CPU kernel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1023), (5, 1024), (200, 5), (2, 3, 7, 16)], ids=str)
def test_noise_has_the_bits_of_the_contract(shape, dtype):
    key = Noise(seed=2**63 + 5, stream=2**31 + 1, first_sample=2**32 - 2)
    with simulated(80) as launches:
        out = randn(shape, key, dtype=dtype, backend="triton")
    assert_bits_equal(out, noise_reference(shape, key.seed, key.stream, key.first_sample, torch.device("cpu")).to(dtype))
    (launch,) = launches
    assert launch.report.global_store.bytes_requested == out.numel() * out.element_size()  # none twice, and all of them


@triton.jit
def words_kernel(words_ptr, counters_ptr, seed: tl.uint64, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    c0 = tl.load(counters_ptr + at).to(tl.uint32, bitcast=True)
    c1 = tl.load(counters_ptr + BLOCK + at).to(tl.uint32, bitcast=True)
    c2 = tl.load(counters_ptr + 2 * BLOCK + at).to(tl.uint32, bitcast=True)
    c3 = tl.load(counters_ptr + 3 * BLOCK + at).to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox4x32_10(c0, c1, c2, c3, seed)
    tl.store(words_ptr + at, w0.to(tl.int32, bitcast=True))
    tl.store(words_ptr + BLOCK + at, w1.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 2 * BLOCK + at, w2.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 3 * BLOCK + at, w3.to(tl.int32, bitcast=True))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x299F31D0A4093822, 12345])
def test_words_are_the_generators(seed, arch):
    """Before any float: Philox's four words, for counters of all zeros, all ones, pi (Random123's known answers), and any."""
    counters = torch.randint(-(2**31), 2**31, (4, 128), dtype=torch.int32)
    counters[:, 0], counters[:, 1] = 0, -1
    counters[:, 2] = torch.tensor([0x243F6A88, 0x85A308D3 - 2**32, 0x13198A2E, 0x03707344])
    words = torch.empty_like(counters)
    run_triton(
        words_kernel,
        (1,),
        dict(words_ptr=words, counters_ptr=counters, seed=seed),
        dict(BLOCK=128),
        arch=arch,
        uninitialised_outputs=("words_ptr",),
    )
    unsigned = [c.long() & 0xFFFFFFFF for c in counters]
    expected = philox_reference(*unsigned, seed & 0xFFFFFFFF, seed >> 32)
    for word, known in zip(words, expected, strict=True):
        assert_bits_equal(word.long() & 0xFFFFFFFF, known)


@pytest.mark.parametrize("key", [Noise(0), Noise(2**32, 1, 2**32), Noise(2**64 - 1, 2**32 - 1, 2**64 - 1), Noise(1, 0, 2**63 - 1)], ids=str)
def test_noise_of_extreme_keys(key):
    with simulated(90):
        out = randn((2, 9), key, backend="triton")
    assert_bits_equal(out, noise_reference((2, 9), key.seed, key.stream, key.first_sample, torch.device("cpu")))


def test_samples_beyond_the_grids_second_dimension(monkeypatch):
    """65,535 programs is the most that y holds: the rest go on in z."""
    case = make("q_sample", "Noise", (7, 1, 1, 1030))
    monkeypatch.setattr(_launch, "LARGEST_GRID_Y", 3)
    with simulated(80) as launches:
        (out,) = case(backend="triton")
    assert launches[0].grid == (2, 3, 3)
    assert_bits_equal(out, case()[0])


@pytest.mark.parametrize(
    "samples, elements, rows, columns, grid",
    [
        (1, 1, 128, 8, (1, 1, 1)),
        (128, 8, 128, 8, (1, 1, 1)),
        (129, 8, 128, 8, (1, 2, 1)),
        (3, 1024, 1, 1024, (1, 3, 1)),
        (3, 1025, 1, 1024, (2, 3, 1)),
        (65535, 4096, 1, 1024, (4, 65535, 1)),
        (65536, 4096, 1, 1024, (4, 32768, 2)),  # more than y holds: halved, not a full layer and a nearly empty one
        (1, 2**34, 1, 1024, (2**24, 1, 1)),  # the largest sample there can be
    ],
)
def test_plan(samples, elements, rows, columns, grid):
    assert _launch.plan(samples, elements) == (rows, columns, grid[0], grid)


def unchecked_t(value):
    """Calls with a t that the public functions would refuse on CPU, as they cannot on a GPU."""
    for name, given in NAMES:
        case = make(name, given, (3, 2, 5))
        if "t" in case.arguments and given != "tensor":
            t = case.arguments["t"].clone()
            t[1] = t.max() + 1 if value == "T" else value
            yield case, t


@pytest.mark.parametrize("value", [-1, "T", 10**6, 2**62])
def test_t_outside_the_tables_gives_nan_for_its_sample_alone(value, monkeypatch):
    """Nothing is read with it: the simulator would stop."""
    monkeypatch.setattr("ddpm_fast.ops._common.check_t_values", lambda t, steps: None)
    for case, t in unchecked_t(value):
        with simulated(80):
            wrong, right = case(t=t, backend="triton"), case(backend="triton")
        for x, y in zip(wrong, right, strict=True):
            assert x[1].isnan().all(), case.op
            assert_bits_equal(x[::2], y[::2], case.op)


class _Log(TorchDispatchMode):
    """Every PyTorch operator that runs."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


MAKES_ROOM = {
    "empty", "empty_like", "new_empty", "detach", "view", "expand", "as_strided", "select", "unbind", "slice", "alias", "_unsafe_view",
}  # fmt: skip


def test_the_log_sees_what_runs():
    with _Log() as log:
        torch.zeros(3)[torch.tensor([1])].sum().item()
    assert {"index", "sum", "_local_scalar_dense"} <= set(log.called)


@pytest.mark.parametrize(
    "name, given",
    [
        (name, given)
        for name, given in NAMES
        if name in ("q_sample", "simple_loss", "p_step", "gaussian_kl", "vlb_terms", "gaussian_kl mean")
    ],
)
@pytest.mark.parametrize("shape, tiles", [((3, 2, 5), 1), ((2, 1, 1500), 2)], ids=["one tile", "two tiles"])
def test_launches_and_nothing_else(name, given, shape, tiles, monkeypatch):
    """No gather, no synchronisation: beside its launches an op only makes room for results (and a sum over tiles)."""
    case = make(name, given, shape).watched()
    summed = is_summed(name)
    # The log would otherwise be taken for a tracer, which must see operators instead of kernels.
    monkeypatch.setattr("ddpm_fast.ops._op.goes_through_dispatcher", lambda: False)
    with simulated(80, run=False) as launches, _Log() as log:
        assert goes_through_dispatcher()
        results = case(backend="triton")
        assert len(launches) == (2 if summed and tiles > 1 else 1), "forward"
        allocated = log.called.count("empty") + log.called.count("empty_like") + log.called.count("new_empty")
        assert allocated == len(results) + (summed and tiles > 1)
        launches.clear()
        torch.autograd.grad(results, case.inputs(), [torch.ones_like(x) for x in results])
        # The mean's last operand has one value a sample here, whose gradient is a sum.
        assert len(launches) == (2 if name == "gaussian_kl mean" and tiles > 1 else 1), "backward"
    unexpected = set(log.called) - MAKES_ROOM - {"ones_like"}
    assert not unexpected


@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 2, 5, 103), torch.float32), ((2, 2, 5, 103), torch.bfloat16), ((3, 1, 1, 37), torch.float32), ((2, 1, 43, 47), torch.float32)],
    ids=["one tile", "one tile, bfloat16", "shared programs", "two tiles"],
)
@pytest.mark.parametrize("name", ["simple_loss", "gaussian_kl mean", "vlb_terms"])
def test_a_sample_has_the_same_bits_in_any_batch_and_at_any_address(name, shape, dtype):
    """Slices of a batch of odd rows lie at odd addresses: another variant, whose threads hold other elements."""
    case = make(name, "Noise", shape, dtype)
    grads = [torch.randn(x.shape).to(x.dtype) for x in case()]
    with simulated(80):
        whole = everything(case, grads, backend="triton")
        for n in (0, 1):
            part = case.samples(n, n + 1)
            assert n == 0 or part.inputs()[0].data_ptr() % 16
            (alone,) = part(backend="triton")  # as it lies; `everything` copies it to addresses of its own
            assert_bits_equal(alone, whole["result 0"][n : n + 1], f"sample {n}")
            for what, x in everything(part, [g[n : n + 1] for g in grads], backend="triton").items():
                assert_bits_equal(x, whole[what][n : n + 1], f"{what}, sample {n}")
    with simulated(90):
        for what, x in everything(case, grads, backend="triton").items():
            assert_bits_equal(x, whole[what], f"{what}, on another architecture")


@pytest.mark.parametrize("low", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["p_step learned, multistep and guided", "vlb_terms learned, clipped, erf"])
def test_a_learned_variance_does_not_look_at_the_tables(name, low):
    case = make(name, "Noise", (3, 2, 9))
    table = case.arguments["table"].clone()
    table[:, 5:7] = low  # the columns log_variance_low and log_variance_high of both ops
    case = case.given(variance="learned", table=table)
    expected = everything(case, backend="cpu")
    with simulated(80):
        got = everything(case, backend="triton")
    for what, x in got.items():
        assert x.isfinite().all(), what
        assert_as_accurate(x, expected[what], expected[what].double(), floor=4.0, what=what)


@pytest.mark.parametrize("shape", [(3, 2, 5), (64, 2, 8)], ids=["a program partly filled", "programs full"])
def test_nothing_is_drawn_where_no_sample_wants_it(shape):
    step, loss = make("p_step", "Noise", shape), make("simple_loss", "Noise", shape)
    table = step.arguments["table"].clone()
    table[:, 7] = 0.0
    quiet = [step.given(table=table), loss.given(noise_coef=torch.zeros_like(loss.arguments["noise_coef"]))]
    for cases, drawn in ((quiet, False), ([step, loss], True)):
        for case in cases:
            with simulated(80) as launches:
                everything(case, backend="triton")
            roots = [launch.report.opcodes.get("sqrt.rn.f32", 0) for launch in launches]
            assert any(roots) == drawn, case.op


def test_debugging_puts_no_check_on_words_that_wrap(monkeypatch):
    monkeypatch.setitem(_launch.OPTIONS, "debug", True)  # as TRITON_DEBUG=1 does
    with simulated(80, run=False) as launches:
        make("q_sample", "Noise", (2, 1, 1030))(backend="triton")
    assert "assertfail" not in launches[0].compiled.asm["ptx"]
    monkeypatch.setitem(_launch.OPTIONS, "sanitize_overflow", True)
    with simulated(80, run=False) as launches:
        make("q_sample", "Noise", (2, 1, 1030))(backend="triton")
    assert "assertfail" in launches[0].compiled.asm["ptx"]


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch):
    current, seen = [0], []

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = {(1, 1, 1): lambda **arguments: seen.append(current[0])}
    for index in (0, 1, 0):
        _launch.start_here(torch.device("cuda", index), kernel, (1, 1, 1), {}, {}, {}, {})
    assert seen == [0, 1, 0] and current == [0]


def test_results_are_written_where_they_are_wanted():
    case = make("q_sample", "Noise", (3, 2, 7))
    expected = case()[0]
    x = case.arguments["x_start"].clone()
    with simulated(80):
        assert q_sample(x, *[case.arguments[k] for k in ("t", "signal", "sigma", "noise")], out=x, backend="triton") is x
        drawn = randn((3, 5), Noise(3), out=torch.empty(3, 5), backend="triton")
    assert_bits_equal(x, expected)
    assert_bits_equal(drawn, randn((3, 5), Noise(3)))
    case = make("p_step learned, multistep and guided", "Noise", (3, 2, 7))
    arguments = dict(case.arguments)
    expected = case()
    x_t, previous = arguments.pop("x_t").clone(), arguments.pop("x_start_previous").clone()
    without, scale, _ = (arguments.pop(k) for k in ("without", "scale", "with_x_start"))
    with simulated(80):
        got = p_step(
            x_t=x_t, x_start_previous=previous, guidance=(without, scale), x_next=x_t, x_start=previous, backend="triton", **arguments
        )
    assert got[0] is x_t and got[1] is previous
    for a, b in zip(got, expected, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("layout", ["transposed", "every other"])
def test_strided_inputs_are_made_contiguous(layout):
    case = make("vlb_terms learned, clipped, erf", None, (3, 2, 4, 6))

    def change(name, x):
        if x.ndim != 4:
            return x
        return x.mT.contiguous().mT if layout == "transposed" else torch.stack([x, x], -1)[..., 0]

    with simulated(80):
        assert_bits_equal(case.map(change)(backend="triton")[0], case(backend="triton")[0])


@pytest.mark.parametrize("operand", [(1, 1030), (1, 1), (3, 1)], ids=["one sample for all", "one value for all", "one value a sample"])
@pytest.mark.parametrize("reduction", [None, "mean_per_sample"])
def test_operands_of_the_kl_that_are_broadcast(operand, reduction):
    generator = torch.Generator().manual_seed(0)
    mean1, logvar1 = torch.randn(2, 3, 1030, generator=generator)
    mean2, logvar2 = torch.randn(2, *operand, generator=generator)
    grads = [torch.randn(3, 1030, generator=generator) if reduction is None else torch.randn(3, generator=generator)]

    def run(backend, dtype=torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (mean1, logvar1, mean2, logvar2)]
        kl = gaussian_kl(*leaves, reduction=reduction, backend=backend)
        return [kl.detach(), *torch.autograd.grad(kl, leaves, [g.to(dtype) for g in grads])]

    with simulated(80):
        got = run("triton")
    for x, base, exact in zip(got, run("reference"), run("reference", torch.float64), strict=True):
        assert_as_accurate(x, base, exact, floor=4.0)


def test_mixed_dtypes_of_data_and_output():
    """A model under autocast gives 16 bits for fp32 data, and the other way round."""
    for data, out in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        for name, call in (("simple_loss", simple_loss), ("vlb_terms", vlb_terms)):
            case = make(name, "Noise" if name == "simple_loss" else None, (2, 2, 9), data)
            case = case.given(model_output=case.arguments["model_output"].to(out)).watched()
            assert case.call is call
            with simulated(80):
                got = everything(case, backend="triton")
            expected = everything(case, backend="reference")
            exact = everything(case.in_float64())
            for what, x in got.items():
                assert_as_accurate(x, expected[what], exact[what], floor=4.0, what=what)
