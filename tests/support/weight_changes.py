"""The ways in which a module's weights change: some count up a tensor's version, some put another tensor there, some leave no trace."""

import copy
import ctypes

import torch

from ddpm_fast import EMA


def _other(module, seed=11):
    """Parameters of the same shapes and layouts."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return other


def _adam(**options):
    def change(module):
        parameters = list(module.parameters())
        for parameter, other in zip(parameters, _other(module).parameters(), strict=True):
            parameter.grad = (other - parameter).detach()
        torch.optim.Adam(parameters, lr=0.02, **options).step()
        module.zero_grad()

    return change


def _each(change):
    def change_all(module):
        for parameter, other in zip(module.parameters(), _other(module).parameters(), strict=True):
            change(parameter, other.detach())

    return change_all


def _one_element(parameter, other):
    with torch.no_grad():
        parameter[(-1,) * parameter.ndim] += 0.5


def _copy(parameter, other):
    with torch.no_grad():
        parameter.copy_(other)


def _inference(parameter, other):
    with torch.inference_mode():
        parameter.mul_(1.25)


def _data(parameter, other):
    parameter.data.mul_(1.25)


def _new_data(parameter, other):
    parameter.data = other


def _numpy(parameter, other):
    parameter.detach().numpy()[...] *= 1.25


def _address(parameter, other):
    ctypes.memmove(parameter.data_ptr(), other.data_ptr(), 4 * parameter.numel())  # as an optimiser in C writes


def _new_parameters(module):
    others = _other(module)
    for target, source in zip(module.modules(), others.modules(), strict=True):
        for name, parameter in source.named_parameters(recurse=False):
            setattr(target, name, parameter)


def _average(module):
    EMA(_other(module)).copy_to(module)


def _swapped(module):
    for parameter, other in zip(module.parameters(), _other(module).parameters(), strict=True):
        torch.utils.swap_tensors(parameter, other)


def _other_layout(module):
    _each(_copy)(module.to(memory_format=torch.contiguous_format))


CHANGES = {
    "Adam": _adam(foreach=False),
    "Adam, foreach": _adam(foreach=True),
    "Adam, fused": _adam(fused=True),
    "load_state_dict": lambda module: module.load_state_dict(_other(module).state_dict()),
    "load_state_dict, assigned": lambda module: module.load_state_dict(_other(module).state_dict(), assign=True),
    "copy_": _each(_copy),
    "one element": _each(_one_element),
    "inference_mode": _each(_inference),
    "data": _each(_data),
    "new data": _each(_new_data),
    "numpy": _each(_numpy),
    "address": _each(_address),
    "new parameters": _new_parameters,
    "swap_tensors": _swapped,
    "EMA": _average,
    "other layout": _other_layout,
}
