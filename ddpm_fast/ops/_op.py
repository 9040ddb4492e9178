"""Op: what every differentiable op has in common. An op's file gives its formula, kernels and checks; this gives the ways in.

A plain eager call goes straight to the kernel, inside a ``torch.autograd.Function`` where a gradient is needed. While
compiling or tracing, and for tensor subclasses, it goes through the operator that is registered with torch.library. In
torch.func the reference serves it, whose operations PyTorch can transform.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast._memory import check_memory, resolved, was_written
from ddpm_fast._pytorch import below_functorch, goes_through_dispatcher, holds_values, in_batches, in_forward_mode, in_functorch
from ddpm_fast.backends import BackendTable, library, native
from ddpm_fast.noise import Noise
from ddpm_fast.noise.philox import signed64, unsigned64

NOISE = "Tensor? noise, SymInt? seed, SymInt stream, SymInt first_sample"  # how an operator takes a Noise, a tensor or None


class Op:
    """One differentiable op.

    All implementations take the same positional ``arguments``. What is called for gradients gets them as a NamedTuple, ``needs`` as
    another, and answers {name of an argument: its gradient}: what is not there, or None, has none.

    Args:
        name: of the op.
        schema: the operator's arguments, with NOISE in place of a noise.
        returns: "Tensor" or "(Tensor, Tensor)"; an implementation may give None for the second.
        check: called with the arguments of an operator call; raises as the public function does.
        fake: shapes and dtypes of the results, as new tensors.
        reference: the formula in plain PyTorch, differentiable.
        differentiable: names of the arguments whose gradient the backward kernels give; of others the reference does.
        backward_reads: names of the tensors that backward reads; all by default.
        backward_reads_results: positions of the results that it reads too: its kernels are then called with a list of them as last
            argument. Of such an op the first result alone has a gradient.
        gradients_in_layout: gradients are strided as the tensors they belong to, channels_last too; else they are contiguous.
        plain_backward: backward in plain PyTorch, differentiable again, called as plain_backward(arguments, needs, grads). By
            default autograd's of the reference.
        backward: backend to its backward kernel, called as ``plain_backward`` is.
        ahead: backend (of the CPU) to a forward that also gives the gradients, for an upstream of ones: called as
            ahead(arguments, needs), it returns the result, the gradients, and the tensors that backward then multiplies by the
            upstream of each sample; or None for arguments that it does not serve. For float32: in 16 bits a gradient would be
            rounded twice, and lost where it is small before a loss is scaled.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        returns: str,
        *,
        check: Callable,
        fake: Callable,
        reference: Callable,
        differentiable: Sequence[str],
        backward_reads: Sequence[str] | None = None,
        backward_reads_results: Sequence[int] = (),
        gradients_in_layout: bool = False,
        plain_backward: Callable | None = None,
        backward: dict[str, Callable],
        ahead: dict[str, Callable] | None = None,
        **backends: Callable,
    ) -> None:
        self.name = name
        self.check = check
        self.fake = fake
        self.reference = reference
        kinds = schema.replace(NOISE, "Tensor? noise").split(", ")
        self.names = [kind.split()[-1] for kind in kinds]
        make_arguments: Any = namedtuple  # checkers know it with names that are written out alone
        self.Arguments = make_arguments("Arguments", self.names)
        self.differentiable = tuple(self.names.index(argument) for argument in differentiable)
        self.tensors = [i for i, kind in enumerate(kinds) if kind.startswith("Tensor")]
        self.others = [i for i in self.tensors if i not in self.differentiable]
        self.noise = self.names.index("noise") if NOISE in schema else None
        self.backward_reads = None if backward_reads is None else [self.names.index(argument) for argument in backward_reads]
        self.backward_reads_results = tuple(backward_reads_results)
        self.layout = memory_format if gradients_in_layout else lambda _: torch.contiguous_format
        self.plain_backward = plain_backward
        self.backward = {backends[backend]: kernel for backend, kernel in backward.items()}
        self.ahead = {backends[backend]: kernel for backend, kernel in (ahead or {}).items()}
        self.backends = BackendTable(name, reference=reference, **backends)
        self._register(schema, returns)

    def _require_memory(self, arguments: Sequence) -> None:
        """Says of a call that failed which tensor could not be read, if that was it."""
        for i in self.tensors:
            x = arguments[i]
            if isinstance(x, Tensor) and x.layout is not torch.strided:
                raise TypeError(f"{self.names[i]} must be a dense tensor, got {x.layout}")
            if isinstance(x, Tensor) and x.is_cpu and x.numel() and holds_values(x) and not in_functorch():
                check_memory(x)

    def __call__(
        self, arguments: tuple, like: Tensor, dtype: torch.dtype, backend: str | None, into: dict[str, Tensor] | None = None
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
            return self.operator(*self._flatten(arguments))
        implementation = self.backends.choose(like.device, dtype, backend)
        if not like.numel():  # no samples: there is nothing for a kernel to do
            implementation = self.reference
        try:
            if needs_grad and implementation is not self.reference:
                return _Differentiable.apply(self, implementation, *arguments)
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

    def gradients(
        self, implementation: Callable, arguments: Sequence, needs: Sequence[bool], grads: Sequence[Tensor | None], kept: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Backward: by the kernel that goes with an implementation, or where it cannot, by plain PyTorch with a graph of its own."""
        if grads[0] is None and all(grad is None for grad in grads):  # what followed gave none
            return [None] * len(needs)
        kernel = self.backward.get(implementation)
        if kernel and not torch.is_grad_enabled() and not in_batches(grads) and not any([needs[i] for i in self.others]):
            grads = [grad if grad is None else resolved(grad) for grad in grads]
            found = kernel(self.Arguments(*arguments), self.Arguments(*needs), grads, *([kept] if self.backward_reads_results else []))
            return self.in_order(found)
        if self.plain_backward is not None:
            return self.in_order(self.plain_backward(self.Arguments(*arguments), self.Arguments(*needs), grads))
        with torch.enable_grad():
            with below_functorch():  # as forward was, with its draw
                results = self.reference(*arguments)
            pairs = [
                (r, g)
                for r, g in zip(results if isinstance(results, tuple) else (results,), grads, strict=True)
                if g is not None and r is not None
            ]
            inputs = [x for x, needed in zip(arguments, needs, strict=True) if needed]
            found = iter(torch.autograd.grad([r for r, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, allow_unused=True))
        return [next(found) if needed else None for needed in needs]

    def in_order(self, gradients: dict[str, Tensor | None]) -> list[Tensor | None]:
        """One an argument."""
        return [gradients.get(name) for name in self.names]

    # The operator.

    def _flatten(self, arguments: Sequence) -> tuple:
        """As the operator takes them: it knows no Noise, and no unsigned integers."""
        i = self.noise
        return tuple(arguments) if i is None else (*arguments[:i], *noise_arguments(arguments[i]), *arguments[i + 1 :])

    def _restore(self, flat: Sequence) -> tuple:
        i = self.noise
        if i is None:
            return tuple(flat)
        tensor, seed, stream, first_sample = flat[i : i + 4]
        generated = None if seed is None else Noise(unsigned64(seed), stream, unsigned64(first_sample))
        return *flat[:i], generated if tensor is None else tensor, *flat[i + 4 :]

    def _choose(self, arguments: Sequence) -> Callable:
        # float64 anywhere in the data is the reference's.
        data = [arguments[i] for i in self.differentiable if isinstance(arguments[i], Tensor)]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in data) else data[0].dtype
        return self.backends.choose(data[0].device, dtype) if all([x.numel() for x in data]) else self.reference

    def _register(self, schema: str, returns: str) -> None:
        tags = (torch.Tag.pt2_compliant_tag,)
        library.define(f"{self.name}({schema}) -> {returns}", tags=tags)
        library.define(
            f"{self.name}_backward(Tensor?[] grads, {schema}, bool[] needs{', Tensor[] kept' if self.backward_reads_results else ''}) -> Tensor[]",
            tags=tags,
        )

        def forward(*flat):
            arguments = self._restore(flat)
            self.check(*arguments)  # a compiled graph has not seen the values of t yet
            results = self._choose(arguments)(*arguments)
            if isinstance(results, tuple):
                return tuple(flat[0].new_empty(0) if result is None else result for result in results)
            return results.contiguous()

        def split(flat):  # after the gradients of the results, what backward is called with: arguments, needs, results kept
            flat, kept = (flat[:-1], flat[-1]) if self.backward_reads_results else (flat, [])
            return self._restore(flat[:-1]), flat[-1], kept

        def backward(grads, *flat):
            arguments, needs, kept = split(flat)
            grads = [grad if grad is not None and grad.numel() else None for grad in grads]  # a result that was not wanted is empty
            arguments = [x.detach().requires_grad_() if needed else x for x, needed in zip(arguments, needs, strict=True)]
            with torch.no_grad():
                found = self.gradients(self._choose(arguments), arguments, needs, grads, kept)
            return [
                (torch.zeros_like(x) if grad is None else grad.detach()).contiguous(memory_format=self.layout(x))
                for x, grad, needed in zip(arguments, found, needs, strict=True)
                if needed
            ]

        def backward_fake(grads, *flat):
            arguments, needs, _ = split(flat)
            return [torch.empty_like(x, memory_format=self.layout(x)) for x, needed in zip(arguments, needs, strict=True) if needed]

        def setup_context(ctx, inputs, output):
            reads = None if self.backward_reads is None else self._flat_positions(self.backward_reads)
            keep_for_backward(ctx, inputs, reads, [output[i] for i in self.backward_reads_results])
            ctx.mark_non_differentiable(*[output[i] for i in self.backward_reads_results if i > 0])
            # The graph of a compiler knows the outputs that nobody asked a gradient of; None comes for them.
            ctx.set_materialize_grads(False)

        def differentiate(ctx, *grads):
            flat, kept = kept_for_backward(ctx)
            needs = ctx.needs_input_grad
            arguments, needs = self._restore(flat), [bool(needed) for needed in self._unflatten_needs(needs)]
            found: list[Tensor | None] = [None] * len(needs)
            if all(grad is None for grad in grads):
                pass
            elif self.plain_backward is not None:
                found = self.in_order(self.plain_backward(self.Arguments(*arguments), self.Arguments(*needs), grads))
            else:
                computed = iter(
                    getattr(torch.ops.ddpm_fast, f"{self.name}_backward")(
                        list(grads), *flat, needs, *([kept] if self.backward_reads_results else [])
                    )
                )
                found = [next(computed) if needed else None for needed in needs]
            i = self.noise
            return tuple(found) if i is None else (*found[:i], found[i], None, None, None, *found[i + 1 :])

        library.impl(self.name, forward, "CompositeExplicitAutograd")
        library.impl(f"{self.name}_backward", backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ddpm_fast::{self.name}", lambda *flat: self.fake(*self._restore(flat)), lib=library)
        torch.library.register_fake(f"ddpm_fast::{self.name}_backward", backward_fake, lib=library)
        torch.library.register_autograd(f"ddpm_fast::{self.name}", differentiate, setup_context=setup_context, lib=library)
        self.operator = getattr(torch.ops.ddpm_fast, self.name)

    def _flat_positions(self, positions: Sequence[int]) -> list[int]:
        return [p if self.noise is None or p <= self.noise else p + 3 for p in positions]

    def _unflatten_needs(self, needs: Sequence[bool]) -> tuple:
        i = self.noise
        return tuple(needs) if i is None else (*needs[: i + 1], *needs[i + 4 :])


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, implementation, *arguments):
        ctx.op, ctx.implementation, ctx.ahead, ctx.prepared = op, implementation, op.ahead.get(implementation), None
        ctx.set_materialize_grads(False)
        made = None if ctx.ahead is None else ctx.ahead(op.Arguments(*arguments), op.Arguments(*ctx.needs_input_grad[2:]))
        if made is None:
            ctx.ahead = None
            results = implementation(*arguments)
            kept = [results[i] for i in op.backward_reads_results]
            ctx.mark_non_differentiable(*[results[i] for i in op.backward_reads_results if i > 0])
            keep_for_backward(ctx, arguments, op.backward_reads, kept)
            return results
        keep_for_backward(ctx, arguments, op.backward_reads)
        result, *ctx.prepared = made
        return result

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[2:]
        if ctx.ahead is None or grads[0] is None or torch.is_grad_enabled() or in_batches(grads):
            arguments, kept = kept_for_backward(ctx)
            return None, None, *ctx.op.gradients(ctx.implementation, arguments, needs, grads, kept)
        # They are given away: a second backward prepares them anew, in the same way for the same bits.
        op = ctx.op
        gradients, parts = ctx.prepared or ctx.ahead(op.Arguments(*kept_for_backward(ctx)[0]), op.Arguments(*needs))[1:]
        ctx.prepared, upstream = None, resolved(grads[0]).contiguous()
        for part in parts:
            native.cpu_scale(sizes=part, x_start=part, signal=upstream, out=part)
        return None, None, *op.in_order(gradients)


def keep_for_backward(ctx: Any, arguments: Sequence, reads: Sequence[int] | None, results: Sequence[Tensor] = ()) -> None:
    """Saves the tensors among the arguments (those at ``reads``, or all) and results where autograd watches over them, the rest beside."""
    tensors = [x if isinstance(x, Tensor) else None for x in arguments]
    ctx.others = [x if tensor is None else None for x, tensor in zip(arguments, tensors, strict=True)]
    ctx.save_for_backward(*(tensors if reads is None else [x if i in reads else None for i, x in enumerate(tensors)]), *results)


def kept_for_backward(ctx: Any) -> tuple[list, list[Tensor]]:
    """Arguments and results as `keep_for_backward` got them; None for a tensor that was not saved."""
    saved, count = ctx.saved_tensors, len(ctx.others)
    return [other if x is None else x for x, other in zip(saved[:count], ctx.others, strict=True)], list(saved[count:])


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where x is dense in it, else contiguous; contiguous where it is both."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x; under torch.func, which has no layouts to ask for, as it is."""
    return y if in_functorch() else y.contiguous(memory_format=memory_format(x))


def noise_arguments(noise: Noise | Tensor | None) -> tuple[Tensor | None, int | None, int, int]:
    """A noise as an operator's arguments: tensor or None, then seed (None without a Noise), stream and first_sample in int64's range."""
    if isinstance(noise, Noise):
        return None, signed64(noise.seed), noise.stream, signed64(noise.first_sample)
    return noise, None, 0, 0
