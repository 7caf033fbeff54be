"""Makes the image–text pairs: pictures of 72 × 72 pixels, and for each the words that go with it.

Three kinds of concept:
    emoji   one Unicode emoji (skin tones left out), drawn in up to nine designs; its words are its CLDR name and the
            keywords of emojilib and emojibase. Unicode's groups are no words: the sample task is about them.
    icon    one named pictogram, mostly monochrome.
    glyph   a digit or a letter in one of many typefaces.

12 % of the emoji are held out by name, all variants of a name together (a running man, woman and person are one):
no design's picture of them is a training pair, nor is an icon of the same name. One design is held out whole.
"""

import dataclasses
import hashlib
import io
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image, ImageDraw, ImageFont

from data.pretrain.fetch import Package, packages, read, read_json

SIZE = 72  # pixels of a stored picture's side
HELD_OUT_PERCENT = 12

_DROPPED_CATEGORY = re.compile(r"brand|logo|social", re.IGNORECASE)  # trade marks
_STYLE = re.compile(r"-(outline|filled|fill|duotone|solid|regular|flat|color|\d\d)$")
_SKIPPED_STYLE = re.compile(r"-(bold|light|thin|off|slash)$")  # near-copies
_TONE = re.compile(r"skin-tone|-tone\b|tone[1-5]")


Drawn = tuple[str, "Concept", np.ndarray, bool]  # design, concept, picture, whether it is of one colour


@dataclasses.dataclass(frozen=True)
class Concept:
    """What several pictures show.

    kind: "emoji", "icon" or "glyph".
    name: unique among the concepts of its kind.
    words: other words for it, the first ones the best.
    group: of an emoji, Unicode's group; else empty. It is for the sample task, never for a caption.
    held_out: no training picture shows it.
    """

    kind: str
    name: str
    words: tuple[str, ...]
    group: str = ""
    held_out: bool = False


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All pictures.

    images: [N, 72, 72, 4] uint8, RGBA, not premultiplied; memory-mapped.
    concept_of: [N] index into `concepts`.
    design_of: [N] index into `designs`.
    monochrome: [N] whether a picture is a shape of one colour, which may be any.
    """

    images: np.ndarray
    concept_of: np.ndarray
    design_of: np.ndarray
    monochrome: np.ndarray
    concepts: list[Concept]
    designs: list[str]

    @property
    def unseen(self) -> np.ndarray:
        """[N] whether training leaves a picture out: its design or its name is held out."""
        held_out = {package.design for package in packages("held out")}
        of_design = np.array([design in held_out for design in self.designs])
        of_name = np.array([concept.held_out for concept in self.concepts])
        return np.asarray(of_design[self.design_of] | of_name[self.concept_of])


def load_pairs(folder: Path) -> Pairs:
    """What `make_pairs` wrote."""
    meta = json.loads((folder / "pairs.json").read_text())
    concepts = [Concept(**{**fields, "words": tuple(fields["words"])}) for fields in meta["concepts"]]
    with np.load(folder / "pairs.npz") as arrays:
        columns = {name: arrays[name] for name in ("concept_of", "design_of", "monochrome")}
    return Pairs(np.load(folder / "images.npy", mmap_mode="r"), **columns, concepts=concepts, designs=meta["designs"])


def make_pairs(archives: Path, folder: Path) -> Pairs:
    """Draws every picture once, into folder/images.npy with pairs.npz and pairs.json beside it."""
    if not (folder / "pairs.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        emoji = read_emoji(archives)
        index: dict[tuple[str, str], int] = {}
        concepts: list[Concept] = []
        designs: list[str] = []
        images, columns = [], []
        for design, concept, picture, is_monochrome in _pictures(archives, emoji):
            key = (concept.kind, concept.name)
            if key not in index:
                index[key] = len(concepts)
                concepts.append(concept)
            if design not in designs:
                print(f"{len(images):6d} pictures; drawing {design}", flush=True)
                designs.append(design)
            images.append(picture)
            columns.append((index[key], designs.index(design), is_monochrome))
        np.save(folder / "images.npy", np.stack(images))
        concept_of, design_of, monochrome = (np.array(column) for column in zip(*columns, strict=True))
        np.savez(folder / "pairs.npz", concept_of=concept_of, design_of=design_of, monochrome=monochrome)
        content = {"concepts": [dataclasses.asdict(concept) for concept in concepts], "designs": designs}
        (folder / "pairs.json").write_text(json.dumps(content))
    return load_pairs(folder)


@dataclasses.dataclass(frozen=True)
class Emoji:
    """The emoji by all that packages call them: code points in lower-case hexadecimal, and names."""

    by_code: dict[str, Concept]
    by_name: dict[str, Concept]

    def find(self, name: str, codes: str | None) -> Concept | None:
        if codes is not None and (key := _code_key(codes)) in self.by_code:
            return self.by_code[key]
        return self.by_name.get(_name_key(name))


def read_emoji(archives: Path) -> Emoji:
    """The emoji of emojibase-data (Unicode's, from CLDR), with emojilib's keywords."""
    by_package = {package.name: package for package in packages("names")}
    base = by_package["emojibase-data"]
    groups = {g["order"]: g["message"] for g in read_json(base, archives, "en/messages.json")["groups"]}
    keywords = read_json(by_package["emojilib"], archives, "dist/emoji-en-US.json")
    titles = read_json(by_package["unicode-emoji-json"], archives, "data-by-emoji.json")
    by_code: dict[str, Concept] = {}
    by_name: dict[str, Concept] = {}
    plain = {emoji.replace("\ufe0f", ""): emoji for emoji in titles}
    for entry in read_json(base, archives, "en/data.json"):
        if groups.get(entry.get("group")) in (None, "components"):
            continue
        title = titles.get(plain.get(entry["emoji"].replace("\ufe0f", ""), ""))
        if title is None:
            continue
        others = keywords.get(plain[entry["emoji"].replace("\ufe0f", "")], [])
        words = [word.replace("_", " ").lower() for word in [*others, *entry.get("tags", [])]]
        words = [word for word in dict.fromkeys(words) if re.fullmatch(r"[a-z0-9][a-z0-9 '&.-]*", word)]
        name = entry["label"].lower()
        concept = Concept("emoji", name, tuple(w for w in words if w != name), title["group"], is_held_out(name))
        by_code[_code_key(entry["hexcode"])] = concept
        for alias in [entry["label"], title["name"], *others[:1]]:
            by_name.setdefault(_name_key(alias), concept)
    return Emoji(by_code, by_name)


def is_held_out(name: str) -> bool:
    """Whether an emoji's name is held out, decided by its stem, so that all its variants go together."""
    return int(hashlib.sha256(name_stem(name).encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def name_stem(name: str) -> str:
    """An emoji's name without its person, or the whole name where nothing would be left."""
    stem = re.sub(r"[’']s\b", "", name.split(": medium")[0])
    persons = r"\b(man|woman|person|men|women|people|boy|girl)\b"
    return " ".join(re.findall(r"[a-z0-9]+", re.sub(persons, "", stem))) or name


def icon_svg(icons: dict[str, Any], name: str) -> str:
    """One icon of an Iconify JSON file as an SVG picture, in a square of its own size."""
    icon = icons["icons"][name]
    sides = {side: icon.get(side, icons.get(side, 16)) for side in ("width", "height")}
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {sides['width']} {sides['height']}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{sides["width"]}" height="{sides["height"]}">{icon["body"]}</svg>'
    )


def draw_svg(svg: str, size: int = SIZE) -> np.ndarray | None:
    """[size, size, 4] uint8 RGBA, the picture as large as fits, in the middle; None if nothing of it is to be seen."""
    try:
        content = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(content)).convert("RGBA")
    except ValueError:
        return None
    if picture.size != (size, size):
        scale = size / max(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        square = Image.new("RGBA", (size, size))
        square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        picture = square
    pixels = np.asarray(picture)
    return pixels if (pixels[..., 3] > 32).mean() > 0.01 else None


def emoji_pictures(
    package: Package, archives: Path, emoji: Emoji, size: int = SIZE
) -> Iterator[tuple[Concept, np.ndarray]]:
    """Every emoji of one design once, without skin tones."""
    icons = read_json(package, archives, "icons.json")
    codes = {name: code for code, name in _chars(package, archives).items()}
    seen = set()
    for name in icons["icons"]:
        concept = None if _TONE.search(name) else emoji.find(name, codes.get(name))
        if concept is None or concept.name in seen:
            continue
        picture = draw_svg(icon_svg(icons, name))
        if picture is not None:
            seen.add(concept.name)
            yield concept, picture


def _pictures(archives: Path, emoji: Emoji) -> Iterator[Drawn]:
    """Those of all packages."""
    for package in packages("emoji", "held out"):
        is_monochrome = package.design.endswith(("-monotone", "-high-contrast"))
        for concept, picture in emoji_pictures(package, archives, emoji):
            yield package.design, concept, picture, is_monochrome
    flags = {_country(concept_code): concept for concept_code, concept in emoji.by_code.items()}
    for package in packages("flags"):
        icons = read_json(package, archives, "icons.json")
        for name in icons["icons"]:
            concept = flags.get(name.removesuffix("-4x3"))
            if name and concept is not None and (picture := draw_svg(icon_svg(icons, name))) is not None:
                yield package.design, concept, picture, False
    held_out = {key for key, concept in emoji.by_name.items() if concept.held_out}
    for package in packages("icons"):
        yield from _icon_pictures(package, archives, held_out)
    for package in packages("font"):
        yield from _glyph_pictures(package, archives)


def _icon_pictures(package: Package, archives: Path, held_out: set[str]) -> Iterator[Drawn]:
    icons = read_json(package, archives, "icons.json")
    is_monochrome = not read_json(package, archives, "info.json").get("palette", False)
    categories = read_json(package, archives, "metadata.json").get("categories", {})
    dropped = {name for category, names in categories.items() if _DROPPED_CATEGORY.search(category) for name in names}
    for name, icon in icons["icons"].items():
        if icon.get("hidden") or name in dropped or re.search(r"(^|-)(brand|logo)(-|$)", name):
            continue
        if _SKIPPED_STYLE.search(name):
            continue
        plain = _STYLE.sub("", _STYLE.sub("", name)).replace("-", " ")
        if len(plain) < 2 or _name_key(plain) in held_out:
            continue
        picture = draw_svg(icon_svg(icons, name))
        if picture is not None:
            yield package.design, Concept("icon", plain, ()), picture, is_monochrome


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _glyph_pictures(package: Package, archives: Path) -> Iterator[Drawn]:
    content = read(package, archives, f"files/{package.design}-latin-400-normal.woff2")
    font = ImageFont.truetype(io.BytesIO(content), 200)
    for character in string.digits + string.ascii_letters:
        if character.isdigit():
            words = (
                f"the number {_NUMBERS[int(character)]}",
                f"number {character}",
                f"digit {_NUMBERS[int(character)]}",
            )
            concept = Concept("glyph", f"digit {character}", words)
        else:
            case = "capital" if character.isupper() else "small"
            concept = Concept("glyph", f"{case} letter {character.lower()}", (f"letter {character.lower()}",))
        canvas = Image.new("L", (600, 600))
        ImageDraw.Draw(canvas).text((300, 300), character, fill=255, font=font, anchor="mm")
        box = canvas.getbbox()
        if box is None:
            continue
        glyph = canvas.crop(box)
        scale = (SIZE - 4) / max(glyph.size)
        glyph = glyph.resize(
            (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.Resampling.BOX
        )
        pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
        top, left = (SIZE - glyph.height) // 2, (SIZE - glyph.width) // 2
        pixels[top : top + glyph.height, left : left + glyph.width, 3] = np.asarray(glyph)
        yield package.design, concept, pixels, True


def _chars(package: Package, archives: Path) -> dict[str, str]:
    try:
        return dict(read_json(package, archives, "chars.json"))
    except KeyError:
        return {}


def _code_key(codes: str) -> str:
    return "-".join(part for part in codes.lower().split("-") if part != "fe0f")


def _name_key(name: str) -> str:
    key = re.sub(r"[^a-z0-9]", "", name.lower().replace("&", "and"))
    return re.sub(r"^flagfor", "flag", key)


def _country(codes: str) -> str:
    """The two letters of a flag's code points, as ISO 3166 has them, else nothing."""
    points = [int(part, 16) - 0x1F1E6 for part in codes.split("-")]
    is_country = len(points) == 2 and all(0 <= point < 26 for point in points)
    return "".join(chr(ord("a") + point) for point in points) if is_country else ""
