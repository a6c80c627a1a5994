"""How good labels, numbers and scores are, with bootstrap intervals (Efron 1979). No torch.

Undefined values (the correlation with equal predictions) are 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 500
_LEVEL = 0.95
_BINS = 10


def class_scores(confusion: Floats) -> dict[str, Floats]:
    """Return accuracy, macro F1 and Matthews correlation from confusion matrices (..., K, K): row true, column found.

    F1 is averaged over the classes that occur. The correlation of several classes is that of Gorodkin (2004).
    """
    total, right = confusion.sum((-2, -1)), np.trace(confusion, axis1=-2, axis2=-1)
    true, found = confusion.sum(-1), confusion.sum(-2)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    occurs = (true + found) > 0
    f1 = np.where(occurs, 2 * hits / np.maximum(true + found, 1), 0.0)
    covariance = right * total - (true * found).sum(-1)
    spread = np.sqrt((total**2 - (true**2).sum(-1)) * (total**2 - (found**2).sum(-1)))
    matthews = np.where(spread > 0, covariance / np.where(spread > 0, spread, 1), 0.0)
    return {"accuracy": right / total, "f1": f1.sum(-1) / np.maximum(occurs.sum(-1), 1), "matthews": matthews}


def classification(labels: NDArray[np.int64], found: NDArray[np.int64], classes: int) -> tuple[dict[str, float], Any]:
    """Return the metrics of `class_scores`, each with its interval (`accuracy_low`, `accuracy_high`), and the confusion
    matrix."""
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, found), 1)
    # To draw rows with replacement is to draw the cells that they fall into.
    shares = confusion.ravel() / confusion.sum()
    drawn = np.random.default_rng(0).multinomial(len(labels), shares, RESAMPLES).astype(float)
    resampled = class_scores(drawn.reshape(RESAMPLES, classes, classes))
    values: dict[str, float] = {}
    for name, value in class_scores(confusion).items():
        values |= with_interval(name, float(value), resampled[name])
    return values, confusion.astype(int).tolist()


def correlations(labels: Floats, found: Floats) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, with intervals."""
    values: dict[str, float] = {}
    rows = np.random.default_rng(0).integers(0, len(labels), (RESAMPLES, len(labels)))
    for name, measure in (("pearson", pearson), ("spearman", spearman)):
        drawn = np.array([measure(labels[chosen], found[chosen]) for chosen in rows])
        values |= with_interval(name, measure(labels, found), drawn)
    return values


def mean_with_interval(name: str, values: Floats) -> dict[str, float]:
    """Return the mean of `values` and its interval."""
    rows = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return with_interval(name, float(values.mean()), values[rows].mean(axis=1))


def ratio_with_interval(name: str, numerators: Floats, denominators: Floats) -> dict[str, float]:
    """Return the ratio of two sums, and its interval from resampling the terms of both together."""
    drawn = resamples(len(numerators))
    return with_interval(
        name,
        float(numerators.sum() / denominators.sum()),
        (drawn @ numerators) / np.maximum(drawn @ denominators, 1e-9),
    )


def resamples(count: int) -> Floats:
    """Return how often each of `count` items is drawn in each resample with replacement: (RESAMPLES, count)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def with_interval(name: str, value: float, resampled: Floats) -> dict[str, float]:
    """Return a value with the interval that 95% of the resampled values are in."""
    low, high = np.quantile(resampled, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}


def pearson(a: Floats, b: Floats) -> float:
    """Return the correlation; 0 where one side is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0


def spearman(a: Floats, b: Floats) -> float:
    """Return the correlation of the ranks; equal values share theirs."""
    return pearson(ranks(a), ranks(b))


def ranks(values: Floats) -> Floats:
    """Return the rank of each value from 0; equal values have their mean rank."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = ends - (counts + 1) / 2
    return means[index]


def calibration_error(probability: Floats, right: NDArray[np.bool_]) -> float:
    """Return the expected calibration error (Naeini et al. 2015): the mean gap between the probability and how often it
    is right, over ten bins of equal width."""
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    gap = 0.0
    for number in range(_BINS):
        inside = bins == number
        if inside.any():
            gap += abs(float(right[inside].sum() - probability[inside].sum()))
    return gap / len(probability)
