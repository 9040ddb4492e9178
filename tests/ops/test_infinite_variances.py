"""Divergences of infinite log-variances, as an overflow in 16 bits gives them: plus infinity, never minus, and NaN only of NaN."""

import math

import pytest
import torch
from interpreter import INTERPRETED
from op_inputs import VLB_TERMS_STEPS as STEPS

from ddpm_fast import GaussianDiffusion, NoiseSchedule, gaussian_kl
from ddpm_fast.diffusion.parameterisation import bound_table
from ddpm_fast.ops import vlb_terms
from ddpm_fast.ops._common import table_dtype

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# logvar1, logvar2, m1 - m2; the divergence, and its derivatives by mean1, logvar1 and logvar2: ½(e^d - 1 - d) + ½ distance².
CASES = [
    (INF, 0.0, 0.5, INF, 0.5, INF, -INF),
    (0.0, -INF, 0.5, INF, INF, INF, -INF),
    (0.0, -INF, 0.0, INF, 0.0, INF, -INF),
    (INF, -INF, 0.5, INF, INF, INF, -INF),
    (-INF, 0.0, 0.5, INF, 0.5, -0.5, 0.375),
    (0.0, INF, 0.5, INF, 0.0, -0.5, 0.5),
    (-INF, INF, 0.5, INF, 0.0, -0.5, 0.5),
    (NAN, 0.0, 0.5, NAN, 0.5, NAN, NAN),
    (0.0, NAN, 0.5, NAN, NAN, NAN, NAN),
    (0.0, 0.0, NAN, NAN, NAN, 0.0, NAN),
    (NAN, -INF, 0.5, NAN, INF, NAN, NAN),
    (INF, INF, 0.5, NAN, 0.0, NAN, NAN),
    (-INF, -INF, 0.5, NAN, INF, NAN, NAN),
]
LARGE = [(3e38, 0.0), (0.0, -3e38), (2e38, -1e38), (1000.0, 0.0), (0.0, -1000.0)]  # finite, of which e^d is not


def tensors(values, backend, dtype=torch.float32):
    """A block of ordinary ones around them: vectors of mixed kinds."""
    x = torch.zeros(len(values), 33)
    x[:, 7] = torch.tensor(values)
    return x.to(backend.device, dtype)


@pytest.mark.backends("gaussian_kl")
@pytest.mark.parametrize("reduction", [None, "mean_per_sample"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergence_and_gradients(backend, dtype, reduction):
    if dtype == torch.float64 and backend.name != "reference":
        pytest.skip("float64 is the reference's")
    logvar1, logvar2, mean1 = (tensors([case[i] for case in CASES], backend, dtype).requires_grad_() for i in range(3))
    kl = gaussian_kl(mean1, logvar1, torch.zeros_like(mean1), logvar2, reduction=reduction, backend=backend.name)
    grads = torch.autograd.grad(kl.sum() if reduction is None else kl.sum() * 33, (mean1, logvar1, logvar2))
    rest = torch.ones(33, dtype=torch.bool)
    rest[7] = False
    for row, case in enumerate(CASES):
        value = kl[row, 7] if reduction is None else kl[row]
        torch.testing.assert_close(
            value.cpu().float(), torch.tensor(case[3]), rtol=0, atol=0, equal_nan=True, msg=lambda m, c=case: f"{c}: {m}"
        )
        for name, grad, want in zip(("mean1", "logvar1", "logvar2"), grads, case[4:], strict=True):
            # 1/33 · 33 may differ from 1 by a rounding.
            torch.testing.assert_close(
                grad[row, 7].cpu().float(), torch.tensor(want), rtol=0 if reduction is None else 2 * torch.finfo(dtype).eps, atol=0,
                equal_nan=True, msg=lambda m, c=case, n=name: f"{n} of {c}: {m}",
            )  # fmt: skip
            assert (grad[row].cpu()[rest] == 0).all()
    if reduction is None:
        assert (kl.cpu()[:, rest] == 0).all()


@pytest.mark.backends("gaussian_kl")
@pytest.mark.parametrize("logvars", LARGE, ids=str)
def test_finite_differences_that_overflow(backend, logvars):
    logvar1, logvar2 = (tensors([value], backend).requires_grad_() for value in logvars)
    zero = torch.zeros_like(logvar1)
    kl = gaussian_kl(zero, logvar1, zero, logvar2, backend=backend.name)
    grads = torch.autograd.grad(kl.sum(), (logvar1, logvar2))
    assert kl[0, 7] == INF and grads[0][0, 7] == INF and grads[1][0, 7] == -INF


@pytest.mark.simulator
def test_compiled_triton_kernels_give_what_the_cpu_kernels_do():
    pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process")
    from simulator import simulated

    logvar1, logvar2, mean1 = (
        torch.tensor([[case[i] for case in CASES] + [large[i] if i < 2 else 0.0 for large in LARGE]]) for i in range(3)
    )

    def results(backend):
        leaves = [x.clone().requires_grad_() for x in (mean1, logvar1, torch.zeros_like(mean1), logvar2)]
        kl = gaussian_kl(*leaves, backend=backend)
        return [kl.detach(), *torch.autograd.grad(kl, leaves, torch.ones_like(kl))]

    with simulated(80):
        got = results("triton")
    for x, y in zip(got, results("cpu"), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.backends("vlb_terms")
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_terms_of_an_infinite_variance_half(backend, dtype, variance):
    """At t > 0 plus infinity; at t = 0 the decoder's bins have the floor of their probability, and stay finite."""
    if dtype == torch.float64 and backend.name != "reference":
        pytest.skip("float64 is the reference's")
    diffusion = GaussianDiffusion(NoiseSchedule.linear(STEPS, 1e-3, 0.3), "epsilon", variance)
    table = bound_table(diffusion.schedule, "epsilon", variance).to(backend.device, table_dtype(dtype))
    raw = torch.tensor([INF, -INF, NAN, INF, -INF, NAN])
    t = torch.tensor([5, 5, 5, 0, 0, 0], device=backend.device)
    out = torch.zeros(6, 4, 3, 3)
    out[:, 2, 1, 1] = raw
    out = out.to(backend.device, dtype).requires_grad_()
    x = torch.full((6, 2, 3, 3), 1 / 255, device=backend.device, dtype=dtype)
    terms = vlb_terms(out, x, x, t, table, variance=diffusion.variance_kind, backend=backend.name)
    assert terms[0] == INF and terms[1] == INF and terms[2].isnan()
    assert terms[3].isfinite() and terms[4].isfinite() and (terms[3:5] > 0).all() and terms[5].isnan()
    (grad,) = torch.autograd.grad(terms.sum(), out)
    by_raw = grad[:, 2, 1, 1].float()
    # ½ for a wide variance, less with every slope of its range and element; without bound for a narrow one.
    assert 0 < by_raw[0] < 1 and by_raw[1] == -INF and by_raw[2].isnan()
    assert (by_raw[3:5] == 0).all()
