"""Images: bytes -> uint8 [H, W, 3] as its backbone's preprocessing does it, one status per image."""

from probe.images.decoder import FORMATS, MAX_ASPECT, MAX_PIXELS, ImageError
from probe.images.files import MAX_BYTES, read_image_file, too_many_bytes
from probe.images.preprocessing import Preprocessing, load_image
from probe.images.workers import ImageLoader, LoadedImage, load_images

__all__ = [
    "FORMATS",
    "MAX_ASPECT",
    "MAX_BYTES",
    "MAX_PIXELS",
    "ImageError",
    "ImageLoader",
    "LoadedImage",
    "Preprocessing",
    "load_image",
    "load_images",
    "read_image_file",
    "too_many_bytes",
]
