"""Words in a figure: as they are spelt, in a font that has their letters, and no wider than their room."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

_DPI = 100
_RULER = RendererAgg(1, 1, _DPI)


@contextmanager
def as_spelt(words: Iterable[str]) -> Iterator[set[str]]:
    """In here a figure shows any letter, from any installed font, and ``$`` is one; gives the letters that none has."""
    families, boxes = fonts_for({letter for text in words for letter in text})
    family = [*matplotlib.rcParams["font.family"], *families]
    with matplotlib.rc_context({"text.parse_math": False, "font.family": family}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # one for each letter and size; ours are in `boxes`
        yield boxes


def fonts_for(letters: set[str]) -> tuple[list[str], set[str]]:
    """Installed font families that have what the default font lacks; and the letters that none of them has."""
    charmap = font_manager.get_font(font_manager.findfont(FontProperties())).get_charmap()
    missing = {letter for letter in letters if letter.isprintable() and ord(letter) not in charmap}
    families = []
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.style != "normal", entry.name)):
        if not missing:
            break
        if Path(entry.fname).is_relative_to(matplotlib.get_data_path()):
            continue  # besides the default they are made for formulas, or for boxes
        try:
            charmap = font_manager.get_font(entry.fname).get_charmap()
        except (OSError, RuntimeError):  # removed since matplotlib listed it
            continue
        if has := {letter for letter in missing if ord(letter) in charmap}:
            families.append(entry.name)
            missing -= has
    return families, missing


def width(words: str, size: float, weight: str = "normal") -> float:
    """Width of a line in inches."""
    how = FontProperties(size=size, weight=weight)
    return float(_RULER.get_text_width_height_descent(words, how, False)[0]) / _DPI


def fit(words: str, room: float, size: float, weight: str = "normal", lines: int = 1) -> str:
    """Break words into lines of at most `room` inches; where they do not suffice, the middle of a line gives way.

    A name is told by its beginning, and two names of one series, or of one genus, by their ends.
    """
    rest, made = words.encode("utf-8", "replace").decode().split(), []
    while rest:
        count = len(rest)
        while len(made) + 1 < lines and count > 1 and width(" ".join(rest[:count]), size, weight) > room:
            count -= 1
        made.append(_shorten(" ".join(rest[:count]), room, size, weight))
        rest = rest[count:]
    return "\n".join(made)


def _shorten(line: str, room: float, size: float, weight: str) -> str:
    short, kept = line, len(line)
    while width(short, size, weight) > room and kept > 1:
        kept -= 1
        short = f"{line[: (kept + 1) // 2].rstrip()}…{line[len(line) - kept // 2 :].lstrip()}"
    return short
