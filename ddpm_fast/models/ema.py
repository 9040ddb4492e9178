"""Exponential moving average of a model's weights: shadow <- decay shadow + (1 - decay) weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """An exponential moving average of the parameters of `model`, kept beside it.

    Ho et al. (2020) evaluate such an average with decay 0.9999. Buffers are not averaged but copied, as a running
    statistic is an average already and an integer buffer has none.

    The shadow of a float16 or bfloat16 parameter is float32: a step of (1 - 0.9999) would round away in fewer bits.

    Args:
        model: the model to follow, on the device where it will stay. Its present weights are the first shadow.
        decay: weight of the past, in [0, 1).
        warmup: use min(decay, (1 + n) / (10 + n)) for the update after n earlier ones, so that the average forgets
            the initial weights within the first steps.

    Raises:
        ValueError: if decay is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = float(decay)
        self.warmup = bool(warmup)
        self.num_updates = 0
        self._parameters = {name: p.detach().clone().to(_shadow_dtype(p)) for name, p in model.named_parameters()}
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}

    def current_decay(self) -> float:
        """The decay that the next `update` will use."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step of the average towards the weights of `model`; does not synchronise the device.

        Raises:
            ValueError: if a parameter or buffer of `model` differs from the shadow in name, shape or device.
        """
        parameters, buffers = self._matched(model)
        shadow = list(self._parameters.values())
        if shadow:
            # One multi-tensor call; `.to` copies only the parameters whose shadow has a wider dtype.
            targets = [p.to(s.dtype) for p, s in zip(parameters, shadow, strict=True)]
            torch._foreach_lerp_(shadow, targets, 1.0 - self.current_decay())
        if buffers:
            torch._foreach_copy_(list(self._buffers.values()), buffers)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` with their averages, and its buffers with the last copies.

        Raises:
            ValueError: as `update`.
        """
        parameters, buffers = self._matched(model)
        if parameters:
            torch._foreach_copy_(parameters, list(self._parameters.values()))
        if buffers:
            torch._foreach_copy_(buffers, list(self._buffers.values()))

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Context in which `model` has the averaged weights; its own come back at the end, exceptions included.

        The tensors of `model` keep their addresses (compiled graphs stay valid); a second copy of the weights is held
        meanwhile.

        Raises:
            ValueError: as `update`, before anything is changed.
        """
        parameters, buffers = self._matched(model)
        tensors = parameters + buffers
        own = [x.clone() for x in tensors]
        try:
            self.copy_to(model)
            yield model
        finally:
            if tensors:
                with torch.no_grad():
                    torch._foreach_copy_(tensors, own)

    def state_dict(self) -> dict:
        """{"num_updates": int, "parameters": {name: tensor}, "buffers": {name: tensor}}.

        The tensors are the live ones, as with `nn.Module.state_dict`: clone them to keep a moment.
        """
        return {"num_updates": self.num_updates, "parameters": dict(self._parameters), "buffers": dict(self._buffers)}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave, exactly. Nothing is changed when it does not fit.

        Raises:
            ValueError: if an entry is missing or one too many, or a tensor differs in name, shape or dtype.
        """
        expected = {"num_updates", "parameters", "buffers"}
        if set(state) != expected:
            raise ValueError(f"EMA state must have the entries {sorted(expected)}, got {sorted(state)}")
        for kind, own in (("parameter", self._parameters), ("buffer", self._buffers)):
            loaded = state[kind + "s"]
            _check_names(kind, own, loaded, "EMA state")
            for name, tensor in own.items():
                if loaded[name].dtype != tensor.dtype:
                    raise ValueError(f"{kind} {name} must have dtype {tensor.dtype}, got {loaded[name].dtype}")
        for own, loaded in ((self._parameters, state["parameters"]), (self._buffers, state["buffers"])):
            for name, tensor in own.items():
                tensor.copy_(loaded[name])
        self.num_updates = int(state["num_updates"])

    def _matched(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters and buffers of `model` in the order of the shadow, or ValueError."""
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = dict(model.named_buffers())
        for kind, own, theirs in (("parameter", self._parameters, parameters), ("buffer", self._buffers, buffers)):
            _check_names(kind, own, theirs, "model")
            for name, tensor in own.items():
                if theirs[name].device != tensor.device:
                    raise ValueError(f"{kind} {name} must be on {tensor.device}, where the EMA was created, "
                                     f"got {theirs[name].device}")
        return [parameters[name] for name in self._parameters], [buffers[name] for name in self._buffers]


def _shadow_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.dtype


def _check_names(kind: str, own: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    """ValueError unless both dictionaries have the same names and shapes."""
    if own.keys() != theirs.keys():
        missing, extra = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
        raise ValueError(f"{what} does not match the EMA: missing {kind}s {missing[:5]}, unexpected {extra[:5]} "
                         f"({len(missing)} and {len(extra)} in all)")
    for name, tensor in own.items():
        if theirs[name].shape != tensor.shape:
            raise ValueError(f"{kind} {name} must have shape {tuple(tensor.shape)}, got {tuple(theirs[name].shape)}")
