"""Gradients: backward of one op, and the autograd function through which a plain eager call has it."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast._memory import resolved
from ddpm_fast._pytorch import below_functorch, in_batches
from ddpm_fast.backends import native


class Gradients:
    """Backward of one op, by whichever way can give it.

    ``arguments`` are all of a call's, in order. A kernel gets them as a NamedTuple, ``needs`` (which of them need a gradient) as
    another, and answers {name of an argument: its gradient}. What is not in the answer, or None, has no gradient.

    Args:
        names: of the arguments.
        tensors: positions of those that may be tensors.
        reference: the formula in plain PyTorch.
        differentiable: names of the arguments whose gradient the kernels give; of others the reference does.
        reads: names of the tensors that backward reads; None for all.
        reads_results: positions of the results that it reads too: its kernels are then called with a list of them as last
            argument. Of such an op the first result alone has a gradient.
        plain: backward in plain PyTorch, differentiable again, called as plain(arguments, needs, grads). None for autograd's of the
            reference.
        kernels: a forward implementation to its backward kernel, called as ``plain`` is.
        ahead: a forward implementation (of the CPU) to a forward that also gives the gradients, for an upstream of ones: called as
            ahead(arguments, needs), it returns the result, the gradients, and the tensors that backward then multiplies by the
            upstream of each sample; or None for arguments that it does not serve. For float32: in 16 bits a gradient would be
            rounded twice, and lost where it is small before a loss is scaled.
    """

    def __init__(
        self,
        names: Sequence[str],
        tensors: Sequence[int],
        *,
        reference: Callable[..., Any],
        differentiable: Sequence[str],
        reads: Sequence[str] | None,
        reads_results: Sequence[int],
        plain: Callable[..., Any] | None,
        kernels: dict[Callable[..., Any], Callable[..., Any]],
        ahead: dict[Callable[..., Any], Callable[..., Any]],
    ) -> None:
        self.names = names
        make_arguments: Any = namedtuple  # checkers know it with names that are written out alone
        self.Arguments = make_arguments("Arguments", names)
        self.reference = reference
        self.differentiable = tuple(names.index(name) for name in differentiable)
        self.without_kernel = [i for i in tensors if i not in self.differentiable]
        self.reads = None if reads is None else [names.index(name) for name in reads]
        self.reads_results = tuple(reads_results)
        self.plain, self.kernels, self.ahead = plain, kernels, ahead

    def __call__(
        self,
        implementation: Callable[..., Any],
        arguments: Sequence[Any],
        needs: Sequence[bool],
        grads: Sequence[Tensor | None],
        results: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """Gradients of the arguments, one each: by the kernel of an implementation or, where it cannot, by plain PyTorch with a graph."""
        if grads[0] is None and all(grad is None for grad in grads):  # what followed gave none
            return [None] * len(needs)
        kernel = self.kernels.get(implementation)
        if kernel and not torch.is_grad_enabled() and not in_batches(grads) and not any([needs[i] for i in self.without_kernel]):
            grads = [grad if grad is None else resolved(grad) for grad in grads]
            found = kernel(self.Arguments(*arguments), self.Arguments(*needs), grads, *([results] if self.reads_results else []))
            return self.in_order(found)
        if self.plain is not None:
            return self.by_plain(arguments, needs, grads)
        with torch.enable_grad():
            with below_functorch():  # as forward was, with its draw
                made = self.reference(*arguments)
            both = zip(made if isinstance(made, tuple) else (made,), grads, strict=True)
            pairs = [(result, grad) for result, grad in both if grad is not None and result is not None]
            inputs = [x for x, needed in zip(arguments, needs, strict=True) if needed]
            found = torch.autograd.grad([r for r, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, allow_unused=True)
        return spread(found, needs)

    def by_plain(self, arguments: Sequence[Any], needs: Sequence[bool], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        assert self.plain is not None
        return self.in_order(self.plain(self.Arguments(*arguments), self.Arguments(*needs), grads))

    def in_order(self, gradients: dict[str, Tensor | None]) -> list[Tensor | None]:
        """One an argument."""
        return [gradients.get(name) for name in self.names]


class Differentiable(torch.autograd.Function):
    """A call of an implementation with arguments of which one needs a gradient."""

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, implementation: Callable[..., Any], *arguments: Any) -> Any:
        ctx.gradients, ctx.implementation, ctx.ahead, ctx.prepared = gradients, implementation, gradients.ahead.get(implementation), None
        ctx.set_materialize_grads(False)
        made = None if ctx.ahead is None else ctx.ahead(gradients.Arguments(*arguments), gradients.Arguments(*ctx.needs_input_grad[2:]))
        if made is None:
            ctx.ahead = None
            results = implementation(*arguments)
            kept = [results[i] for i in gradients.reads_results]
            ctx.mark_non_differentiable(*[results[i] for i in gradients.reads_results if i > 0])
            keep_for_backward(ctx, arguments, gradients.reads, kept)
            return results
        keep_for_backward(ctx, arguments, gradients.reads)
        result, *ctx.prepared = made
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradients, needs = ctx.gradients, ctx.needs_input_grad[2:]
        if ctx.ahead is None or grads[0] is None or torch.is_grad_enabled() or in_batches(grads):
            arguments, kept = kept_for_backward(ctx)
            return None, None, *gradients(ctx.implementation, arguments, needs, grads, kept)
        # They are given away: a second backward prepares them anew, in the same way for the same bits.
        arguments, wanted = gradients.Arguments, gradients.Arguments(*needs)
        prepared, parts = ctx.prepared or ctx.ahead(arguments(*kept_for_backward(ctx)[0]), wanted)[1:]
        ctx.prepared, upstream = None, resolved(grads[0]).contiguous()
        for part in parts:
            native.cpu_scale(sizes=part, x_start=part, signal=upstream, out=part)
        return None, None, *gradients.in_order(prepared)


def spread(found: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of what needs one, as a gradient or None for each argument."""
    following = iter(found)
    return [next(following) if needed else None for needed in needs]


def keep_for_backward(ctx: Any, arguments: Sequence[Any], reads: Sequence[int] | None, results: Sequence[Tensor] = ()) -> None:
    """Saves the tensors among the arguments (those at ``reads``, or all) and results where autograd watches over them, the rest beside."""
    tensors = [x if isinstance(x, Tensor) else None for x in arguments]
    ctx.others = [x if tensor is None else None for x, tensor in zip(arguments, tensors, strict=True)]
    ctx.save_for_backward(*(tensors if reads is None else [x if i in reads else None for i, x in enumerate(tensors)]), *results)


def kept_for_backward(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """Arguments and results as `keep_for_backward` got them; None for a tensor that was not saved."""
    saved, count = ctx.saved_tensors, len(ctx.others)
    return [other if x is None else x for x, other in zip(saved[:count], ctx.others, strict=True)], list(saved[count:])
