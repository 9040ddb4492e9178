"""That the proofs of the Triton kernels can fail: kernels made wrong on purpose are caught. And how many variants are compiled."""

import importlib
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter import INTERPRETED
from numerics import assert_bits_equal
from op_cases import NAMES, everything, make

pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

from ptxsim import MemoryFault
from simulator import memory, simulated

import ddpm_fast.ops.triton
from ddpm_fast.ops import randn
from ddpm_fast.ops.triton import _launch

PACKAGE = "ddpm_fast.ops.triton"


@pytest.fixture
def altered(tmp_path, monkeypatch):
    """A copy of the kernels with one place changed: altered(file, good, bad) gives a function that imports from it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    copies = []

    def make_copy(file, good, bad):
        name = f"altered_kernels_{abs(hash((file, good, bad))):x}"
        copies.append(name)
        folder = tmp_path / name
        shutil.copytree(Path(ddpm_fast.ops.triton.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for path in folder.glob("*.py"):
            # What starts kernels stays the one that the simulator takes the place of.
            path.write_text(re.sub(rf"{PACKAGE}\.(?!_launch)", f"{name}.", path.read_text()))
        text = (folder / file).read_text()
        assert text.count(good) == 1
        (folder / file).write_text(text.replace(good, bad))
        importlib.invalidate_caches()
        return lambda op: importlib.import_module(f"{name}.{op}")

    yield make_copy
    for module in [module for module in sys.modules if module.startswith(tuple(copies))]:
        del sys.modules[module]


def outcome(kernels, name, shape=(3, 1, 1, 1030), **changes):
    """Results and gradients of a call, by the kernels given."""
    torch.manual_seed(0)
    case = make(name, "Noise", shape).given(**changes)
    arguments = tuple(case.arguments.values())
    module, op = kernels(case.op), importlib.import_module(f"ddpm_fast.ops._{case.op}")._op
    with simulated(80):
        results = module.forward(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        make_arguments = op.gradients.Arguments
        needs = make_arguments(**{leaf: leaf in case.leaves for leaf in case.arguments})
        gradients = module.backward(make_arguments(*arguments), needs, [torch.ones_like(x) for x in results])
    return [*results, *(gradients[leaf] for leaf in case.leaves)]


def right(name, **changes):
    return outcome(lambda op: importlib.import_module(f"{PACKAGE}.{op}"), name, **changes)


WRONG = {
    "off-by-one mask": ("_tile.py", "(i < elements)", "(i <= elements)", "q_sample", MemoryFault),
    "missing tail guard": (
        "q_sample.py", "entry(sigma_ptr, t, known) * e, mask=inside)", "entry(sigma_ptr, t, known) * e)", "q_sample", MemoryFault,
    ),
    "missing guard of samples": (
        "_tile.py", "(n < samples)[:, None] & (i < elements)", "(n >= 0)[:, None] & (i < elements)", "q_sample", MemoryFault,
    ),
    "swapped coefficients": (
        "q_sample.py", "entry(signal_ptr, t, known) * x + entry(sigma_ptr, t, known) * e",
        "entry(sigma_ptr, t, known) * x + entry(signal_ptr, t, known) * e", "q_sample", AssertionError,
    ),
    "swapped coefficients, backward": (
        "p_step.py", "x_t * g + from_x_t * g_start", "from_x_t * g + x_t * g_start", "p_step", AssertionError,
    ),
    "a column of the table": ("_output.py", "entry(table_ptr, at + 3, known)", "entry(table_ptr, at + 4, known)", "p_step", AssertionError),
    "32-bit sample index": ("_philox.py", "n[:, None].to(tl.uint64)", "n[:, None].to(tl.uint64) & 0xFFFFFFFF", "q_sample", AssertionError),
    "counter of the first tile in all": ("_philox.py", "j = (first // 4)", "j = (first * 0)", "q_sample", AssertionError),
    "sum over what is not there": ("_reduce.py", "tl.where(inside, value, 0.0)", "value", "simple_loss", AssertionError),
    "sum of the first tile alone": ("_reduce.py", "first + at < tiles", "first + at < 1", "simple_loss", AssertionError),
    "zeros of the variance half": (
        "simple_loss.py", "if DOUBLED == 2:", "if DOUBLED == 3:", "simple_loss with a variance half", AssertionError,
    ),
    "the decoder at the wrong step": ("vlb_terms.py", "    if any_row(t == 0):", "    if any_row(t == 1):", "vlb_terms", AssertionError),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_caught(what, altered):
    file, good, bad, name, fault = WRONG[what]
    # Rows of five to a program, and not all of them there; or two tiles with a tail.
    shape = (3, 1, 1, 5) if what == "missing guard of samples" else (3, 1, 1, 1030)
    expected, kernels = right(name, shape=shape), altered(file, good, bad)
    with pytest.raises(fault, match="elements differ" if fault is AssertionError else "out-of-bounds"):
        for got, wanted in zip(outcome(kernels, name, shape), expected, strict=True):
            assert_bits_equal(got, wanted)


def test_variants_are_told_apart_as_triton_does(monkeypatch):
    """The simulator compiles what a launch would: Triton's own function that decides it is asked, for odd addresses too."""
    from ptxsim.triton_runner import specialise
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    seen = []

    def start(device, kernel, grid, reads, writes, numbers, constants):
        arguments = {key: memory(x) for key, x in reads.items()} | writes | numbers
        decide = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 80, 32)))
        signature, fixed, attributes, _ = specialise(kernel, arguments, constants)
        for place, (param, (kind, more)) in enumerate(zip(kernel.params, decide(**arguments, **constants)[1], strict=True)):
            assert signature[param.name] == kind, param.name
            assert (more if kind == "constexpr" else None) == fixed.get(param.name), param.name
            assert ((place,) in attributes) == (kind != "constexpr" and bool(more)), param.name
            seen.append((kind, more))

    with simulated(80):
        monkeypatch.setattr(_launch, "start", start)
        for case in (make("p_step", "Noise", (2, 1, 5)), make("gaussian_kl mean", None, (1, 1, 16))):
            case(backend="triton")
            case.map(lambda _, x: torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x))(backend="triton")
    assert {("*fp32", "D"), ("*fp32", ""), ("i64", None), ("u64", None)} <= set(seen)


LAUNCHED = [
    ("q_sample", "Noise"),
    ("simple_loss", "tensor"),
    ("p_step learned, multistep and guided", "Noise"),
    ("gaussian_kl mean", None),
    ("vlb_terms", None),
]


@pytest.mark.parametrize("name, given", LAUNCHED)
def test_the_launcher_itself_compiles_what_the_simulator_ran(name, given, monkeypatch):
    """start_here goes through Triton's own way in, up to the launch: a stand-in for the driver only says which GPU there is."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: GPUTarget("cuda", 80, 32)
    )
    case = make(name, given, (2, 1, 1, 1504))
    with simulated(80, run=False) as launches:
        everything(case, backend="triton")

    compiled = []

    class WarmedUp:
        """A kernel that is compiled as at a launch, and not launched."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **arguments: compiled.append(self.kernel.warmup(grid=grid, **arguments))

    with simulated(80):
        start = _launch.start_here
        monkeypatch.setattr(_launch, "start", lambda device, kernel, *others: start(device, WarmedUp(kernel), *others))
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        everything(case, backend="triton")
    assert compiled
    # The code ends where the files' names begin: Triton's cache goes by the source, and may give what another checkout compiled.
    code = [
        [kernel.asm["ptx"].partition("\n\t.file")[0] for kernel in side] for side in (compiled, [launch.compiled for launch in launches])
    ]
    assert code[0] == code[1] and all("ret;" in text for text in code[0])


def test_an_unaltered_copy_passes(altered):
    kernels = altered("q_sample.py", '"""q_sample:', '"""q_sample :')
    for got, wanted in zip(outcome(kernels, "q_sample"), right("q_sample"), strict=True):
        assert_bits_equal(got, wanted)


def test_a_wild_t_is_caught_where_it_is_not_masked(altered):
    kernels = altered("_tile.py", 'mask=known, other=float("nan")', "")
    with pytest.raises(MemoryFault):
        outcome(kernels, "q_sample", t=torch.tensor([0, 10**9, 1]))


def compiled(arch):
    """Every kernel of op_cases.py's calls, by its name and call."""
    for name, given in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            with simulated(arch, run=False) as launches:
                everything(make(name, given, (2, 1, 1, 1504), dtype), backend="triton")
            for launch in launches:
                yield f"{launch.name} of {name}, {given}, {dtype}", launch.compiled.asm["ptx"]


APPROXIMATE = re.compile(r"\b(?:fma|mad)\.[\w.]*f32|\b(?:\w+\.(?:approx|full)[\w.]*|ex2|lg2|sin|cos|tanh)\.[\w.]*f32")


def test_nothing_is_contracted_or_approximated():
    """Each operation is rounded by itself and correctly: else the bits would be the device's."""
    for what, ptx in compiled(80):
        assert not APPROXIMATE.findall(ptx), what
        assert "add.rn.f32" in ptx or "mul.rn.f32" in ptx, what


def test_contraction_would_be_noticed(monkeypatch):
    monkeypatch.setitem(_launch.OPTIONS, "enable_fp_fusion", True)
    with simulated(80, run=False) as launches:
        everything(make("q_sample", "Noise", (2, 1, 1, 1504)), backend="triton")
    assert APPROXIMATE.findall(launches[0].compiled.asm["ptx"])


# Batches and image sizes as they come in training and sampling, and small ones.
LARGE = [(n, c, h, h) for n, c, h in (
    (1, 3, 32), (2, 3, 32), (3, 3, 32), (16, 3, 32), (17, 3, 32), (100, 3, 32), (128, 3, 32), (1, 1, 28), (7, 1, 28), (64, 1, 28),
    (1, 3, 64), (3, 3, 64), (8, 3, 64), (5, 3, 96), (2, 3, 128), (9, 4, 64), (16, 4, 32), (33, 4, 32), (2, 3, 256), (1, 3, 512),
)]  # fmt: skip
ODD = [(n, c, h, w) for n, c, h, w in ((1, 3, 31, 33), (2, 1, 37, 41), (5, 3, 29, 29), (4, 3, 30, 30), (3, 3, 35, 62), (1, 1, 101, 103))]
SMALL = [(n, 1, h, h) for n, h in (
    (1, 8), (64, 8), (100, 8), (3, 4), (7, 2), (1, 1), (500, 1), (2, 16), (33, 16), (10, 9),
    (11, 10), (3, 12), (4, 13), (9, 14), (5, 20), (6, 24), (2, 25), (8, 27), (3, 6), (12, 7),
)]  # fmt: skip


def variants(name, shapes, monkeypatch):
    """How many variants of each kernel calls of these shapes would compile, by the key that Triton would look them up with."""
    from ptxsim.triton_runner import specialise

    found = {}

    def start(device, kernel, grid, reads, writes, numbers, constants):
        arguments = {key: memory(x) for key, x in reads.items()} | writes | numbers
        signature, constants, attributes, _ = specialise(kernel, arguments, constants)
        found.setdefault(kernel.__name__, set()).add(repr((signature, constants, attributes)))

    with simulated(80):
        monkeypatch.setattr(_launch, "start", start)
        for n, *rest in shapes:
            if name == "randn":
                randn((n, *rest), make("q_sample", "Noise", (1, 1)).arguments["noise"], backend="triton")
            else:
                everything(make(name, "Noise", (n, *rest)), backend="triton")
    return {kernel: len(keys) for kernel, keys in found.items()}


@pytest.mark.parametrize("name", ["randn", "q_sample", "simple_loss", "p_step", "gaussian_kl", "gaussian_kl mean", "vlb_terms"])
def test_changing_sizes_compile_little(name, monkeypatch):
    """N changes nothing; H·W decides whether a program has one sample or many, and whether rows are aligned to 16, 8 or 4 bytes."""
    assert len(set(LARGE)) == 20 and len(set(SMALL)) == 20
    modes = 2 if name in ("simple_loss", "vlb_terms") else 1  # one kernel is forward and backward
    for kernel, count in variants(name, LARGE, monkeypatch).items():
        assert count <= modes, kernel
    for kernel, count in variants(name, LARGE + ODD, monkeypatch).items():
        assert count <= 3 * modes, kernel
    for kernel, count in variants(name, SMALL, monkeypatch).items():
        assert count <= 16 * modes, kernel  # eight widths, most with one or two alignments
