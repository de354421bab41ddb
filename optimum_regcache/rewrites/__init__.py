"""Changes of the float weights that leave the function as it is and make it easier to quantize."""

from optimum_regcache.math.hadamard import (
    block_hadamard,
    block_order,
    hadamard_matrix,
    orthogonal_matrix,
    rotate_mlp_input_weight,
    rotation_matrix,
)
from optimum_regcache.rewrites.norms import rescale_norm, rescale_values
from optimum_regcache.rewrites.rotation import (
    empty_rotation,
    fold_layer_scale,
    fold_norm_affine,
    is_rotated,
    rotate_heads,
    rotate_residual,
)

__all__ = [
    "block_hadamard",
    "block_order",
    "empty_rotation",
    "fold_layer_scale",
    "fold_norm_affine",
    "hadamard_matrix",
    "is_rotated",
    "orthogonal_matrix",
    "rescale_norm",
    "rescale_values",
    "rotate_heads",
    "rotate_mlp_input_weight",
    "rotate_residual",
    "rotation_matrix",
]
