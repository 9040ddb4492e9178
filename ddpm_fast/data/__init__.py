"""Images to train on and to compare with: built in, from folders, from array files."""

from ddpm_fast.data.grey_levels import DataError
from ddpm_fast.data.images import DataWarning, ImageData, load_data

__all__ = ["DataError", "DataWarning", "ImageData", "load_data"]
