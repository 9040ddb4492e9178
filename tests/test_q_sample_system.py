"""q_sample inside a program: threads, forked processes, torch.compile and the operator's registration."""
import multiprocessing
import queue
import threading
import warnings

import pytest
import torch
from numerics import assert_bits_equal
from test_q_sample import DTYPES, KEY, case
from test_randn import count_compilations

from ddpm_fast import Noise
from ddpm_fast.ops import q_sample, randn
from ddpm_fast.ops._op import noise_arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype, isa, threads):
    x, t, signal, sigma = case((7, 3, 53, 61), dtype)
    noise = randn(x.shape, KEY, dtype=dtype)
    for source in (KEY, noise):
        out = q_sample(x, t, signal, sigma, source, backend="cpu")
        assert_bits_equal(out, q_sample(x, t, signal, sigma, source, backend="reference"))


@pytest.mark.backends("q_sample")
def test_a_sample_does_not_depend_on_its_batch(backend):
    x, t, signal, sigma = case((6, 3, 17, 19), torch.float32, backend.device)
    whole = q_sample(x, t, signal, sigma, KEY, backend=backend.name)
    parts = [
        q_sample(x[a:b], t[a:b], signal, sigma, KEY.at(first_sample=KEY.first_sample + a), backend=backend.name)
        for a, b in ((0, 1), (1, 4), (4, 6))
    ]
    assert_bits_equal(torch.cat(parts), whole)


def test_called_from_many_python_threads_at_once():
    """The kernel runs without the interpreter's lock."""
    x, t, signal, sigma = case((4, 3, 64, 64), torch.float32)
    expected, results = q_sample(x, t, signal, sigma, KEY), queue.Queue()
    workers = [threading.Thread(target=lambda: [results.put(q_sample(x, t, signal, sigma, KEY)) for _ in range(5)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert results.qsize() == 20
    while not results.empty():
        assert_bits_equal(results.get(), expected)


def draw_in_child(answers, arguments):
    # PyTorch's own parallel operators hang here, so nothing but ours touches a large tensor.
    torch.set_num_threads(2)
    answers.put(randn((4, 3, 128, 128), KEY)[-1, -1, -1, -1].item())
    answers.put(q_sample(*arguments, KEY)[-1, -1, -1, -1].item())


def test_safe_in_a_forked_child():
    """The parent has used OpenMP, whose threads do not survive the fork; the child must neither wait for them nor differ."""
    arguments = case((4, 3, 128, 128), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    here = [randn((4, 3, 128, 128), KEY)[-1, -1, -1, -1].item(), q_sample(*arguments, KEY)[-1, -1, -1, -1].item()]
    torch.set_num_threads(before)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=draw_in_child, args=(answers, arguments), daemon=True)
    child.start()
    try:
        assert [answers.get(timeout=60), answers.get(timeout=60)] == here
        child.join(60)
        assert child.exitcode == 0
    except queue.Empty:
        pytest.fail("the forked child hangs")
    finally:
        child.kill()


def operator_arguments(dtype, given, requires_grad):
    x, t, signal, sigma = case((3, 5), dtype)
    noise = KEY if given == "generated" else torch.randn(3, 5).to(dtype).requires_grad_(requires_grad)
    return x.requires_grad_(requires_grad), t, signal, sigma, *noise_arguments(noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", ["generated", "tensor"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, given, requires_grad):
    torch.library.opcheck(torch.ops.ddpm_fast.q_sample.default, operator_arguments(dtype, given, requires_grad))


def test_operator_checks_t():
    x, t, *rest = operator_arguments(torch.float32, "generated", False)
    with pytest.raises(ValueError, match=r"t must lie in 0\.\.999, got t\[0\] = 1000"):
        torch.ops.ddpm_fast.q_sample(x, torch.full_like(t, 1000), *rest)


@pytest.mark.parametrize("given", ["generated", "tensor"])
def test_compiles_whole_forward_and_backward(given):
    torch._dynamo.reset()
    x, t, signal, sigma = case((4, 3, 8, 8), torch.float32)
    noise = KEY if given == "generated" else torch.randn_like(x).requires_grad_()

    def loss(x, noise):
        return (2 * q_sample(torch.tanh(x), t, signal, sigma, noise)).square().sum()

    eager, compiled = (x.clone().requires_grad_() for _ in range(2))
    expected, out = loss(eager, noise), torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled, noise)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
    for a, b in zip(*(torch.autograd.grad(y, (leaf,) if noise is KEY else (leaf, noise)) for y, leaf in ((out, compiled), (expected, eager))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_does_not_recompile_for_each_stream_and_seed():
    torch._dynamo.reset()
    compile_graph, graphs = count_compilations("aot_eager")
    compiled = torch.compile(lambda x, t, signal, sigma, noise: q_sample(x, t, signal, sigma, noise) + 0, fullgraph=True, backend=compile_graph)
    arguments = case((4, 3, 8, 8), torch.float32)
    for step in range(6):
        noise = Noise(seed=3 + step, stream=step, first_sample=4 * step)
        assert_bits_equal(compiled(*arguments, noise), q_sample(*arguments, noise))
    assert len(graphs) <= 2, f"{len(graphs)} graphs for six keys"


def test_compiled_in_bfloat16_and_channels_last():
    torch._dynamo.reset()
    x, t, signal, sigma = case((4, 3, 8, 8), torch.bfloat16)
    compiled = torch.compile(q_sample, fullgraph=True, backend="aot_eager")
    out = compiled(x.to(memory_format=torch.channels_last), t, signal, sigma, KEY)
    assert out.is_contiguous()
    assert_bits_equal(out, q_sample(x, t, signal, sigma, KEY))


def test_fake_tensors_get_a_fake_result():
    """A subclass of Tensor must reach the operator, not a kernel that reads its address."""
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(value) for value in case((3, 5), torch.float32)]
        out = q_sample(*fake, KEY)
        assert type(out).__name__ == "FakeTensor" and out.shape == (3, 5)
        assert type(randn((3, 5), KEY)).__name__ == "FakeTensor"


def test_tracers_see_the_operator():
    """A tracer that saw only the allocation of the output would replay uninitialised memory."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, *rest = case((3, 5), torch.float32)
    expected = q_sample(x, *rest, KEY)
    call = lambda x: q_sample(x, *rest, KEY)  # noqa: E731
    traced = make_fx(call)(x)
    assert "ddpm_fast.q_sample" in traced.code
    assert_bits_equal(traced(x), expected)
    assert "ddpm_fast.randn" in make_fx(lambda x: x + randn((3, 5), KEY))(x).code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and it warns of every Python branch
        assert_bits_equal(torch.jit.trace(call, x)(x), expected)


def test_functional_transforms():
    x, *rest = case((3, 5), torch.float32)
    many = torch.stack([x, 2 * x])
    mapped = torch.func.vmap(lambda x: q_sample(x, *rest, KEY))(many)
    assert_bits_equal(mapped, torch.stack([q_sample(each, *rest, KEY) for each in many]))
    grad = torch.func.grad(lambda x: q_sample(x, *rest, KEY).square().sum())(x)
    leaf = x.clone().requires_grad_()
    q_sample(leaf, *rest, KEY).square().sum().backward()
    assert_bits_equal(grad, leaf.grad)
    tangent = torch.func.jvp(lambda x: q_sample(x, *rest, KEY), (x,), (torch.ones_like(x),))[1]
    assert_bits_equal(tangent, rest[1][rest[0]][:, None].expand(3, 5).contiguous())


def test_autocast_leaves_the_dtype_alone():
    x, t, signal, sigma = case((3, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits_equal(q_sample(x, t, signal, sigma, KEY), q_sample(x, t, signal, sigma, KEY, backend="reference"))


def test_global_random_state_is_left_alone():
    arguments = case((3, 5, 100, 100), torch.float32)
    before = torch.get_rng_state()
    q_sample(*arguments, KEY)
    assert torch.equal(torch.get_rng_state(), before)
