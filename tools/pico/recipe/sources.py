"""Where letters, words and colours come from: installed packages, all freely licensed.

Fonts come from the `fontpkg-*` packages (Open Font Licence) and from matplotlib (DejaVu), words
from `mnemonic` (MIT) and `xkcdpass` (the EFF's list, CC BY). `requirements.txt` above this folder
pins them. Eight families and a tenth of the words never appear in training; the exam uses them.
Photographs, for one set of questions only, come from `scikit-image`; no training sees them.
"""

import colorsys
import importlib.util
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from PIL import Image, ImageFont

# fmt: off
TRAINED_FAMILIES = (
    "abel", "alegreya_sans", "archivo_narrow", "arimo", "arvo", "atkinson_hyperlegible", "barlow",
    "bitter", "cabin", "crimson_text", "dm_mono", "dm_sans", "domine", "eb_garamond", "fira_code",
    "fira_sans", "fredoka", "ibm_plex_sans", "ibm_plex_serif", "inconsolata", "inter",
    "jetbrains_mono", "josefin_sans", "kanit", "lato", "libre_baskerville", "libre_franklin",
    "lora", "manrope", "merriweather", "montserrat", "noto_sans", "noto_serif", "nunito",
    "open_sans", "oswald", "oxygen", "playfair_display", "pt_sans", "quicksand", "raleway",
    "roboto", "roboto_mono", "roboto_slab", "rubik", "source_code_pro", "source_sans_3",
    "space_grotesk", "work_sans",
)
UNSEEN_FAMILIES = (
    "exo_2", "ibm_plex_mono", "karla", "poppins", "pt_serif", "titillium_web", "vollkorn",
    "zilla_slab",
)
DEJAVU = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif")

FEW_WORDS = (
    "apple", "bridge", "coffee", "door", "engine", "forest", "garden", "house", "island", "jungle",
)
# fmt: on


@dataclass(frozen=True)
class Face:
    """One font file, at one weight where the file holds several."""

    path: str | None
    """None: the font that Pillow itself brings (Aileron, public domain)."""
    weight: int | None = None

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The face at a size in pixels."""
        return _load_face(self, size)

    def length(self, text: str, size: int) -> float:
        """About how wide a text is: without kerning, but fast, for it remembers each character."""
        advances = _advances(self, size)
        return sum([advances[char] for char in text])


class _Advances(dict):
    """Widths of the characters of one face at one size, measured when first asked for."""

    def __init__(self, font: ImageFont.FreeTypeFont):
        self.font = font

    def __missing__(self, char: str) -> float:
        self[char] = self.font.getlength(char)
        return self[char]


@lru_cache(maxsize=2048)
def _advances(face: Face, size: int) -> _Advances:
    return _Advances(face.at(size))


@lru_cache(maxsize=2048)
def _load_face(face: Face, size: int) -> ImageFont.FreeTypeFont:
    if face.path is None:
        return ImageFont.load_default(size)
    font = ImageFont.truetype(face.path, size, layout_engine=ImageFont.Layout.BASIC)
    if face.weight is not None:
        axes = font.get_variation_axes()
        font.set_variation_by_axes(
            [
                min(max(face.weight, axis["minimum"]), axis["maximum"])
                if axis["name"] in (b"Weight", "Weight")
                else axis["default"]
                for axis in axes
            ]
        )
    return font


@dataclass(frozen=True)
class Sources:
    """The faces and words that pictures may be made of."""

    faces: tuple[Face, ...]
    words: tuple[str, ...]

    @classmethod
    def trained(cls) -> "Sources":
        """What training uses."""
        return cls(_faces(TRAINED_FAMILIES) + _dejavu(), _words(unseen=False))

    @classmethod
    def with_unseen_fonts(cls) -> "Sources":
        """Trained words in families that training never shows."""
        return cls(_faces(UNSEEN_FAMILIES), _words(unseen=False))

    @classmethod
    def with_unseen_words(cls) -> "Sources":
        """Words that training never shows in trained families."""
        return cls(_faces(TRAINED_FAMILIES) + _dejavu(), _words(unseen=True))

    @classmethod
    def minimal(cls) -> "Sources":
        """Enough to run the recipe where no font and word packages are installed."""
        return cls((Face(None),), FEW_WORDS)


def _package(name: str, wanted: str = "-r tools/pico/requirements.txt") -> Path:
    """Where an installed package lies; it is not imported.

    Args:
        wanted: what has pip install it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the package {name.replace('_', '-')} is not installed; run: pip install {wanted}"
        )
    return Path(spec.submodule_search_locations[0])


def _faces(families: tuple[str, ...]) -> tuple[Face, ...]:
    """Regular and bold upright faces of each family; families weigh the same."""
    faces = []
    for family in families:
        files = sorted((_package(f"fontpkg_{family}") / "files").glob("*.ttf"))
        upright = [file for file in files if "Italic" not in file.name]
        variable = [file for file in upright if "[" in file.name]
        if variable:
            faces += [Face(str(variable[0]), weight) for weight in (400, 700)]
            continue
        regular = [f for f in upright if f.stem.endswith("-Regular")]
        bold = [f for f in upright if f.stem.endswith("-Bold")]
        faces += [Face(str(file)) for file in (regular + (bold or regular))]
    return tuple(faces)


def _dejavu() -> tuple[Face, ...]:
    """The fonts of many a Linux screen, three times so that screenshots are not a rarity."""
    folder = _package("matplotlib") / "mpl-data" / "fonts" / "ttf"
    return tuple(Face(str(folder / f"{name}.ttf")) for name in DEJAVU) * 3


@lru_cache(maxsize=2)
def _words(unseen: bool) -> tuple[str, ...]:
    """Lower-case English words of 2 to 10 letters, the trained or the kept-aside ones.

    The choice hangs on the word alone, so that no change of the lists moves a word across.
    """
    lists = [
        _package("mnemonic") / "wordlist" / "english.txt",
        _package("xkcdpass") / "static" / "eff-long",
    ]
    words = {word for path in lists for word in path.read_text(encoding="utf-8").split()}
    plain = sorted(w for w in words if w.isascii() and w.isalpha() and w.islower() and len(w) <= 10)
    return tuple(word for word in plain if (zlib.crc32(word.encode()) % 10 == 0) == unseen)


# Hue in degrees, saturation and value: the ranges that a name covers, and the web's own colours.
COLOR_RANGES = {
    "red": ((-8, 8), (0.78, 1), (0.75, 1)),
    "orange": ((23, 38), (0.85, 1), (0.92, 1)),
    "yellow": ((50, 62), (0.75, 1), (0.9, 1)),
    "green": ((95, 150), (0.6, 1), (0.4, 0.9)),
    "cyan": ((175, 188), (0.65, 1), (0.85, 1)),
    "blue": ((208, 242), (0.65, 1), (0.5, 1)),
    "purple": ((268, 295), (0.55, 1), (0.4, 0.85)),
    "pink": ((325, 348), (0.28, 0.6), (0.95, 1)),
    "brown": ((18, 30), (0.6, 0.88), (0.36, 0.6)),
    "black": ((0, 360), (0, 0.2), (0, 0.1)),
    "white": ((0, 360), (0, 0.02), (0.97, 1)),
    "gray": ((0, 360), (0, 0.05), (0.42, 0.68)),
}
WEB_COLORS = {
    "red": [(255, 0, 0), (220, 20, 60), (229, 57, 53)],
    "orange": [(255, 165, 0), (255, 140, 0), (251, 140, 0)],
    "yellow": [(255, 255, 0), (255, 215, 0), (253, 216, 53)],
    "green": [(0, 128, 0), (0, 255, 0), (34, 139, 34), (76, 175, 80)],
    "cyan": [(0, 255, 255), (0, 188, 212)],
    "blue": [(0, 0, 255), (30, 144, 255), (33, 150, 243), (0, 0, 139), (65, 105, 225)],
    "purple": [(128, 0, 128), (138, 43, 226), (156, 39, 176), (75, 0, 130)],
    "pink": [(255, 192, 203), (255, 105, 180), (244, 143, 177)],
    "brown": [(165, 42, 42), (139, 69, 19), (121, 85, 72)],
    "black": [(0, 0, 0), (33, 33, 33)],
    "white": [(255, 255, 255)],
    "gray": [(128, 128, 128), (169, 169, 169), (105, 105, 105)],
}
COLORS = tuple(COLOR_RANGES)
RGB = tuple[int, int, int]


def sample_rgb(rng: Random, name: str) -> RGB:
    """A colour that everyone would call by this name: often the web's own, else from its range."""
    if rng.random() < 0.4:
        return rng.choice(WEB_COLORS[name])
    hue, saturation, value = (rng.uniform(*limits) for limits in COLOR_RANGES[name])
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def contrast(a: RGB, b: RGB) -> float:
    """How far apart two colours look, 0 to about 1: green counts most, blue least."""
    return (
        sum(w * ((p - q) / 255) ** 2 for w, p, q in zip((0.3, 0.5, 0.2), a, b, strict=True)) ** 0.5
    )


PHOTOGRAPHS = {
    "camera.png": "CC0 by Lav Varshney",
    "chelsea.png": "CC0 by Stefan van der Walt",
    "coffee.png": "CC0 by Rachel Michetti",
    "grass.png": "CC0, texture by linolafett",
    "gravel.png": "CC0, Gravel04 of CC0Textures",
    "hubble_deep_field.jpg": "public domain, NASA",
    "rocket.jpg": "public domain, SpaceX",
}
"""Photographs that lie in the wheel of scikit-image, and their licences as its documentation has
them. Left out: those that hold text (astronaut, motorcycle, page), plain shapes (brick, coins,
retina) or no word about a licence (moon)."""


@lru_cache(maxsize=len(PHOTOGRAPHS))
def photograph(name: str) -> Image.Image:
    """One of `PHOTOGRAPHS`, RGB."""
    return Image.open(
        _package("skimage", "--no-deps -r tools/pico/photographs.txt") / "data" / name
    ).convert("RGB")
