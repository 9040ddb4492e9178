"""Operator: an op registered with torch.library, for what compiles, traces or wraps tensors.

An operator knows no Noise: it takes a tensor or three integers, NOISE in its schema. `Operator` turns one list of arguments into the
other, and registers forward and backward, their shapes and dtypes (the fake kernels) and the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends import library
from ddpm_fast.noise import Noise
from ddpm_fast.noise.philox import signed64, unsigned64
from ddpm_fast.ops._autograd import Gradients, keep_for_backward, kept_for_backward, spread

NOISE = "Tensor? noise, SymInt? seed, SymInt stream, SymInt first_sample"  # how an operator takes a Noise, a tensor or None


class Operator:
    """torch.ops.ddpm_fast.<name>, and <name>_backward for the gradients.

    Args:
        name: of the op.
        schema: its arguments, with NOISE in place of a noise.
        returns: "Tensor" or a tuple of them; an implementation may give None for all but the first.
        check: called with the arguments; raises as the public function does.
        fake: shapes and dtypes of the results, as new tensors.
        choose: the implementation for some arguments.
        gradients: backward.
        layout: memory format of the gradient of a tensor.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        returns: str,
        *,
        check: Callable[..., Any],
        fake: Callable[..., Any],
        choose: Callable[..., Any],
        gradients: Gradients,
        layout: Callable[[Tensor], torch.memory_format],
    ) -> None:
        self.name, self.check, self.choose, self.gradients, self.layout = name, check, choose, gradients, layout
        self.noise = gradients.names.index("noise") if NOISE in schema else None
        kept = ", Tensor[] kept" if gradients.reads_results else ""
        tags, backward = (torch.Tag.pt2_compliant_tag,), f"{name}_backward"
        library.define(f"{name}({schema}) -> {returns}", tags=tags)
        library.define(f"{backward}(Tensor?[] grads, {schema}, bool[] needs{kept}) -> Tensor[]", tags=tags)
        library.impl(name, self._forward, "CompositeExplicitAutograd")
        library.impl(backward, self._backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ddpm_fast::{name}", lambda *flat: fake(*self._restore(flat)), lib=library)
        torch.library.register_fake(f"ddpm_fast::{backward}", self._backward_fake, lib=library)
        torch.library.register_autograd(f"ddpm_fast::{name}", self._differentiate, setup_context=self._setup_context, lib=library)
        self._call, self._call_backward = (getattr(torch.ops.ddpm_fast, operator) for operator in (name, backward))

    def __call__(self, arguments: Sequence[Any]) -> Any:
        return self._call(*self._flatten(arguments))

    def _flatten(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments as the operator takes them: it knows no Noise, and no unsigned integers."""
        i = self.noise
        return tuple(arguments) if i is None else (*arguments[:i], *noise_arguments(arguments[i]), *arguments[i + 1 :])

    def _restore(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        i = self.noise
        if i is None:
            return tuple(flat)
        tensor, seed, stream, first_sample = flat[i : i + 4]
        generated = None if seed is None else Noise(unsigned64(seed), stream, unsigned64(first_sample))
        return *flat[:i], generated if tensor is None else tensor, *flat[i + 4 :]

    def _split(self, flat: Sequence[Any]) -> tuple[tuple[Any, ...], Sequence[bool], Sequence[Tensor]]:
        """Arguments, needs and results kept: what backward is called with after the gradients of the results."""
        flat, kept = (flat[:-1], flat[-1]) if self.gradients.reads_results else (flat, [])
        return self._restore(flat[:-1]), flat[-1], kept

    def _forward(self, *flat: Any) -> Any:
        arguments = self._restore(flat)
        self.check(*arguments)  # a compiled graph has not seen the values of t yet
        results = self.choose(arguments)(*arguments)
        if isinstance(results, tuple):
            return tuple(flat[0].new_empty(0) if result is None else result for result in results)
        return results.contiguous()

    def _backward(self, grads: Sequence[Tensor | None], *flat: Any) -> list[Tensor]:
        arguments, needs, kept = self._split(flat)
        grads = [grad if grad is not None and grad.numel() else None for grad in grads]  # a result that was not wanted is empty
        leaves = [x.detach().requires_grad_() if needed else x for x, needed in zip(arguments, needs, strict=True)]
        with torch.no_grad():
            found = self.gradients(self.choose(leaves), leaves, needs, grads, kept)
        return [
            (torch.zeros_like(x) if grad is None else grad.detach()).contiguous(memory_format=self.layout(x))
            for x, grad, needed in zip(leaves, found, needs, strict=True)
            if needed
        ]

    def _backward_fake(self, grads: Sequence[Tensor | None], *flat: Any) -> list[Tensor]:
        arguments, needs, _ = self._split(flat)
        return [torch.empty_like(x, memory_format=self.layout(x)) for x, needed in zip(arguments, needs, strict=True) if needed]

    def _setup_context(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        reads, i = self.gradients.reads, self.noise
        flat = None if reads is None else [p if i is None or p <= i else p + 3 for p in reads]
        keep_for_backward(ctx, inputs, flat, [output[k] for k in self.gradients.reads_results])
        ctx.mark_non_differentiable(*[output[k] for k in self.gradients.reads_results if k > 0])
        # The graph of a compiler knows the outputs that nobody asked a gradient of; None comes for them.
        ctx.set_materialize_grads(False)

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        flat, kept = kept_for_backward(ctx)
        i, needs = self.noise, [bool(needed) for needed in ctx.needs_input_grad]
        if i is not None:
            del needs[i + 1 : i + 4]
        found: list[Tensor | None] = [None] * len(needs)
        if all(grad is None for grad in grads):
            pass
        elif self.gradients.plain is not None:
            found = self.gradients.by_plain(self._restore(flat), needs, grads)
        else:
            found = spread(self._call_backward(list(grads), *flat, needs, *([kept] if self.gradients.reads_results else [])), needs)
        return tuple(found) if i is None else (*found[: i + 1], None, None, None, *found[i + 1 :])


def noise_arguments(noise: Noise | Tensor | None) -> tuple[Tensor | None, int | None, int, int]:
    """A noise as an operator's arguments: tensor or None, then seed (None without a Noise), stream and first_sample in int64's range."""
    if isinstance(noise, Noise):
        return None, signed64(noise.seed), noise.stream, signed64(noise.first_sample)
    return noise, None, 0, 0
