"""The variational bound of a model on a data set, in bits per dimension, in full or as an unbiased estimate."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion, Model
from ddpm_fast.noise import FOLD_EVAL_NOISE, FOLD_EVAL_TIMESTEPS, Noise
from ddpm_fast.ops._common import check_unit_range


@dataclass(frozen=True)
class Bound:
    """The bound of N images, split as in Ho et al. 2020, eq. 5. Everything in bits per dimension, float64 on CPU.

    Attributes:
        prior: (N,) L_T.
        terms: (N, K) L_t of each image at one t of each of K intervals; column 0 is t = 0, the decoder.
        first, counts: (K,) int64, the intervals: first t, and how many t. All counts are 1 in a full evaluation.
    """

    prior: Tensor
    terms: Tensor
    first: Tensor
    counts: Tensor

    @property
    def per_image(self) -> Tensor:
        """(N,) the bound of each image, or its unbiased estimate: an interval's draw stands for all its t."""
        return self.prior + self.terms @ self.counts.double()

    @property
    def total(self) -> float:
        return float(self.per_image.mean())

    @property
    def standard_error(self) -> float:
        """Of ``total``, over the images and, in an estimate, the draws of t, which are independent between images."""
        return float(self.per_image.std() / math.sqrt(len(self.prior))) if len(self.prior) > 1 else math.nan

    @property
    def decoder(self) -> float:
        """L_0."""
        return float(self.terms[:, 0].mean())

    @property
    def divergence(self) -> float:
        """Σ L_t over t > 0."""
        return float((self.terms[:, 1:] @ self.counts[1:].double()).mean())

    def summary(self) -> dict[str, float]:
        """Its parts by name, JSON-able."""
        return dict(
            bits_per_dim=self.total,
            standard_error=self.standard_error,
            decoder=self.decoder,
            divergence=self.divergence,
            prior=float(self.prior.mean()),
        )

    @property
    def centers(self) -> Tensor:
        """(K,) middle of each interval, for plots."""
        return self.first + (self.counts - 1) / 2


def intervals(T: int, count: int | None) -> tuple[Tensor, Tensor]:
    """Splits 0..T-1 into at most ``count`` intervals: t = 0 alone, the others ever longer, as L_t falls with t.

    Returns:
        (first t, number of t) of each, int64.
    """
    if count is None or count >= T:
        return torch.arange(T), torch.ones(T, dtype=torch.int64)
    if count < 2:
        raise ValueError(f"terms per image must be at least 2, the decoder's and one more, got {count}")
    # Geometric edges, but each at least one t long: the first come out as single steps.
    edges = [1]
    for k in range(1, count):
        left = count - k
        edges.append(max(edges[-1] + 1, round(edges[-1] * (T / edges[-1]) ** (1 / left))))
    edges[-1] = T
    first = torch.tensor([0, *edges[:-1]])
    return first, torch.tensor([1, *torch.tensor(edges).diff().tolist()])


@torch.no_grad()
def evaluate_bound(
    model: Model,
    diffusion: GaussianDiffusion,
    x_start: Tensor | Callable[[slice], Tensor],
    count: int | None = None,
    *,
    terms_per_image: int | None = None,
    batch: int = 256,
    seed: int = 0,
    clip: bool = True,
    report: Callable[[int, int], object] = lambda done, of: None,
) -> Bound:
    """The bound on every image, term by term.

    Image i draws its noise and its t from (seed, i) alone, so the batch size changes the result by rounding only.

    Args:
        model: any callable (x_t, t) -> output, in eval mode.
        x_start: (N, C, ...) data in [-1, 1], or a function that gives the images of a slice, with ``count`` = N.
        terms_per_image: None for all T terms; else one random t in each of so many intervals of t (t = 0 always), which
            costs that many passes of the model an image and is unbiased.
        batch: images in a pass.
        report: called as report(done, of), in passes of a batch.

    Returns:
        :class:`Bound`.

    Raises:
        ValueError: for no images, images that are not finite or not in [-1, 1], a batch below 1, fewer than 2 terms, or a
            model whose output is not finite.
    """
    if isinstance(x_start, Tensor):
        images, count = x_start, len(x_start)
        fetch = lambda part: images[part]  # noqa: E731
    else:
        fetch = x_start
    if not count:
        raise ValueError("the bound needs at least one image, got none")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    first, counts = intervals(len(diffusion), terms_per_image)
    noise_key, t_key = Noise(seed).fold_in(FOLD_EVAL_NOISE), Noise(seed).fold_in(FOLD_EVAL_TIMESTEPS)
    prior, terms = torch.empty(count, dtype=torch.float64), torch.empty(count, len(first), dtype=torch.float64)
    starts = range(0, count, batch)
    for index, start in enumerate(starts):
        part = slice(start, min(start + batch, count))
        x = fetch(part)
        check_unit_range("x_start", x)
        columns, x_t = [], torch.empty_like(x, memory_format=torch.contiguous_format)
        prior[part] = diffusion.prior_bpd(x).double().cpu()
        for k, (low, size) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
            t = low + t_key.at(stream=k, first_sample=start).integers(len(x), size, x.device)
            diffusion.q_sample(x, t, noise_key.at(stream=k, first_sample=start), out=x_t)
            columns.append(diffusion.vlb_terms(model(x_t, t), x, x_t, t, clip))
            report(index * len(first) + k + 1, len(starts) * len(first))
        terms[part] = torch.stack(columns, 1).double().cpu()  # the one wait for the device in a batch
    if not terms.isfinite().all():
        bad = first[int((~terms.isfinite()).any(0).nonzero()[0])]
        raise ValueError(f"the bound is not finite at t = {int(bad)}: the model's output is NaN or infinite there")
    return Bound(prior, terms, first, counts)
