"""A reverse step as a CUDA graph: the host then makes two launches for a step, whatever the network's size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from ddpm_fast._memory import overlap
from ddpm_fast.noise import Noise
from ddpm_fast.ops._randn import randn
from ddpm_fast.sampling.step import ReverseStep

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]
_WARM_UP = 3  # runs before the capture, in which kernels are compiled and chosen and libraries set up


def cuda_capture(body: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Runs ``body`` a few times, records it in a CUDA graph, and gives what replays it.

    Args:
        body: what to record; everything in it runs on ``device``.
        device: the GPU, which need not be the current one.

    Raises:
        RuntimeError: where something in it waits for the device or cannot be recorded for another reason.
    """
    with torch.cuda.device(device):
        return _recorded(body, device)


def _recorded(body: Callable[[], None], device: torch.device) -> Callable[[], None]:
    aside, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    aside.wait_stream(current)
    with torch.cuda.stream(aside):  # a capture must not find allocations that are pending on its own stream
        for _ in range(_WARM_UP):
            body()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=aside):
            body()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"a step of this model cannot be captured in a CUDA graph ({error}); sample with graph=False") from error
    return graph.replay


@contextlib.contextmanager
def _autocast_without_cache() -> Iterator[None]:
    """Switches autocast's cache off within the block.

    Autocast keeps its casts of the weights until it ends. A graph that is recorded meanwhile would go on reading those casts after
    their memory is given back.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class StepGraph:
    """A :class:`ReverseStep` of one batch shape, recorded once: model, guidance, thresholding and p_step.

    A graph reads and writes fixed memory. What differs between steps is written there before a replay: the time, the row and the
    noise, which is materialised because a captured kernel cannot be told another stream.

    Args:
        step: what to record. Its labels are changed in place by :meth:`set_labels`.
        like: (N, C, ...), a state of the batch.
        capture: records a function without arguments, for a device.
    """

    def __init__(self, step: ReverseStep, like: Tensor, capture: Capture) -> None:
        self.step, self.timesteps, self.chain_times, self.multistep = step, step.timesteps, step.chain_times, step.multistep
        self.x = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self.x_start, self.z = torch.zeros_like(self.x), torch.zeros_like(self.x) if step.table.draws else None
        self.t, self.row = step.model_t[0].clone(), step.row_index[0].clone()
        with _autocast_without_cache():
            self._replay = capture(self._body, like.device)

    def _body(self) -> None:
        # A table's first step multiplies its history by zero: any finite memory will do.
        history = self.x_start if self.multistep else None
        model_output = self.step.predict(self.x, self.t)
        if overlap(self.x, model_output):
            model_output = model_output.clone()  # the model returned its input, which p_step writes over
        self.step.apply(self.x, model_output, self.row, self.z, history, self.x, self.x_start)

    def set_labels(self, labels: Tensor | None) -> StepGraph:
        """Changes the labels, for the next batch; whether there are any, and how many, is fixed."""
        if labels is not None:
            cast(Tensor, self.step.labels)[: len(labels)].copy_(labels)
        return self

    def __call__(
        self, row: int, x_t: Tensor, noise: Noise, x_start_previous: Tensor | None = None, *, keep: bool = True, with_x_start: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The step, as :class:`ReverseStep` has it; without ``keep`` it gives its own memory, which the next step writes over."""
        if x_t is not self.x:
            self.x.copy_(x_t)
        if x_start_previous is None:
            self.x_start.zero_()  # what another batch has left may not be finite
        elif x_start_previous is not self.x_start:
            self.x_start.copy_(x_start_previous)
        self.t.copy_(self.step.model_t[row])
        self.row.copy_(self.step.row_index[row])
        if self.z is not None:
            randn(self.z.shape, noise, device=self.z.device, dtype=self.z.dtype, out=self.z)
        self._replay()
        return (self.x.clone(), self.x_start.clone()) if keep else (self.x, self.x_start)
