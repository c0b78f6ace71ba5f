"""The Fréchet distance between two sets of features, as FID defines it (arXiv 1706.08500, eq. 6).

With EfficientNet-Lite0's features in place of Inception's: figures do not compare with published
FIDs. It is biased upwards for few pictures, so it is given beside that of two sets of art.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def moments(features: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and covariance (D, D) of (N, D) features.

    Raises:
        ValueError: fewer than two rows have no covariance.
    """
    if len(features) < 2:
        raise ValueError("a Fréchet distance needs at least two pictures in each set")
    values = features.astype(np.float64)
    return values.mean(0), np.atleast_2d(np.cov(values, rowvar=False))


def frechet_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of (N, D) and (M, D) features.

    The trace of the root is the sum of the roots of the eigenvalues of ``A C2 A``, ``A`` being the
    symmetric root of ``C1``: that matrix is symmetric and has the eigenvalues of ``C1 C2``.
    """
    (mean1, cov1), (mean2, cov2) = moments(first), moments(second)
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ cov2 @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    trace = np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(np.maximum(eigenvalues, 0)).sum()
    return max(0.0, float(((mean1 - mean2) ** 2).sum() + trace))
