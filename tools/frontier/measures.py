"""How far images are from others: in pixels, and in the features of a classifier."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

Features = NDArray[np.float64]


def psnr(reference: Tensor, images: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB over all pixels of all images, of the range [-1, 1].

    None for equal images.
    """
    if torch.equal(reference, images):
        return None
    one, other = (each.double().numpy() for each in (reference, images))
    return float(peak_signal_noise_ratio(one, other, data_range=2.0))


@torch.no_grad()
def features(classifier: nn.Module, images: Tensor) -> Features:
    """What the classifier's last, linear layer reads: [B, C, H, W] -> [B, F]."""
    layers = nn.Sequential(*list(classifier.children())[:-1])
    found: Features = layers(images).double().numpy()
    return found


def frechet(one: Features, other: Features) -> float:
    """The Frechet distance between normal distributions fitted to features [n, F] and [m, F].

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) for the covariances A and B (Heusel et al.
    2017). With A = a^T a and B = b^T b the eigenvalues of A B are the squares of the singular
    values of a b^T: no root of a matrix is taken that may have none.
    """
    centred = ((each - each.mean(0)) / np.sqrt(len(each) - 1) for each in (one, other))
    a, b = (np.linalg.qr(each).R for each in centred)
    between = float(((one.mean(0) - other.mean(0)) ** 2).sum())
    shared = float(np.linalg.norm(a @ b.T, ord="nuc"))
    return between + float((a**2).sum()) + float((b**2).sum()) - 2 * shared


def halves(real: Features) -> float:
    """The distance between two random halves of the data: about what is no distance."""
    order = np.random.default_rng(0).permutation(len(real))
    middle = len(real) // 2
    return frechet(real[order[:middle]], real[order[middle:]])
