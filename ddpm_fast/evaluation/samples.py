"""Quick looks at samples against labelled data, without a pretrained network: meant for small images such as the digits."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.data.images import ImageData, to_levels, to_unit


def class_counts(samples: Tensor, data: ImageData) -> list[int]:
    """Number of samples in each class, by an RBF-kernel SVM that is trained on the real training images.

    Args:
        samples: (N, C, H, W) in [-1, 1].
        data: images with labels.

    Returns:
        A count for each class, in order of their numbers.

    Raises:
        ValueError: the data have no labels.
    """
    from sklearn.svm import SVC  # slow to import

    x, labels = data.batch("train", slice(None))
    if labels is None or data.num_classes is None:
        raise ValueError(f"the data must have labels to count classes by, but {data.name} has none")
    classifier = SVC(C=10.0).fit(x.flatten(1).numpy(), labels.numpy())
    predicted = torch.from_numpy(classifier.predict(_quantised(samples, data).flatten(1).numpy()))
    return torch.bincount(predicted, minlength=data.num_classes).tolist()


def neighbour_distance_ratio(samples: Tensor, data: ImageData) -> float:
    """Mean distance of the samples to their nearest training image, divided by the same mean for the held-out images.

    It is near 1 for samples from the data's distribution, well below 1 for copies of training images, above 1 for blurred or broken
    ones.

    Args:
        samples: (N, C, H, W) in [-1, 1].
        data: images with a training and a held-out part.
    """
    train, _ = data.batch("train", slice(None))
    test, _ = data.batch("test", slice(None))
    return float(_nearest(_quantised(samples, data), train) / _nearest(test, train))


def _quantised(samples: Tensor, data: ImageData) -> Tensor:
    return to_unit(to_levels(samples.cpu(), data.levels), data.levels)


def _nearest(x: Tensor, train: Tensor) -> Tensor:
    return torch.cdist(x.flatten(1), train.flatten(1)).min(1).values.mean()
