"""Every differentiable op inside a program: threads, instruction sets, forked processes, batches, and what it must leave alone.

The calls are op_cases.py's. torch.compile and tracing are in test_ops_compile.py, gradients in test_ops_gradients.py.
"""

import multiprocessing
import queue
import threading

import pytest
import torch
from machine import ISAS
from numerics import assert_bits_equal, assert_close_to_exact
from op_cases import NAMES, TABLES, every_case, everything, make, thread_count, upstreams

from ddpm_fast import gaussian_kl
from ddpm_fast.backends import native

DTYPES = [torch.float32, torch.bfloat16]
# Both are enough for two threads, which share from 2 · 8192 elements on. Many samples that are less than a block of 1024
# elements; two of 66 blocks, more than the 64 chunks that a sample is summed in, the last block not full.
MANY_SMALL, FEW_LARGE = (1901, 2, 5), (2, 1, 67001)
SIZES = pytest.mark.parametrize(
    "shape, dtype",
    [(MANY_SMALL, torch.float32), (MANY_SMALL, torch.bfloat16), (FEW_LARGE, torch.float32)],
    ids=["many small samples", "many small samples, bfloat16", "few large samples"],
)


def assert_all_bits_equal(actual, expected, what=""):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert_bits_equal(x, expected[name], f"{name} {what}")


@SIZES
@every_case
def test_threads_do_not_change_a_bit(name, given, shape, dtype, isa):
    case = make(name, given, shape, dtype)
    with thread_count(1):
        alone = everything(case)
    for count in (2, 3):  # three: the work is not cut in halves, and there may be more threads than processors
        with thread_count(count):
            assert_all_bits_equal(everything(case), alone, f"with {count} threads")


@pytest.mark.parametrize("name, given", [case for case in NAMES if case[0].startswith(("simple_loss", "gaussian_kl mean", "vlb_terms"))])
def test_large_samples_are_summed_whole(name, given):
    """Each chunk is of several blocks, which the bits of two runs cannot show to be all there."""
    case = make(name, given, FEW_LARGE)
    found, exact = everything(case), everything(case.in_float64())
    for part in (part for part, x in found.items() if x.numel() == FEW_LARGE[0]):  # sums over a sample: results, and gradients
        # Terms err by some ulps of their own magnitude, 2^-23 of it, and so does their sum; a block that is missed is 1/66 of it.
        assert_close_to_exact(found[part], exact[part], rtol=2.0**-17, what=part)


@SIZES
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "portable"], indirect=True)
@every_case
def test_instruction_sets_agree(name, given, isa, shape, dtype):
    case = make(name, given, shape, dtype)
    got = everything(case)
    native.select_isa("portable")  # the fixture puts it back
    # Each operation is rounded by itself and sums run in an order that no register's width decides: nothing is left to differ.
    assert_all_bits_equal(got, everything(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_a_sample_does_not_depend_on_its_batch(name, given, dtype, isa):
    # More than a block, and rows that are not aligned.
    case = make(name, given, (6, 3, 17, 23), dtype)
    grads = [torch.randn(x.shape).to(dtype=x.dtype) for x in case()]
    whole = everything(case, grads)
    parts = [everything(case.samples(a, b), [g[a:b] for g in grads]) for a, b in ((0, 1), (1, 4), (4, 6))]
    for part, x in whole.items():
        assert_bits_equal(torch.cat([p[part] for p in parts]), x, part)


def test_a_sample_of_the_kl_does_not_depend_on_its_batch_where_operands_are_for_all():
    """The gradient of what is one sample for all is the only thing that a batch adds up."""
    means, logvars = torch.randn(2, 6, 1031)
    for operand in (torch.randn(1, 1031), torch.randn(1, 1), torch.randn(1031)):
        whole = gaussian_kl(means, logvars, operand, operand)
        assert_bits_equal(torch.cat([gaussian_kl(means[n : n + 1], logvars[n : n + 1], operand, operand) for n in range(6)]), whole)


@every_case
def test_called_from_many_python_threads_at_once(name, given):
    """Kernels run without the interpreter's lock, forward and backward."""
    case, results = make(name, given, (4, 3, 41, 43)), queue.Queue()
    expected = everything(case)
    workers = [threading.Thread(target=lambda: [results.put(everything(case)) for _ in range(4)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert results.qsize() == 16
    while not results.empty():
        assert_all_bits_equal(results.get(), expected)


def last_numbers(case):
    return [x.flatten()[-1].item() for x in case()]


def run_in_child(answers, case):
    # PyTorch's own parallel operators hang here, so nothing but ours touches a large tensor: forward alone.
    torch.set_num_threads(2)
    answers.put(last_numbers(case))


@every_case
def test_safe_in_a_forked_child(name, given):
    """The parent has used OpenMP, whose threads do not survive the fork; the child must neither wait for them nor differ."""
    case = make(name, given, (4, 3, 128, 128))
    with thread_count(2):
        here = last_numbers(case)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=run_in_child, args=(answers, case), daemon=True)
    child.start()
    try:
        assert answers.get(timeout=600) == here
        child.join(60)
        assert child.exitcode == 0
    except queue.Empty:
        pytest.fail("the forked child hangs")
    finally:
        child.kill()


@every_case
def test_leaves_global_random_state_and_inputs_alone(name, given):
    case = make(name, given, (3, 2, 41, 43))
    before = {part: x.clone() for part, x in case.arguments.items() if isinstance(x, torch.Tensor)}
    state, grads = torch.get_rng_state(), [torch.ones_like(x) for x in case()]
    everything(case, grads)
    assert torch.equal(torch.get_rng_state(), state)
    for part, x in before.items():
        assert_bits_equal(case.arguments[part], x, part)
    for grad in grads:
        assert_bits_equal(grad, torch.ones_like(grad), "the gradient that came")


@every_case
def test_deterministic_and_never_nondeterministic_by_torchs_rule(name, given):
    """The same bits each time, also under torch.use_deterministic_algorithms, which fills new memory with NaN."""
    case = make(name, given, (5, 2, 7, 11))
    expected = everything(case)
    torch.use_deterministic_algorithms(True)
    try:
        assert_all_bits_equal(everything(case), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@every_case
def test_autocast_leaves_the_dtype_alone(name, given):
    case = make(name, given, (3, 2, 5))
    expected = everything(case)
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_bits_equal(everything(case), expected)


# Layouts: what a kernel reads is the logical order, so no layout may change a bit.


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def every_other(x):
    return torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)[..., ::2].copy_(x)


def turned(x):
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def unaligned(x):
    """One element into its storage: no kernel may assume 16 bytes."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("layout", [channels_last, every_other, turned, unaligned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@every_case
def test_layout_does_not_change_a_bit(name, given, dtype, layout):
    # Rows of 1003 elements: no sample but the first begins at a multiple of 16 bytes.
    case = make(name, given, (4, 17, 59, 1), dtype)
    expected = everything(case)

    def change(part, x):
        if part in TABLES:
            return unaligned(x) if layout is unaligned else x
        if part == "t":
            return torch.stack([x, x.max() - x], 1)[:, 0]  # strides of two
        return layout(x) if x.ndim == 4 else x

    other = case.map(change)
    # Leaves are views of what they are the gradient of: autograd must give each the gradient of its own elements.
    leaves = {leaf: other.arguments[leaf].detach().requires_grad_() for leaf in case.leaves}
    results = other.given(**leaves)()
    grads = [layout(g) if g.ndim == 4 else g for g in upstreams(results)]
    found = torch.autograd.grad(results, list(leaves.values()), grads)
    for i, x in enumerate(results):
        assert x.is_contiguous()
        assert_bits_equal(x.detach(), expected[f"result {i}"], f"result {i}")
    for leaf, grad in zip(case.leaves, found, strict=True):
        assert_bits_equal(grad.contiguous(), expected[f"gradient of {leaf}"], f"gradient of {leaf}")


@every_case
def test_expanded_inputs_and_gradients(name, given):
    """Strides of zero: one sample for all, and the gradient that sum() sends."""
    case = make(name, given, (4, 2, 37))
    expanded = case.map(lambda part, x: x if part in (*TABLES, "t") else x[:1].expand_as(x))
    written = case.map(lambda part, x: x if part in (*TABLES, "t") else x[:1].expand_as(x).contiguous())
    for got, expected in zip(expanded(), written(), strict=True):
        assert_bits_equal(got, expected)
    summed = written.watched()
    sum(x.sum() for x in summed()).backward()
    ones = everything(written, [torch.ones_like(x) for x in written()])
    for leaf, x in zip(summed.leaves, summed.inputs(), strict=True):
        assert_bits_equal(x.grad, ones[f"gradient of {leaf}"], leaf)


def test_table_has_every_differentiable_op():
    """An op that is added must come under these tests."""
    registered = {op.partition("::")[2].partition(".")[0] for op in torch._C._dispatch_get_all_op_names() if op.startswith("ddpm_fast::")}
    differentiable = {op for op in registered if f"{op}_backward" in registered}
    of_networks = {"group_norm", "attention"}  # other shapes and other promises: test_group_norm.py and test_attention.py ask them
    assert differentiable - of_networks == {make(name, given, (2, 2, 3)).op for name, given in NAMES}
