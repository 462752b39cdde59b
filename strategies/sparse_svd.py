"""The leading singular vectors of a sparse matrix."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from torch import Tensor

from common.lowrank import Dense, LowRank

DENSE_BELOW = 256
"""Matrices whose smaller side is at most this are decomposed whole; ARPACK wins above."""


def leading_part(matrix: Tensor, rank: int, seed: int) -> LowRank:
    """Return the nearest update of a rank to a matrix most of which is zero, singular values split over both factors.

    Parameters
    ----------
    matrix : Tensor, shape (out, in)
        Float32 or wider.
    rank : int
        At least 1; a matrix of lower rank gives fewer slots.
    seed : int
        Of ARPACK's first vector, so that the bits repeat.
    """
    least = min(matrix.shape)
    if least <= DENSE_BELOW or rank >= least // 2 or not matrix.any():
        whole = Dense(matrix).low_rank()
        return LowRank(whole.b[:, :rank], whole.a[:rank])
    first = np.random.default_rng(seed).standard_normal(least)
    u, s, vh = svds(csr_matrix(matrix.double().numpy()), k=rank, v0=first, solver="arpack")
    order = np.argsort(-s)
    root = np.sqrt(s[order])
    b, a = u[:, order] * root, root[:, None] * vh[order]
    return LowRank(torch.from_numpy(b).to(matrix.dtype), torch.from_numpy(np.ascontiguousarray(a)).to(matrix.dtype))
