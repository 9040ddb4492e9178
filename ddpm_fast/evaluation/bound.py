"""The variational bound of a model on a data set, in bits per dimension, in full or as an unbiased estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ddpm_fast import checks
from ddpm_fast.diffusion import BoundTerms
from ddpm_fast.diffusion.gaussian import GaussianDiffusion, Model
from ddpm_fast.io.parts import Parts, pieces
from ddpm_fast.io.ranks import Ranks
from ddpm_fast.noise import FOLD_EVAL_NOISE, FOLD_EVAL_TIMESTEPS, Noise
from ddpm_fast.ops._common import check_data


@dataclass(frozen=True)
class Bound(BoundTerms):
    """The terms of the bound of N images, each at one t of each of K intervals, with their sums and errors; float64 on CPU.

    Attributes:
        prior, terms, mse: as :class:`~ddpm_fast.BoundTerms`; column 0 is t = 0, the decoder.
        first, counts: (K,) int64, the intervals: first t, and how many t. All counts are 1 in a full evaluation.
    """

    first: Tensor
    counts: Tensor

    @property
    def per_image(self) -> Tensor:
        """(N,) the bound of each image, or its unbiased estimate: the term drawn in an interval counts for all t of the interval."""
        return self.prior + self.terms @ self.counts.double()

    @property
    def divergence_per_image(self) -> Tensor:
        """(N,) Σ L_t over t > 0."""
        return self.terms[:, 1:] @ self.counts[1:].double()

    @property
    def total(self) -> float:
        """Mean of the bound over the images, bits per dimension."""
        return float(self.per_image.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of ``total``, bits per dimension; NaN for one image.

        It counts the differences between images and, in an estimate, the random t, which are drawn independently for each image.
        """
        return float(standard_error(self.per_image))

    @property
    def decoder(self) -> float:
        """Mean of L_0 over the images, bits per dimension."""
        return float(self.terms[:, 0].mean())

    @property
    def divergence(self) -> float:
        """Mean over the images of Σ L_t over t > 0, bits per dimension."""
        return float(self.divergence_per_image.mean())

    def summary(self) -> dict[str, float]:
        """Means of the bound and of its parts over the images, each with its standard error, by name; JSON values, bits per dimension."""
        return dict(
            bits_per_dim=self.total,
            standard_error=self.standard_error,
            decoder=self.decoder,
            decoder_standard_error=float(standard_error(self.terms[:, 0])),
            divergence=self.divergence,
            divergence_standard_error=float(standard_error(self.divergence_per_image)),
            prior=float(self.prior.mean()),
            prior_standard_error=float(standard_error(self.prior)),
        )

    @property
    def centers(self) -> Tensor:
        """(K,) middle of each interval, for plots."""
        return self.first + (self.counts - 1) / 2


def standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension of (N, ...) independent values; NaN for N = 1."""
    return values.std(0) / math.sqrt(len(values)) if len(values) > 1 else values.new_full(values.shape[1:], math.nan)


def intervals(T: int, count: int | None) -> tuple[Tensor, Tensor]:
    """Splits 0..T-1 into at most ``count`` intervals: t = 0 alone, the others ever longer, as L_t falls with t.

    Returns:
        (first t, number of t) of each, int64.
    """
    count = None if count is None else checks.integer("terms per image", count, 1)
    if count is None or count >= T:
        return torch.arange(T, device="cpu"), torch.ones(T, dtype=torch.int64, device="cpu")
    if count < 2:
        raise ValueError(f"terms per image must be at least 2, the decoder's and one more, got {count}")
    # Geometric edges, but each at least one t long: the first come out as single steps.
    edges = [1]
    for k in range(1, count):
        left = count - k
        edges.append(max(edges[-1] + 1, round(edges[-1] * (T / edges[-1]) ** (1 / left))))
    edges[-1] = T
    first = torch.tensor([0, *edges[:-1], T], device="cpu")
    return first[:-1], first.diff()


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
    parts: Parts | None = None,
    ranks: Ranks | None = None,
    report: Callable[[int, int], object] = lambda done, of: None,
) -> Bound:
    """The bound on every image, term by term.

    Image i draws its noise and its t from (seed, i) alone, so the batch size and the number of ranks change the result by the model's
    own rounding only, and so does an interruption after which another batch size goes on.

    Args:
        model: any callable (x_t, t) -> output, in eval mode.
        x_start: (N, C, ...) data in [-1, 1], or a function that gives the images of a slice, with ``count`` = N.
        terms_per_image: None for all T terms; else one random t in each of so many intervals of t (t = 0 always), which
            costs that many passes of the model an image and is unbiased.
        batch: images in a pass.
        clip: clip x̂0 to [-1, 1].
        parts: where the results of each batch are kept, for a later call to go on from. Its settings must name all that
            the results depend on: model, images, seed, terms, clip. Remove it once the result is safe.
        ranks: the processes that share the batches, through ``parts``; each of them makes this call and gets the whole result.
        report: called as report(done, of), in passes of a batch by this process.

    Returns:
        :class:`Bound`.

    Raises:
        ValueError: for no images, images that are not finite or not in [-1, 1], a batch below 1, fewer than 2 terms, a
            model whose output is not finite, parts of other settings, or ranks without parts.
    """
    checks.function("model", model)
    checks.instance("diffusion", diffusion, GaussianDiffusion)
    checks.flag("clip", clip)
    checks.function("report", report)
    ranks = Ranks() if ranks is None else checks.instance("ranks", ranks, Ranks)
    if isinstance(x_start, Tensor):
        if x_start.ndim and not len(x_start):
            raise ValueError("the bound needs at least one image, got none")
        check_data("x_start", x_start)
        images, count = x_start, len(x_start)
        fetch = lambda part: images[part]  # noqa: E731
    elif callable(x_start):
        fetch, count = x_start, checks.integer("count", count, 1)
    else:
        raise TypeError(f"x_start must be a tensor, or a function of a slice, got {type(x_start).__name__}")
    batch = checks.integer("batch", batch, 1)
    if parts is not None:
        checks.instance("parts", parts, Parts)
    if ranks.size > 1 and parts is None:
        raise ValueError(f"{ranks.size} ranks share their work through parts, but there are none")
    first, counts = intervals(len(diffusion), terms_per_image)
    noise_key, t_key = Noise(seed).fold_in(FOLD_EVAL_NOISE), Noise(seed).fold_in(FOLD_EVAL_TIMESTEPS)

    def evaluate(part: range, progress: Callable[[], object]) -> dict[str, Tensor]:
        x, sample = fetch(slice(part.start, part.stop)), part.start
        columns = enumerate(zip(first.tolist(), counts.tolist(), strict=True))
        timesteps = (low + t_key.at(stream=k, first_sample=sample).integers(len(x), size, x.device) for k, (low, size) in columns)
        found = diffusion.bound_terms(model, x, timesteps, clip, noise_key.at(first_sample=sample), report=progress)
        prior, terms, mse = (
            result.double().cpu() for result in (found.prior, found.terms, found.mse)
        )  # the one wait for the device in a batch
        if not terms.isfinite().all():
            bad = first[int((~terms.isfinite()).any(0).nonzero()[0])]
            raise ValueError(f"the bound is not finite at t = {int(bad)}: the model's output is NaN or infinite there")
        return dict(prior=prior, terms=terms, mse=mse)

    if parts is None:
        turns = pieces(range(count), batch)
    else:
        ranks.lead(parts.open)
        turns = ranks.share_missing(partial(parts.missing, count), batch)
    passes = iter(range(1, len(turns) * len(first) + 1))
    done = []
    for part in turns:
        results = evaluate(part, lambda: report(next(passes), len(turns) * len(first)))
        if parts is None:
            done.append(results)
        else:
            parts.save(part, **{name: value.numpy() for name, value in results.items()})
    if parts is None:
        found = {name: torch.cat([results[name] for results in done]) for name in done[0]}
    else:
        ranks.wait()
        found = {name: torch.from_numpy(value) for name, value in parts.load(count).items()}
        ranks.wait()  # all have read before one may remove the parts
    return Bound(**found, first=first, counts=counts)
