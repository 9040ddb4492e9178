"""What a trained model is worth: the bound, and quick measures of samples."""
from ddpm_fast.evaluation.bound import Bound, evaluate_bound
from ddpm_fast.evaluation.samples import class_counts, neighbour_distance_ratio

__all__ = ["Bound", "class_counts", "evaluate_bound", "neighbour_distance_ratio"]
