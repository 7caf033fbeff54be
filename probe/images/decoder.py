"""Decoder: the bytes of an image file -> the upright first frame in RGB, or an `ImageError` with a reason.

Owns the rules that transformers leaves open (`DECODING_RULES`, part of every cache's fingerprint). An image
either loads whole or fails; nothing is guessed, patched or blackened.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import (
    AvifImagePlugin,
    ExifTags,
    Image,
    JpegImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

# Pillow would load these three when it first meets one, and 40 others with them.
assert all((AvifImagePlugin, TiffImagePlugin, WebPImagePlugin))

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # never EPS: Pillow would start Ghostscript
MAX_PIXELS = 100_000_000  # phones make 50 million
MAX_ASPECT = 100  # 1 x 20,000 would become 224 x 4,480,000 on the way to a 224 x 224 crop
DECODING_RULES = {
    "formats": list(FORMATS),
    "frame": "first",
    "orientation": "EXIF applied",
    "alpha": "composited on white",
    "grey16": "scaled, 65535 is white",
    "depth32": "refused",
    "colour": "RGB as Pillow converts",
    "truncated": "refused",
    "max_aspect": MAX_ASPECT,
}

_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """One image cannot be had. `reason` is a short code, `str()` the detail.

    Of the bytes: empty, format (none of FORMATS), truncated, corrupt, too-big, aspect, depth (32-bit pixels),
    memory. Of what surrounds them: missing, not-a-file, unreadable, changed, timeout, crashed.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, reduce_to: int | None = None) -> Image.Image:
    """Decodes the first frame of an image, turned upright, in mode RGB.

    While it runs, Pillow's warnings and its pixel limit are set for the whole process: call it from one
    thread at a time (`load_images` is the parallel form).

    Args:
      data: the bytes of a file in one of FORMATS (or HEIC, where pillow-heif is installed).
      max_pixels: width x height that is still decoded; checked before any pixel is.
      reduce_to: a JPEG comes out at 1/2, 1/4 or 1/8 of its size, the smallest that leaves its shorter side at least
        this long: libjpeg leaves coefficients of the cosine transform out, which takes a fraction of the time.
    Raises: ImageError, whatever is wrong with the image.
    """
    if not data:
        raise ImageError("empty", "the file is empty")
    try:
        with _strict_pillow(max_pixels):
            return _decode(data, reduce_to)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        raise ImageError("too-big", f"more than {max_pixels:,} pixels (--max-pixels): {err}") from err
    except UnidentifiedImageError as err:
        for kind in (*FORMATS, "HEIF"):
            _, accepts = Image.OPEN.get(kind, (None, None))
            if accepts and accepts(data[:16]) is True:
                raise ImageError("corrupt", f"begins as {kind}, but its header is damaged or cut short") from err
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise ImageError("format", f"not a {formats} image: begins with {data[:16]!r}") from err
    except MemoryError as err:
        raise ImageError("memory", "not enough memory to decode it") from err
    except Exception as err:  # Pillow also raises SyntaxError, ValueError, KeyError, struct.error ...
        reason = "truncated" if "truncated" in str(err).lower() else "corrupt"
        raise ImageError(reason, f"{type(err).__name__}: {str(err)[:200]}") from err


def _decode(data: bytes, reduce_to: int | None) -> Image.Image:
    is_heif = data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS
    with Image.open(io.BytesIO(data), formats=(*FORMATS, _heif_format()) if is_heif else FORMATS) as image:
        if max(image.size) > MAX_ASPECT * min(image.size):
            detail = f"{image.width} x {image.height} pixels: one side is over {MAX_ASPECT} times the other"
            raise ImageError("aspect", detail)
        if image.mode in ("I", "F"):
            detail = f"32-bit pixels (mode {image.mode}) do not say what white is: save it with 8 or 16 bits"
            raise ImageError("depth", detail)
        if reduce_to is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft(None, (reduce_to, reduce_to))
        image.load()
        transparent = image.info.get("transparency")
        turn = _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I;16"):
            return _scale_grey16(upright, transparent)
        if "A" in upright.getbands() or transparent is not None:  # as transformers 5 does
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, (255, 255, 255, 255)), upright)
        return upright if upright.mode == "RGB" else upright.convert("RGB")  # which would copy it


def _scale_grey16(image: Image.Image, transparent: object) -> Image.Image:
    wide = np.asarray(image).astype(np.uint32)
    grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
    if isinstance(transparent, int):
        grey[wide == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _heif_format() -> str:
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError:
        raise ImageError("format", "HEIC needs one more package: pip install 'probe-jax[heic]'") from None
    pillow_heif.register_heif_opener()
    return "HEIF"


@contextlib.contextmanager
def _strict_pillow(max_pixels: int) -> Iterator[None]:
    """Pillow's own pixel limit becomes ours, everywhere that it checks; its other warnings are silent."""
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
