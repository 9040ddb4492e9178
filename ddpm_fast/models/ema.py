"""Exponential moving average of a model's weights: shadow <- decay shadow + (1 - decay) weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ddpm_fast import checks


class EMA:
    """An exponential moving average of the parameters of `model`, kept beside it.

    Ho et al. (2020) evaluate such an average with decay 0.9999. Buffers and integer parameters are not averaged but
    copied, as a running statistic is an average already and integers have none.

    The shadow of a parameter of fewer than 32 bits is float32: a step of (1 - 0.9999) would round away in them.

    A model may be wrapped by DistributedDataParallel, DataParallel or torch.compile. Under ``fully_shard`` each process averages its own
    part of the model: make the EMA after sharding.

    Args:
        model: the model to follow, on the device where it will stay. Its present weights are the first shadow.
        decay: weight of the past, in [0, 1).
        warmup: use min(decay, (1 + n) / (10 + n)) for the update after n earlier ones, so that the average forgets
            the initial weights within the first steps.

    Raises:
        TypeError: if model is no module, or warmup is not True or False.
        ValueError: if decay is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        self.decay = checks.number("decay", decay, "be in [0, 1)")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.warmup = checks.flag("warmup", warmup)
        self.num_updates = 0
        parameters, buffers = _tensors(model)
        self._parameters = {name: p.clone().to(_shadow_dtype(p)) for name, p in parameters.items()}
        self._buffers = {name: b.clone() for name, b in buffers.items()}

    def current_decay(self) -> float:
        """The decay that the next `update` will use."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step of the average towards the weights of `model`; does not synchronise the device.

        Raises:
            TypeError: if `model` is no module.
            ValueError: if a parameter or buffer of `model` differs from the shadow in name, shape, device, kind of dtype
                or sharding. Nothing is changed then.
        """
        averaged, copied = self._matched(model)
        if averaged:
            # One multi-tensor call; `.to` copies only the parameters whose shadow has a wider dtype.
            shadows, targets = zip(*[(shadow, own.to(shadow.dtype)) for shadow, own in averaged], strict=True)
            torch._foreach_lerp_(shadows, targets, 1.0 - self.current_decay())
        _copy(copied)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` with their averages, and its buffers with the last copies.

        Raises:
            TypeError, ValueError: as `update`.
        """
        averaged, copied = self._matched(model)
        _copy([(own, shadow) for shadow, own in averaged + copied])

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Context in which `model` has the averaged weights. Its own weights come back at the end, also after an exception.

        The tensors of `model` keep their addresses (compiled graphs stay valid); a second copy of the weights is held
        meanwhile.

        Raises:
            TypeError, ValueError: as `update`, before anything is changed.
        """
        averaged, copied = self._matched(model)
        kept = [(own, own.clone()) for _, own in averaged + copied]
        try:
            with torch.no_grad():
                _copy([(own, shadow) for shadow, own in averaged + copied])
            yield model
        finally:
            _reshard(model)  # else it would go on with the averages that it has gathered
            with torch.no_grad():
                _copy(kept)

    def state_dict(self) -> dict[str, Any]:
        """{"num_updates": int, "parameters": {name: tensor}, "buffers": {name: tensor}}.

        The tensors are the EMA's own, as with `nn.Module.state_dict`: the next update changes them, so clone what you want to keep.
        """
        return {"num_updates": self.num_updates, "parameters": dict(self._parameters), "buffers": dict(self._buffers)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, exactly. Nothing is changed when it does not fit.

        Raises:
            TypeError: if the state is not a dictionary, or its parts are not.
            ValueError: if the number of updates is not a count, an entry is missing or unexpected, or a tensor differs in name, shape,
                dtype or sharding.
        """
        expected = {"num_updates", "parameters", "buffers"}
        if set(checks.instance("EMA state", state, dict)) != expected:
            raise ValueError(f"EMA state must have the entries {sorted(expected)}, got {list(state)}")
        num_updates = checks.integer("num_updates", state["num_updates"], 0)
        for kind, own in (("parameter", self._parameters), ("buffer", self._buffers)):
            loaded = checks.instance(kind + "s", state[kind + "s"], dict)
            _check(kind, own, loaded, "EMA state")
            for name, tensor in own.items():
                if loaded[name].dtype != tensor.dtype:
                    raise ValueError(f"{kind} {name} must have dtype {tensor.dtype}, got {loaded[name].dtype}")
        for own, loaded in ((self._parameters, state["parameters"]), (self._buffers, state["buffers"])):
            for name, tensor in own.items():
                tensor.copy_(loaded[name])
        self.num_updates = num_updates

    def _matched(self, model: nn.Module) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Each shadow with the tensor of `model` that it follows, those that are averaged and those that are copied, or ValueError."""
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for kind, own, theirs in zip(("parameter", "buffer"), (self._parameters, self._buffers), _tensors(model), strict=True):
            _check(kind, own, theirs, "model")
            for name, tensor in own.items():
                other = theirs[name]
                if other.device != tensor.device:
                    raise ValueError(f"{kind} {name} must be on {tensor.device}, where the EMA was created, got {other.device}")
                if _is_float(other) != _is_float(tensor):
                    raise ValueError(f"{kind} {name} must be of a kind with {tensor.dtype}, as when the EMA was created, got {other.dtype}")
                (averaged if kind == "parameter" and _is_float(tensor) else copied).append((_local(tensor), _local(other)))
        return averaged, copied


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and buffers of a model, out of its wrappers, detached."""
    _reshard(checks.instance("model", model, nn.Module))
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # of torch.compile
            model = cast(nn.Module, model._orig_mod)
        else:
            break
    return {name: p.detach() for name, p in model.named_parameters()}, {name: b.detach() for name, b in model.named_buffers()}


def _reshard(model: nn.Module) -> None:
    """Drop what a pass has gathered of a sharded model: its parameters are the shards then, and later passes gather anew."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in () if fsdp is None else model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _local(x: Tensor) -> Tensor:
    """This process's part of a DTensor: elementwise work needs no more."""
    return cast(Any, x).to_local() if _sharding(x) else x


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copies the second of each pair to the first."""
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, sources)


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _shadow_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float32 if parameter.is_floating_point() and parameter.element_size() < 4 else parameter.dtype


def _sharding(x: Any) -> tuple[Any, Any] | None:
    """Mesh and placements of a DTensor; None for a plain tensor."""
    return (x.device_mesh, x.placements) if type(x) is not Tensor and hasattr(x, "placements") else None


def _check(kind: str, own: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    """ValueError unless both dictionaries have the same names, shapes and shardings."""
    if own.keys() != theirs.keys():
        missing, extra = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
        raise ValueError(
            f"{what} does not match the EMA: missing {kind}s {missing[:5]}, unexpected {extra[:5]} ({len(missing)} and {len(extra)} in all)"
        )
    for name, tensor in own.items():
        if checks.tensor(name, theirs[name]).shape != tensor.shape:
            raise ValueError(f"{kind} {name} must have shape {tuple(tensor.shape)}, got {tuple(theirs[name].shape)}")
        if _sharding(theirs[name]) != _sharding(tensor):
            raise ValueError(
                f"{kind} {name} must be sharded as when the EMA was created, {_sharding(tensor)}, got {_sharding(theirs[name])}"
            )
