"""Linear algebra shared by several layers: functions of tensors, independent of any transform."""

from pyro_invflows.linalg.accretive import contraction_log_det, contraction_matrix
from pyro_invflows.linalg.covariance import correlations, covariance_roots, oas_weight, triangular_root
from pyro_invflows.linalg.cyclic import cyclic_product, narrowest
from pyro_invflows.linalg.dense import log_abs_det, solve
from pyro_invflows.linalg.frames import thin_frame
from pyro_invflows.linalg.householder import (
    BLOCK_SIZE,
    householder_product,
    householder_vectors,
    identity_reflections,
    triangle_mask,
)
from pyro_invflows.linalg.lowrank import (
    low_rank_log_abs_det,
    low_rank_solve,
    rows_times,
    symmetric_low_rank_inverse,
)
from pyro_invflows.linalg.spectral import (
    convolution_norm_bound,
    spectral_norm,
    spectral_norm_bound,
    spectral_norm_bounds,
)
from pyro_invflows.linalg.triangular import positive, positive_inverse, solve_for_rows, split_triangles

__all__ = [
    "BLOCK_SIZE",
    "contraction_log_det",
    "contraction_matrix",
    "convolution_norm_bound",
    "correlations",
    "covariance_roots",
    "cyclic_product",
    "householder_product",
    "householder_vectors",
    "identity_reflections",
    "log_abs_det",
    "low_rank_log_abs_det",
    "low_rank_solve",
    "narrowest",
    "oas_weight",
    "positive",
    "positive_inverse",
    "rows_times",
    "solve",
    "solve_for_rows",
    "spectral_norm",
    "spectral_norm_bound",
    "spectral_norm_bounds",
    "split_triangles",
    "symmetric_low_rank_inverse",
    "thin_frame",
    "triangle_mask",
    "triangular_root",
]
