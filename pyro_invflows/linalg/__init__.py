"""Linear algebra that several layers share. Tensors in, tensors out; nothing here knows a transform."""

from pyro_invflows.linalg.dense import log_abs_det, solve
from pyro_invflows.linalg.householder import (
    BLOCK_SIZE,
    householder_product,
    householder_vectors,
    identity_reflections,
    triangle_mask,
)

__all__ = [
    "BLOCK_SIZE",
    "householder_product",
    "householder_vectors",
    "identity_reflections",
    "log_abs_det",
    "solve",
    "triangle_mask",
]
