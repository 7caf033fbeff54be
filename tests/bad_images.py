"""Some 90 generated image files, good, odd and bad, each with what must come of it.

Everything is made from one picture of smooth colours by Pillow or by hand, so that nothing binary is stored.
"""

import dataclasses
import importlib.util
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 30, 40
_ROWS, _COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH]
PIXELS = np.stack([_COLUMNS * 6, _ROWS * 8, 255 - _COLUMNS * 3 - _ROWS * 4], -1).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)
GREY = Image.fromarray(PIXELS[..., 0])
GREY_PIXELS = np.repeat(PIXELS[..., :1], 3, axis=-1)
WHITE = np.full_like(PIXELS, 255)
LEFT = _COLUMNS < WIDTH // 2  # the transparent half
HALF = np.where(LEFT[..., None], WHITE, PIXELS)
HALF_GREY = np.where(LEFT[..., None], WHITE, GREY_PIXELS)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    expected: np.ndarray | str  # [H, W, 3] uint8, or the reason of the failure
    tolerance: float = 0.0  # mean absolute difference in grey levels that the format's loss explains


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(rows: bytes, width: int, height: int, depth: int, colour: int, *extra: bytes) -> bytes:
    """A PNG from filtered rows: Pillow writes no 16-bit colour, and no lies in the header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    )


def png16(pixels: np.ndarray, colour: int, *extra: bytes) -> bytes:
    """pixels: [H, W] or [H, W, channels] uint16."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(rows, pixels.shape[1], pixels.shape[0], 16, colour, *extra)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def stored_as(orientation: int) -> Image.Image:
    """The picture as a camera stores it that wants it shown upright under this EXIF orientation."""
    array: Callable[[np.ndarray], np.ndarray] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(array(PIXELS)))


def lying_jpeg(size: int) -> bytes:
    data = bytearray(encode(PICTURE, "JPEG"))
    start = data.find(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", size, size)
    return bytes(data)


def bomb_png(size: int) -> bytes:
    compressor = zlib.compressobj(9)
    row = bytes(1 + size // 8)
    data = b"".join(compressor.compress(row) for _ in range(size)) + compressor.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff_loop() -> bytes:
    """A TIFF whose second directory is the first again, without any image in it."""
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 4, 1, 40, 8)


def cases() -> list[Case]:
    jpeg, plain, webp = encode(PICTURE, "JPEG", quality=95), encode(PICTURE, "PNG"), encode(PICTURE, "WEBP")
    gif, bmp, tiff = encode(PICTURE, "GIF"), encode(PICTURE, "BMP"), encode(PICTURE, "TIFF")
    avif = encode(PICTURE, "AVIF", quality=95)
    half = PICTURE.convert("RGBA")
    half.putalpha(Image.fromarray(np.where(LEFT, 0, 255).astype(np.uint8)))
    palette = PICTURE.quantize(64)
    frames = [Image.fromarray(np.full_like(PIXELS, level)) for level in (128, 0, 255)]
    first = np.asarray(frames[0])
    movie: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    wide = PIXELS[..., 0].astype(np.uint16) * 257
    grey_key = chunk(b"tRNS", struct.pack(">H", 60 * 257))
    keyed = np.where((PIXELS[..., :1] == 60), WHITE, GREY_PIXELS)
    wide_rgba = np.dstack([PIXELS.astype(np.uint16) * 257, np.where(LEFT, 0, 65535).astype(np.uint16)])
    wide_la = np.dstack([wide, np.where(LEFT, 0, 65535).astype(np.uint16)])
    rgb_key = b"".join(struct.pack(">H", int(level)) for level in PIXELS[0, 0])
    rgb_rows = b"".join(b"\0" + row.tobytes() for row in PIXELS)
    one_key = PIXELS.copy()
    one_key[0, 0] = 255
    damaged_jpeg = bytearray(jpeg)
    damaged_jpeg[len(jpeg) // 2 : len(jpeg) // 2 + 40] = bytes(range(1, 41))
    damaged_png = bytearray(plain)
    damaged_png[len(plain) // 2] ^= 255
    damaged_text = plain[:33] + chunk(b"tEXt", b"Comment\0hello")[:-1] + b"!" + plain[33:]
    bad_exif = jpeg[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff" + jpeg[2:]
    cmyk = PICTURE.convert("CMYK")

    good = [
        Case("plain.jpg", jpeg, PIXELS, 2),
        Case("progressive.jpg", encode(PICTURE, "JPEG", quality=95, progressive=True), PIXELS, 2),
        Case("grey.jpg", encode(GREY, "JPEG", quality=95), GREY_PIXELS, 2),
        Case("cmyk.jpg", encode(cmyk, "JPEG", quality=95), np.asarray(cmyk.convert("RGB")), 3),
        Case("trailing.jpg", jpeg + b"PK\x03\x04" + bytes(3000), PIXELS, 2),
        Case("png-named.jpg", plain, PIXELS),
        Case("jpg-named.png", jpeg, PIXELS, 2),
        Case("upright-exif.jpg", encode(PICTURE, "JPEG", quality=95, exif=exif(1)), PIXELS, 2),
        Case("odd-exif.jpg", encode(PICTURE, "JPEG", quality=95, exif=exif(77)), PIXELS, 2),
        Case("broken-exif.jpg", bad_exif, PIXELS, 2),
        Case("plain.png", plain, PIXELS),
        Case("exif.png", encode(stored_as(6), "PNG", exif=exif(6)), PIXELS),
        Case("palette.png", encode(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        Case("grey.png", encode(GREY, "PNG"), GREY_PIXELS),
        Case("bilevel.png", encode(GREY.point(lambda v: 255 * (v > 99), "1"), "PNG"), WHITE * (GREY_PIXELS > 99)),
        Case("rgba.png", encode(half, "PNG"), HALF),
        Case("la.png", encode(half.convert("LA"), "PNG"), np.where(LEFT[..., None], WHITE, _luma())),
        Case("rgb-key.png", png(rgb_rows, WIDTH, HEIGHT, 8, 2, chunk(b"tRNS", rgb_key)), one_key),
        Case("palette-key.png", encode(_keyed_palette(), "PNG", transparency=0), HALF_GREY),
        Case("palette-alpha.png", encode(_keyed_palette(), "PNG", transparency=b"\0" + b"\xff" * 255), HALF_GREY),
        Case("grey16.png", png16(wide, 0), GREY_PIXELS),
        Case("grey16-key.png", png16(wide, 0, grey_key), keyed),
        Case("rgb16.png", png16(PIXELS.astype(np.uint16) * 257, 2), PIXELS),
        Case("rgba16.png", png16(wide_rgba, 6), HALF),
        Case("la16.png", png16(wide_la, 4), HALF_GREY),
        Case("no-end.png", plain[: -len(chunk(b"IEND", b""))], PIXELS),
        Case("animated.png", encode(frames[0], "PNG", **movie), first),
        Case("plain.webp", webp, PIXELS, 6),
        Case("lossless.webp", encode(PICTURE, "WEBP", lossless=True), PIXELS),
        Case("rgba.webp", encode(half, "WEBP", lossless=True), HALF),
        Case("exif.webp", encode(stored_as(8), "WEBP", lossless=True, exif=exif(8)), PIXELS),
        Case("animated.webp", encode(frames[0], "WEBP", lossless=True, **movie), first),
        Case("plain.gif", gif, PIXELS, 12),
        Case("key.gif", encode(_keyed_palette(), "GIF", transparency=0), HALF_GREY),
        Case("animated.gif", encode(frames[0], "GIF", **movie), first),
        Case("plain.bmp", bmp, PIXELS),
        Case("palette.bmp", encode(palette, "BMP"), np.asarray(palette.convert("RGB"))),
        Case("plain.tiff", tiff, PIXELS),
        Case("lzw.tiff", encode(PICTURE, "TIFF", compression="tiff_lzw"), PIXELS),
        Case("deflate.tiff", encode(PICTURE, "TIFF", compression="tiff_adobe_deflate"), PIXELS),
        Case("jpeg.tiff", encode(PICTURE, "TIFF", compression="jpeg", quality=95), PIXELS, 2),
        Case("rgba.tiff", encode(half, "TIFF"), HALF),
        Case("cmyk.tiff", encode(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
        Case("grey16.tiff", encode(Image.fromarray(wide), "TIFF"), GREY_PIXELS),
        Case("grey16-big.tiff", _big_endian_tiff(wide), GREY_PIXELS),
        Case("lab.tiff", encode(PICTURE.convert("LAB"), "TIFF"), PIXELS, 3),
        Case("exif.tiff", encode(stored_as(6), "TIFF", exif=exif(6)), PIXELS),
        Case("pages.tiff", encode(frames[0], "TIFF", **movie), first),
        Case("plain.avif", avif, PIXELS, 4),
        Case("animated.avif", encode(frames[0], "AVIF", quality=100, **movie), first, 2),
        Case("one-pixel.png", encode(PICTURE.crop((0, 0, 1, 1)), "PNG"), PIXELS[:1, :1]),
        Case("line.png", encode(Image.new("RGB", (100, 1)), "PNG"), np.zeros((1, 100, 3), np.uint8)),
        # Bytes damaged inside a JPEG's data decode to a wrong picture: no decoder can tell, only a hash could.
        Case("damaged-inside.jpg", bytes(damaged_jpeg), PIXELS, 255),
    ]
    good += [
        Case(f"exif{turn}.jpg", encode(stored_as(turn), "JPEG", quality=95, subsampling=0, exif=exif(turn)), PIXELS, 2)
        for turn in range(2, 9)
    ]
    bad = {
        "nothing.jpg": (b"", "empty"),
        "random.jpg": (np.random.default_rng(0).bytes(5000), "format"),
        "zeros.jpg": (bytes(5000), "format"),
        "page.jpg": (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", "format"),
        "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "format"),
        "document.jpg": (b"%PDF-1.4\n1 0 obj<<>>endobj\n%%EOF", "format"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "format"),
        "portable.jpg": (encode(PICTURE, "PPM"), "format"),
        "icon.jpg": (encode(PICTURE, "ICO"), "format"),
        "jpeg2000.jpg": (encode(PICTURE, "JPEG2000"), "format"),
        "targa.jpg": (encode(PICTURE, "TGA"), "format"),
        "heic.jpg": (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
            "corrupt" if importlib.util.find_spec("pillow_heif") else "format",
        ),
        "start-only.jpg": (b"\xff\xd8\xff", "corrupt"),
        "header-only.png": (plain[:33], "corrupt"),
        "signature-only.png": (plain[:8], "corrupt"),
        "no-width.png": (png(b"\0", 0, 1, 8, 0), "corrupt"),
        "header-only.gif": (gif[:13], "corrupt"),
        "loop.tiff": (tiff_loop(), "corrupt"),
        "damaged-inside.png": (bytes(damaged_png), "corrupt"),
        "damaged-text.png": (damaged_text, "corrupt"),
        "text-bomb.png": (
            plain[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9)) + plain[33:],
            "corrupt",
        ),
        "bomb-170-million.png": (bomb_png(13_000), "too-big"),
        "bomb-900-million.png": (bomb_png(30_000), "too-big"),
        "lying-12000.jpg": (lying_jpeg(12_000), "too-big"),
        "lying-65500.jpg": (lying_jpeg(65_500), "too-big"),
        "tall.png": (encode(Image.new("RGB", (1, 20_000)), "PNG"), "aspect"),
        "long.jpg": (encode(Image.new("RGB", (20_000, 1)), "JPEG"), "aspect"),
        "line-101.png": (encode(Image.new("RGB", (101, 1)), "PNG"), "aspect"),
        "float.tiff": (encode(Image.fromarray(PIXELS[..., 0].astype(np.float32) / 255), "TIFF"), "depth"),
        "integer32.tiff": (encode(Image.fromarray(PIXELS[..., 0].astype(np.int32) * 1000), "TIFF"), "depth"),
    }
    for share in (50, 70, 90, 99):
        bad[f"cut-{share}.jpg"] = (jpeg[: len(jpeg) * share // 100], "truncated")
    for name, data in (("png", plain), ("gif", gif), ("bmp", bmp), ("tiff", tiff)):
        bad[f"cut-50.{name}"] = (data[: len(data) // 2], "truncated")
    bad["cut-early.jpg"] = (jpeg[:60], "truncated")
    for name, data in (("png", plain), ("webp", webp), ("avif", avif)):
        bad[f"cut-early.{name}"] = (data[: 30 + len(data) // 20], "corrupt")
    for name, data in (("webp", webp), ("avif", avif)):
        bad[f"cut-50.{name}"] = (data[: len(data) // 2], "corrupt")
    return good + [Case(name, data, reason) for name, (data, reason) in bad.items()]


def _luma() -> np.ndarray:
    return np.repeat(np.asarray(PICTURE.convert("L"))[..., None], 3, axis=-1)


def _keyed_palette() -> Image.Image:
    """Grey levels as a palette whose entry 0 is transparent, and covers the left half."""
    image = Image.fromarray(np.where(LEFT, 0, np.maximum(PIXELS[..., 0], 1)).astype(np.uint8), "L").convert("P")
    image.putpalette(bytes(level for level in range(256) for _ in range(3)))
    return image


def _big_endian_tiff(wide: np.ndarray) -> bytes:
    entries = [
        (256, WIDTH),
        (257, HEIGHT),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (278, HEIGHT),
        (279, wide.size * 2),
    ]
    data = wide.astype(">u2").tobytes()
    directory = struct.pack(">H", len(entries))
    directory += b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in entries)
    return b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + directory + bytes(4)
