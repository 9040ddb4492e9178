"""The files that a bound is written into: JSON with its parts, CSV tables, and pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_fast.evaluation.bound import Bound, standard_error
from ddpm_fast.evaluation.progressive import RateDistortion, rate_distortion
from ddpm_fast.io.files import write_csv, write_json
from ddpm_fast.io.plots import write_bound_plot, write_rate_distortion_plot

BOUND_FILES = ("bound.json", "bound.csv", "bound.png", "rate_distortion.csv", "rate_distortion.png")


def write_bound(
    folder: str | os.PathLike[str], bound: Bound, *, about: Mapping[str, Any] | None = None, title: str | None = None
) -> dict[str, Path]:
    """Writes bound.json, bound.csv, bound.png, rate_distortion.csv and rate_distortion.png.

    The JSON has the parts of the bound with their standard errors, what ``about`` adds, and the columns of bound.csv as lists:
    ``first_t`` and ``count_t``, the interval of t that a term stands for, its mean over the images and that mean's standard
    error in bits per dimension, and the mean squared error of x̂0 on the data's scale of [-1, 1].

    Args:
        folder: created if missing; older files of these names are replaced.
        about: JSON values, say of the model and the data.
        title: of the pictures.

    Returns:
        The paths by the content of the files: "summary", "table", "picture", "rate/distortion", "its picture".
    """
    folder = Path(folder)
    curve = rate_distortion(bound)
    columns = dict(
        first_t=bound.first.tolist(),
        count_t=bound.counts.tolist(),
        mean_term=bound.terms.mean(0).tolist(),
        term_standard_error=standard_error(bound.terms).tolist(),
        mean_mse=bound.mse.mean(0).tolist(),
        mse_standard_error=standard_error(bound.mse).tolist(),
    )
    paths = dict(
        zip(("summary", "table", "picture", "rate/distortion", "its picture"), (folder / name for name in BOUND_FILES), strict=True)
    )
    write_json(paths["summary"], {**bound.summary(), "rmse": float(curve.distortion[-1]), **(about or {}), **columns})
    write_csv(paths["table"], columns)
    write_bound_plot(paths["picture"], bound.terms, bound.prior, bound.centers, weights=bound.counts, title=title)
    write_csv(paths["rate/distortion"], {name: getattr(curve, name).tolist() for name in RateDistortion.__dataclass_fields__})
    write_rate_distortion_plot(paths["its picture"], curve.t, curve.rate, curve.distortion, title=title)
    return paths
