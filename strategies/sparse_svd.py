"""The leading singular vectors of a sparse matrix."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from torch import Tensor

from common.lowrank import LowRank, Svd, kept_rank, resolution

DENSE_BELOW = 256
"""Matrices with no more rows or columns than this that are not all zero are decomposed whole; ARPACK wins above."""


def leading_part(matrix: Tensor, rank: int, seed: int) -> LowRank:
    """Return the nearest update of a rank to a matrix most of which is zero, singular values split over both factors.

    Rows and columns of zeros are left out first: what is left of a very sparse matrix is small. It also keeps ARPACK,
    which goes on with random numbers of its own where a matrix has fewer directions than it is asked for, from that.

    Parameters
    ----------
    matrix : Tensor, shape (out, in)
        Float32 or wider.
    rank : int
        At least 1; a matrix of lower rank gives fewer slots.
    seed : int
        Of ARPACK's first vector, so that the bits repeat.
    """
    rows, columns = matrix.any(dim=1), matrix.any(dim=0)
    u, s, vh = _leading(matrix[rows][:, columns].double(), rank, seed)
    keep = kept_rank(s, rank, None, resolution(matrix.dtype, (matrix.shape[0], matrix.shape[1])))
    root = s[:keep].sqrt()
    b, a = matrix.new_zeros(matrix.shape[0], keep), matrix.new_zeros(keep, matrix.shape[1])
    b[rows] = (u[:, :keep] * root).to(matrix.dtype)
    a[:, columns] = (root[:, None] * vh[:keep]).to(matrix.dtype)
    return LowRank(b, a)


def _leading(matrix: Tensor, rank: int, seed: int) -> Svd:
    """Decompose a float64 matrix; at least the leading ``rank`` singular values, falling."""
    least = min(matrix.shape)
    if least <= DENSE_BELOW or rank >= least // 2:
        return Svd(*torch.linalg.svd(matrix, full_matrices=False))
    first = np.random.default_rng(seed).standard_normal(least)
    u, s, vh = svds(csr_matrix(matrix.numpy()), k=rank, v0=first, solver="arpack")
    order = np.argsort(-s)
    return Svd(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (u[:, order], s[order], vh[order])))
