"""One table of calls for the tests that hold for every differentiable op: how to call it, and what of it has a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from op_inputs import VLB_TERMS_STEPS, gaussian_kl_inputs, p_step_inputs, q_sample_inputs, simple_loss_inputs, vlb_terms_inputs
from torch import Tensor

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule
from ddpm_fast.diffusion.parameterisation import bound_table
from ddpm_fast.ops import gaussian_kl, p_step, q_sample, simple_loss, vlb_terms
from ddpm_fast.ops._common import table_dtype
from ddpm_fast.ops._operator import noise_arguments

KEY = Noise(seed=2**63 + 5, stream=7, first_sample=2**32 - 2)
DEVICE = torch.device("cpu")  # of all tensors; conftest.py's --device sets it
TABLES = {"signal", "sigma", "weight", "x_start_coef", "noise_coef", "table"}


@dataclass(frozen=True)
class Case:
    """A call of ``op``; ``arguments`` are in the order of its operator, ``leaves`` are those that get a gradient."""

    op: str
    call: Callable
    arguments: dict[str, Any]
    leaves: tuple[str, ...]

    def __call__(self, **changes: Any) -> tuple[Tensor, ...]:
        results = self.call(**(self.arguments | changes))
        return results if isinstance(results, tuple) else (results,)

    def given(self, **changes: Any) -> Case:
        return replace(self, arguments=self.arguments | changes)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Case:
        """With every tensor changed."""
        return self.given(**{name: change(name, x) for name, x in self.arguments.items() if isinstance(x, Tensor)})

    def watched(self, *names: str) -> Case:
        """With new leaves for the arguments named, all of ``leaves`` by default."""
        return self.given(**{name: self.arguments[name].detach().clone().requires_grad_() for name in names or self.leaves})

    def inputs(self) -> list[Tensor]:
        return [self.arguments[name] for name in self.leaves]

    def samples(self, first: int, last: int) -> Case:
        """The same samples in a batch of their own."""
        part = self.map(lambda name, x: x if name in TABLES else x[first:last])
        noise = part.arguments.get("noise")
        return part.given(noise=noise.at(first_sample=noise.first_sample + first)) if isinstance(noise, Noise) else part

    def in_float64(self) -> Case:
        return self.map(lambda name, x: x.double() if x.is_floating_point() else x)

    def for_operator(self) -> list:
        """The arguments of torch.ops.ddpm_fast.<op>, which knows no Noise."""
        return [part for name, x in self.arguments.items() for part in (noise_arguments(x) if name == "noise" else (x,))]


def _q_sample(shape, dtype, noise):
    x_start, t, signal, sigma = q_sample_inputs(shape, dtype)
    return Case("q_sample", q_sample, dict(x_start=x_start, t=t, signal=signal, sigma=sigma, noise=noise), ("x_start", "noise"))


def _simple_loss(shape, dtype, noise, doubled=False):
    out, x_start, t, tables, _ = simple_loss_inputs(shape, dtype, doubled=doubled)
    weight, x_start_coef, noise_coef = (table.to(table_dtype(dtype)) for table in tables)
    tables = dict(weight=weight, x_start_coef=x_start_coef, noise_coef=noise_coef)
    return Case("simple_loss", simple_loss, dict(model_output=out, x_start=x_start, t=t, **tables, noise=noise), ("model_output",))


def _call_p_step(*, without, scale, with_x_start, **others):
    return p_step(**others, x_start=with_x_start, guidance=None if without is None else (without, scale))


def _p_step(shape, dtype, noise, kind="fixed", guided=False):
    x_t, out, t, table, _ = p_step_inputs(shape, dtype, kind=kind)
    previous, without, *_ = p_step_inputs(shape, dtype, kind=kind, seed=1)
    arguments = dict(x_t=x_t, model_output=out, t=t, table=table.to(table_dtype(dtype)), noise=noise, variance=kind, clip=guided)
    arguments |= (
        dict(x_start_previous=previous, without=without, scale=1.5) if guided else dict(x_start_previous=None, without=None, scale=1.0)
    )
    leaves = ("x_t", "model_output", "noise", *(("x_start_previous", "without") if guided else ()))
    return Case("p_step", _call_p_step, arguments | dict(with_x_start=True), leaves)


def _gaussian_kl(shape, dtype, _, reduction=None):
    mean1, logvar1, mean2, logvar2 = gaussian_kl_inputs(shape, dtype)
    if reduction:  # one value a sample, which the kernel reads where it lies
        logvar2 = logvar2.flatten(1)[:, :1].reshape(-1, *[1] * (len(shape) - 1)).clone()
    arguments = dict(mean1=mean1, logvar1=logvar1, mean2=mean2, logvar2=logvar2, reduction=reduction)
    return Case("gaussian_kl", gaussian_kl, arguments, ("mean1", "logvar1", "mean2", "logvar2"))


def _vlb_terms(shape, dtype, _, variance="fixed_large", clip=False, cdf="tanh", levels=256):
    diffusion = GaussianDiffusion(NoiseSchedule.linear(VLB_TERMS_STEPS, 1e-3, 0.3), "epsilon", variance, levels)
    out, x_start, x_t, t = vlb_terms_inputs(shape, diffusion, dtype)
    table = bound_table(diffusion.schedule, "epsilon", variance).to(table_dtype(dtype))
    options = dict(variance=diffusion.variance_kind, clip=clip, levels=levels, cdf=cdf, detach_mean=False)
    return Case("vlb_terms", vlb_terms, dict(model_output=out, x_start=x_start, x_t=x_t, t=t, table=table, **options), ("model_output",))


MAKERS = {
    "q_sample": _q_sample,
    "simple_loss": _simple_loss,
    "simple_loss with a variance half": lambda *a: _simple_loss(*a, doubled=True),
    "p_step": _p_step,
    "p_step learned, multistep and guided": lambda *a: _p_step(*a, kind="learned_range", guided=True),
    "gaussian_kl": _gaussian_kl,
    "gaussian_kl mean": lambda *a: _gaussian_kl(*a, reduction="mean_per_sample"),
    "vlb_terms": _vlb_terms,
    "vlb_terms learned, clipped, erf": lambda *a: _vlb_terms(*a, variance="learned_range", clip=True, cdf="erf", levels=17),
}
CLIPPED = ["p_step learned, multistep and guided", "vlb_terms learned, clipped, erf"]
TAKE_NOISE = ("q_sample", "simple_loss", "p_step")
NAMES = [(name, given) for name in MAKERS for given in (("Noise", "tensor") if name.startswith(TAKE_NOISE) else (None,))]

every_case = pytest.mark.parametrize("name, given", NAMES, ids=[f"{name}, {given}" if given else name for name, given in NAMES])


def make(name: str, given: str | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    """A call of the table, t with both ends; ``given`` says what the noise is."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype) if given == "tensor" else KEY
    case = MAKERS[name](shape, dtype, noise).map(lambda _, x: x.to(DEVICE))
    return case if given == "tensor" else replace(case, leaves=tuple(leaf for leaf in case.leaves if leaf != "noise"))


def with_guesses_at_the_ends(case: Case) -> Case:
    """With an x̂0 of exactly -1, 1 and 0, one after the other: the ends of the clipping range, and inside it."""
    table, out = case.arguments["table"].clone(), case.arguments["model_output"].clone()
    table[:, 0], table[:, 1] = 0.0, 1.0  # x̂0 is the output
    prediction = out[:, : case.arguments["x_t"].shape[1]]
    prediction.copy_((torch.arange(prediction.numel()) % 3 - 1).view(prediction.shape))
    same = dict(without=out.clone()) if "without" in case.arguments else {}  # guidance between equals
    return case.given(table=table, model_output=out, **same)


def step_arguments(case):
    """Of p_step itself, by name."""
    arguments = {part: x for part, x in case.arguments.items() if part not in ("without", "scale", "with_x_start")}
    return (
        arguments | dict(guidance=(case.arguments["without"], case.arguments["scale"]))
        if case.arguments["without"] is not None
        else arguments
    )


def upstreams(results: tuple[Tensor, ...], seed: int = 3) -> list[Tensor]:
    """A gradient for each result: of both signs, no power of two."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator).to(x) for x in results]


def everything(case: Case, grads: list[Tensor] | None = None, **changes: Any) -> dict[str, Tensor]:
    """Results and the gradients of all leaves, by name."""
    case = case.given(**changes).watched()
    results = case()
    found = torch.autograd.grad(results, case.inputs(), upstreams(results) if grads is None else grads)
    named = {f"result {i}": x.detach() for i, x in enumerate(results)}
    return named | {f"gradient of {leaf}": x for leaf, x in zip(case.leaves, found, strict=True)}


@contextlib.contextmanager
def thread_count(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
