"""group_norm's CUDA kernels as the launchers would start them, in the PTX simulator, and the truth that they are held against."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from ptxsim import Device
from torch import Tensor

from ddpm_fast import Noise
from ddpm_fast.backends import native
from ddpm_fast.noise.philox import MASK32, philox4x32_10

TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KEY = Noise(seed=2**63 + 5, stream=2**31 + 1, first_sample=2**32 - 1)  # the second sample's index needs more than 32 bits
SMS = 108
OPTIONAL = ("weight", "bias", "pre_bias", "scale", "shift")
ROWS = ("pre_bias", "scale", "shift")


@functools.cache
def layout(op: str) -> np.dtype:
    """The struct of a kernel's arguments, as the compiler laid it out: a number for each path, such as "dropout.key.seed"."""
    size, numbers = native.layout(op)
    names, offsets, formats = zip(*numbers, strict=True)
    return np.dtype(dict(names=names, offsets=offsets, formats=formats, itemsize=size))


@dataclass(frozen=True)
class Case:
    """One call. Tensors are kept as (N, C, pixels) whatever the layout; the simulated memory has the layout's order."""

    samples: int
    channels: int
    pixels: int
    groups: int
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    small: torch.dtype | None = None  # of weight, bias and of the rows; None: like x
    given: tuple[str, ...] = OPTIONAL
    silu: bool = True
    dropout: float = 0.0
    eps: float = 1e-5
    sms: int = SMS
    aligned: bool = True

    def __str__(self) -> str:
        layout = "NHWC" if self.channels_last else "NCHW"
        return f"{self.samples}x{self.channels}x{self.pixels} {self.groups} groups {layout} {str(self.dtype)[6:]}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.samples, self.channels, self.pixels

    def but(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    def plan(self, native, backward: bool = False) -> dict:
        make = native.cuda_group_norm_backward_plan if backward else native.cuda_group_norm_plan
        return make(*self.shape, self.groups, self.channels_last, TAGS[self.dtype], sms=self.sms, aligned=self.aligned)

    def make(self, mean: float = 0.3, std: float = 1.5) -> dict[str, Tensor]:
        """x, grad_y and what of weight, bias, pre_bias, scale and shift is given, in their dtypes."""
        generator = torch.Generator().manual_seed(hash((self.shape, self.groups)) % 2**32)
        small = self.small or self.dtype

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        tensors = {"x": (mean + std * normal(*self.shape)).to(self.dtype), "grad_y": normal(*self.shape).to(self.dtype)}
        for name in self.given:
            shape = (self.samples, self.channels) if name in ROWS else (self.channels,)
            tensors[name] = ((1.0 if name == "weight" else 0.0) + 0.5 * normal(*shape)).to(small)
        return tensors

    def keep(self) -> Tensor:
        """The mask by Philox's words: channels run fastest within a sample, whatever the layout."""
        n, c, p = self.shape
        sample = (torch.arange(n) + KEY.first_sample)[:, None]
        block = torch.arange(-(-c * p // 4))[None, :].expand(n, -1)
        words = torch.stack(philox4x32_10(block, KEY.stream, sample & MASK32, sample >> 32, KEY.seed & MASK32, KEY.seed >> 32), -1)
        return (words.flatten(1)[:, : c * p] >= int(self.dropout * 2**32)).reshape(n, p, c).transpose(1, 2)

    def formula(self, x: Tensor, *, weight=None, bias=None, pre_bias=None, scale=None, shift=None) -> Tensor:
        """The op in plain PyTorch, in the dtype of x."""
        if pre_bias is not None:
            x = x + pre_bias[..., None]
        y = F.group_norm(x, self.groups, eps=self.eps)
        if weight is not None:
            y = y * weight[:, None]
        if bias is not None:
            y = y + bias[:, None]
        if scale is not None:
            y = y * (1 + scale[..., None])
        if shift is not None:
            y = y + shift[..., None]
        if self.silu:
            y = y * torch.sigmoid(y)
        if self.dropout:
            y = torch.where(self.keep(), y / (1 - self.dropout), 0.0)
        return y

    def expected(self, tensors: dict[str, Tensor], arithmetic: torch.dtype, *, gradients: bool = False) -> dict[str, Tensor]:
        """y, or with ``gradients`` those of all inputs: from float64 the truth, from float32 a baseline rounded to the data's dtypes."""
        inputs = {name: x.to(arithmetic).requires_grad_(gradients) for name, x in tensors.items() if name != "grad_y"}
        y = self.formula(**inputs)
        results = {"y": y.detach()}
        if gradients:
            grads = torch.autograd.grad(y, list(inputs.values()), tensors["grad_y"].to(arithmetic))
            results = {f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
        if arithmetic == torch.float64:
            return results
        return {name: x.to(tensors[name.removeprefix("grad_")].dtype if gradients else self.dtype) for name, x in results.items()}

    def statistics(self, tensors: dict[str, Tensor], arithmetic: torch.dtype) -> tuple[Tensor, Tensor]:
        """mean and rstd, (samples, groups)."""
        x = tensors["x"].to(arithmetic)
        if "pre_bias" in tensors:
            x = x + tensors["pre_bias"].to(arithmetic)[..., None]
        x = x.reshape(self.samples, self.groups, -1)
        return x.mean(-1), (x.var(-1, correction=0) + self.eps).rsqrt()


class Memory:
    """The simulated device's tensors of one call."""

    def __init__(self, case: Case) -> None:
        self.case, self.device, self.arrays = case, Device(), {}
        self.record = np.zeros((), layout("group_norm"))
        for name in ("channels_last", "silu", "eps", "samples", "channels", "pixels", "groups"):
            self.record[name] = getattr(case, name)
        for name in ("seed", "stream", "first_sample"):
            self.record[f"dropout.key.{name}"] = getattr(KEY, name)
        self.record["dropout.threshold"], self.record["dropout.scale"] = int(case.dropout * 2**32), 1 / (1 - case.dropout)

    def _view(self, name: str, array, dtype: torch.dtype, stride: int | None) -> None:
        self.arrays[name] = (array, dtype)
        view = name if stride is None else f"{name}.view"
        self.record[f"{view}.data"], self.record[f"{view}.dtype"] = array.address, TAGS[dtype]
        if stride is not None:
            self.record[f"{name}.stride"] = stride

    def put(self, name: str, x: Tensor, spare: int = 0) -> None:
        """A tensor; rows get ``spare`` elements between them, as the halves of a wider tensor have."""
        x = self._stored(x)
        bits = x.view(torch.int16).numpy().view(np.uint16) if x.element_size() == 2 else x.numpy()
        stride = None
        if name in ROWS:
            stride = x.shape[1] + spare
            padded = np.zeros((x.shape[0], stride), bits.dtype)
            padded[:, : x.shape[1]] = bits
            bits = padded
        self._view(name, self.device.array(bits), x.dtype, stride)

    def want(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Room for a result."""
        if len(shape) == 3 and self.case.channels_last:
            shape = (shape[0], shape[2], shape[1])
        array = self.device.empty(shape, np.float32 if dtype == torch.float32 else np.uint16, label=name)
        self._view(name, array, dtype, shape[1] if name.removeprefix("grad_") in ROWS else None)

    def floats(self, name: str, shape: tuple[int, ...], values: Tensor | None = None) -> None:
        array = self.device.empty(shape, np.float32, label=name) if values is None else self.device.array(values.float().numpy())
        self.arrays[name] = (array, torch.float32)
        self.record[name] = array.address

    def get(self, name: str) -> Tensor:
        array, dtype = self.arrays[name]
        values = torch.from_numpy(array.numpy() if dtype == torch.float32 else array.numpy().view(np.int16)).view(dtype)
        return values.transpose(1, 2).contiguous() if values.ndim == 3 and self.case.channels_last else values

    def _stored(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous() if x.ndim == 3 and self.case.channels_last else x.contiguous()


def forward(module, plan: dict, case: Case, tensors: dict[str, Tensor], **options):
    """({y, mean, rstd}, reports of the launches)."""
    memory = Memory(case)
    for name, x in tensors.items():
        if name != "grad_y":
            memory.put(name, x, spare=case.channels)
    memory.want("y", case.shape, case.dtype)
    memory.floats("mean", (case.samples, case.groups))
    memory.floats("rstd", (case.samples, case.groups))
    memory.floats("workspace", (max(plan["workspace"], 1),))
    reports = [_launch(module, launch, memory, options) for launch in plan["launches"]]
    return {name: memory.get(name) for name in ("y", "mean", "rstd")}, reports


def backward(module, plan: dict, case: Case, tensors: dict[str, Tensor], wanted: tuple[str, ...] | None = None, **options):
    """({grad_x, ...} for all inputs or those ``wanted``, reports of the launches). mean and rstd are the rounded truth."""
    memory = Memory(case)
    for name, x in tensors.items():
        memory.put(name, x, spare=case.channels)
    wanted = tuple(name for name in tensors if name != "grad_y") if wanted is None else wanted
    for name in wanted:
        memory.want(f"grad_{name}", tuple(tensors[name].shape), tensors[name].dtype)
    for name, values in zip(("mean", "rstd"), case.statistics(tensors, torch.float64), strict=True):
        memory.floats(name, (case.samples, case.groups), values)
    memory.floats("workspace", (plan["workspace"],))
    launches = [launch for launch in plan["launches"] if "parameters" not in launch["kernel"] or {"weight", "bias"} & set(wanted)]
    reports = [_launch(module, launch, memory, options) for launch in launches]
    return {f"grad_{name}": memory.get(f"grad_{name}") for name in wanted}, reports


def _launch(module, launch: dict, memory: Memory, options: dict):
    arguments = [memory.record.tobytes()] + ([launch["tile"]] if launch["tile"] else [])
    return module.launch(launch["kernel"], launch["grid"], launch["block"], arguments, launch["shared"], device=memory.device, **options)


def _call(case: Case, tensors: dict[str, Tensor]) -> dict:
    """What both bindings are told but for the results."""
    given = {name: tensors[name] for name in ("x", *OPTIONAL) if name in tensors}
    samples, channels, pixels = case.shape
    return dict(
        channels_last=case.channels_last, samples=samples, channels=channels, pixels=pixels, groups=case.groups, eps=case.eps,
        silu=case.silu, dropout=(case.dropout, KEY), **given,
    )  # fmt: skip


def _to_device(case: Case, tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Data as (N, C, pixels, 1), the binding's channels_last."""
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return {
        name: x[..., None].to(device).contiguous(memory_format=layout) if x.ndim == 3 else x.contiguous().to(device)
        for name, x in tensors.items()
    }


def _from_device(x: Tensor) -> Tensor:
    return (x[..., 0] if x.ndim == 4 else x).contiguous().cpu()


def _plan_on(native, case: Case, device: str, backward: bool) -> dict:
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device == "cuda" else SMS
    return case.but(sms=sms).plan(native, backward)


def forward_on_device(native, case: Case, tensors: dict[str, Tensor], device: str = "cuda") -> dict[str, Tensor]:
    """As :func:`forward`, by the binding."""
    tensors = _to_device(case, tensors, device)
    y, stream = torch.full_like(tensors["x"], torch.nan), torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    mean, rstd = (torch.full((case.samples, case.groups), torch.nan, device=device) for _ in range(2))
    workspace = torch.full((_plan_on(native, case, device, False)["workspace"],), torch.nan, device=device)
    native.cuda_group_norm(**_call(case, tensors), y=y, mean=mean, rstd=rstd, workspace=workspace, device=0, stream=stream)
    return {name: _from_device(x) for name, x in {"y": y, "mean": mean, "rstd": rstd}.items()}


def backward_on_device(native, case: Case, tensors: dict[str, Tensor], device: str = "cuda") -> dict[str, Tensor]:
    """As :func:`backward`, by the binding."""
    tensors = _to_device(case, tensors, device)
    grads = {name: torch.full_like(x, torch.nan) for name, x in tensors.items() if name != "grad_y"}
    mean, rstd = (x.float().to(device) for x in case.statistics({name: _from_device(x) for name, x in tensors.items()}, torch.float64))
    workspace = torch.full((_plan_on(native, case, device, True)["workspace"],), torch.nan, device=device)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    native.cuda_group_norm_backward(
        **_call(case, tensors), mean=mean, rstd=rstd, grad_y=tensors["grad_y"], **{f"grad_{name}": grad for name, grad in grads.items()},
        workspace=workspace, device=0, stream=stream,
    )  # fmt: skip
    return {f"grad_{name}": _from_device(x) for name, x in grads.items()}
