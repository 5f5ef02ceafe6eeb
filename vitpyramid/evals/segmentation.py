"""Intersection over union and accuracies of class maps, as mmsegmentation (0.13) computes them."""

from typing import NamedTuple

import numpy as np

IGNORED = 255


class Scores(NamedTuple):
    """What a confusion says.

    Attributes:
      numbers: `mIoU`, `mAcc` (means over classes) and `aAcc` (share of pixels), in [0, 1].
      iou, accuracy: float64 `[K]`; NaN of a class that neither labels nor predictions have, of a class without labels.
    """

    numbers: dict[str, float]
    iou: np.ndarray
    accuracy: np.ndarray


def confusion(predicted: np.ndarray, label: np.ndarray, num_classes: int, ignored: int = IGNORED) -> np.ndarray:
    """Pixels by label (rows) and prediction (columns): int64 `[K, K]`. Those of several maps add up.

    Args:
      predicted: int `[H, W]`, classes.
      label: int `[H, W]`, classes or `ignored`.

    Raises:
      ValueError: maps of different sizes; a label that is no class.
    """
    if predicted.shape != label.shape:
        raise ValueError(f"a prediction of {predicted.shape} pixels for a label map of {label.shape}")
    there = label != ignored
    label, predicted = label[there].astype(np.int64), predicted[there].astype(np.int64)
    if label.size and not 0 <= label.min() <= label.max() < num_classes:
        raise ValueError(f"label {label.max()}: expected less than num_classes = {num_classes}, or {ignored}")
    return np.bincount(label * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(confusion: np.ndarray) -> Scores:
    """IoU and accuracy of a confusion `[K, K]`; means leave NaNs out."""
    counts = np.asarray(confusion, np.float64)
    hit, labels, predictions = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore"):
        iou, accuracy = hit / (labels + predictions - hit), hit / labels
        numbers = {"mIoU": _mean(iou), "mAcc": _mean(accuracy), "aAcc": float(hit.sum() / labels.sum())}
    return Scores(numbers, iou, accuracy)


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")
