"""Op: what every differentiable op has in common. An op's file gives its formula, kernels and checks; this gives the ways in.

A plain eager call goes straight to the kernel, inside an autograd function (_autograd.py) where a gradient is needed. While
compiling or tracing, and for tensor subclasses, it goes through the operator that is registered with torch.library (_operator.py). In
torch.func the reference serves it, whose operations PyTorch can transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast._memory import check_memory, resolved, was_written
from ddpm_fast._pytorch import goes_through_dispatcher, holds_values, in_forward_mode, in_functorch
from ddpm_fast.backends import BackendTable
from ddpm_fast.ops._autograd import Differentiable, Gradients
from ddpm_fast.ops._native import memory_format
from ddpm_fast.ops._operator import NOISE, Operator


class Op:
    """One differentiable op.

    All implementations take the same positional ``arguments``.

    Args:
        name: of the op.
        schema: the operator's arguments, with NOISE in place of a noise.
        returns: "Tensor" or "(Tensor, Tensor)"; an implementation may give None for the second.
        check: called with the arguments of an operator call; raises as the public function does.
        fake: shapes and dtypes of the results, as new tensors.
        reference: the formula in plain PyTorch, differentiable.
        differentiable, backward_reads, backward_reads_results, plain_backward: as `Gradients` takes them.
        gradients_in_layout: gradients are strided as the tensors they belong to, channels_last too; else they are contiguous.
        backward, ahead: backend to what `Gradients` takes for its implementation.
        backends: backend to its implementation.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        returns: str,
        *,
        check: Callable[..., Any],
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        differentiable: Sequence[str],
        backward_reads: Sequence[str] | None = None,
        backward_reads_results: Sequence[int] = (),
        gradients_in_layout: bool = False,
        plain_backward: Callable[..., Any] | None = None,
        backward: dict[str, Callable[..., Any]],
        ahead: dict[str, Callable[..., Any]] | None = None,
        **backends: Callable[..., Any],
    ) -> None:
        self.name = name
        self.reference = reference
        kinds = schema.replace(NOISE, "Tensor? noise").split(", ")
        self.names = [kind.split()[-1] for kind in kinds]
        self.tensors = [i for i, kind in enumerate(kinds) if kind.startswith("Tensor")]
        self.gradients = Gradients(
            self.names,
            self.tensors,
            reference=reference,
            differentiable=differentiable,
            reads=backward_reads,
            reads_results=backward_reads_results,
            plain=plain_backward,
            kernels={backends[backend]: kernel for backend, kernel in backward.items()},
            ahead={backends[backend]: kernel for backend, kernel in (ahead or {}).items()},
        )
        self.backends = BackendTable(name, reference=reference, **backends)
        layout = memory_format if gradients_in_layout else lambda _: torch.contiguous_format
        self.operator = Operator(
            name, schema, returns, check=check, fake=fake, choose=self._choose, gradients=self.gradients, layout=layout
        )

    def _require_memory(self, arguments: Sequence[Any]) -> None:
        """Says of a call that failed which tensor could not be read, if that was it."""
        for i in self.tensors:
            x = arguments[i]
            if isinstance(x, Tensor) and x.layout is not torch.strided:
                raise TypeError(f"{self.names[i]} must be a dense tensor, got {x.layout}")
            if isinstance(x, Tensor) and x.is_cpu and x.numel() and holds_values(x) and not in_functorch():
                check_memory(x)

    def __call__(
        self, arguments: tuple[Any, ...], like: Tensor, dtype: torch.dtype, backend: str | None, into: dict[str, Any] | None = None
    ) -> Any:
        """Runs it.

        Args:
            arguments: checked.
            like: a tensor of the device.
            dtype: of the data, which with the device decides the backend.
            backend: forces one.
            into: tensors to write the results into, by the name that the kernels know them by, in the results' order.
        """
        dispatches, transforms = goes_through_dispatcher(), in_functorch()
        needs_grad, grad_enabled = False, torch.is_grad_enabled()
        addressed = not dispatches and not transforms
        for i in self.tensors:
            x = arguments[i]
            kind = type(x)
            if kind is Tensor or kind is torch.nn.Parameter:
                needs_grad = needs_grad or (grad_enabled and x.requires_grad)
                if addressed and x.is_neg():
                    arguments = (*arguments[:i], resolved(x), *arguments[i + 1 :])
            elif isinstance(x, Tensor):  # a subclass, whose data a kernel cannot read by itself
                dispatches = True
        if into:
            if needs_grad:
                raise RuntimeError(
                    f"{self.name} cannot write into a given tensor where a gradient is needed; call it under torch.no_grad()"
                )
            if dispatches or transforms or not like.numel() or self.backends.choose(like.device, dtype, backend) is self.reference:
                return self._copy_into(into, self(arguments, like, dtype, backend))
            results = self.backends.choose(like.device, dtype, backend)(*arguments, **into)
            was_written(*into.values())
            return results
        if transforms or in_forward_mode():  # no kernel has a rule for the tangent of a dual tensor
            return self.reference(*arguments)
        if dispatches and backend is None:
            return self.operator(arguments)
        implementation = self.backends.choose(like.device, dtype, backend)
        if not like.numel():  # no samples: there is nothing for a kernel to do
            implementation = self.reference
        try:
            if needs_grad and implementation is not self.reference:
                return Differentiable.apply(self.gradients, implementation, *arguments)
            return implementation(*arguments)
        except (RuntimeError, NotImplementedError):
            self._require_memory(arguments)
            raise

    @staticmethod
    def _copy_into(into: dict[str, Tensor], results: Any) -> Any:
        several = isinstance(results, (tuple, list))
        copied = [
            result if target is None else target.copy_(result)
            for target, result in zip(into.values(), results if several else [results], strict=True)
        ]
        return tuple(copied) if several else copied[0]

    def _choose(self, arguments: Sequence[Any]) -> Callable[..., Any]:
        """The implementation of an operator call. float64 anywhere in the data is the reference's."""
        data = [arguments[i] for i in self.gradients.differentiable if isinstance(arguments[i], Tensor)]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in data) else data[0].dtype
        return self.backends.choose(data[0].device, dtype) if all([x.numel() for x in data]) else self.reference
