"""Pictures of a subject, under the name that they had before `diffusers_ext.training`."""

from diffusers_ext.core.seeds import check_prediction_type
from diffusers_ext.training.nullspace.data import list_images, load_image

__all__ = ["check_prediction_type", "list_images", "load_image"]
