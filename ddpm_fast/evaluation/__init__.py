"""Measures of a trained model: the variational bound, its rate-distortion curve, and the quality of samples."""

from ddpm_fast.evaluation.bound import Bound, evaluate_bound
from ddpm_fast.evaluation.features import load_features
from ddpm_fast.evaluation.progressive import RateDistortion, rate_distortion
from ddpm_fast.evaluation.quality import evaluate_quality, inception_score, precision_recall, quality_from_features
from ddpm_fast.evaluation.report import write_bound
from ddpm_fast.evaluation.samples import class_counts, neighbour_distance_ratio

__all__ = [
    "Bound", "RateDistortion", "class_counts", "evaluate_bound", "evaluate_quality", "inception_score", "load_features",
    "neighbour_distance_ratio", "precision_recall", "quality_from_features", "rate_distortion", "write_bound",
]  # fmt: skip
