"""Images: data sets, procedural scenes, embedded encoders."""

from optimum_regcache.data.images import ImageInputs, load_images
from optimum_regcache.data.loading import load_splits

__all__ = ["ImageInputs", "load_images", "load_splits"]
