"""Changes of the float weights that leave the function as it is and make it easier to quantize."""

from optimum_regcache.rewrites.norms import rescale_norm, rescale_values

__all__ = ["rescale_norm", "rescale_values"]
