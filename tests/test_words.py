"""Words in a figure: in a font that has them, as they are spelt, in the room that they have."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from recipe.words import as_spelt, fit, fonts_for, width

CAT = "\u732b"  # no letter of the fonts that come with matplotlib


@pytest.fixture
def cat_font(tmp_path):
    """A font that has one letter, among the installed ones."""
    from fontTools.fontBuilder import FontBuilder  # matplotlib brings it
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (900, 700), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord(CAT): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "cat": (3000, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(tmp_path / "cats.ttf")
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "cats.ttf")
    yield "Cats"
    font_manager.fontManager.ttflist[:] = before
    font_manager._get_font.cache_clear()  # the file is gone after the test


def draw(words):
    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    text = figure.text(0, 0, words)
    canvas.draw()
    return text.get_window_extent().width


def test_a_letter_comes_from_an_installed_font_that_has_it(cat_font):
    assert fonts_for(set(f"a {CAT}\n")) == ([cat_font], set())
    assert fonts_for(set("abc")) == ([], set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with as_spelt([f"{CAT} (cat)"]) as boxes:
            assert boxes == set()
            assert width(CAT, 10) == pytest.approx(3 * 10 / 72, abs=0.02)  # as wide as this font makes it
            draw(CAT)


def test_letters_that_no_font_has_are_told_once_and_drawn_without_a_warning(recwarn):
    with as_spelt(["dog", f"{CAT}{CAT}"]) as boxes:
        assert boxes == {CAT}
        draw(f"{CAT} {CAT}")
    assert not recwarn


def test_a_font_that_is_gone_is_passed_over(cat_font, tmp_path):
    (tmp_path / "cats.ttf").unlink()
    font_manager._get_font.cache_clear()
    assert fonts_for({CAT}) == ([], {CAT})


@pytest.mark.parametrize("words", ["a$_$b.jpg", "cost $5 to $6", "$", "$x^2$"])
def test_a_dollar_begins_no_formula(words):
    with as_spelt([words]):
        assert draw(words) == pytest.approx(100 * width(words, 10), abs=1)
        assert draw(words) > 0.7 * draw(words.replace("$", "S"))


@given(st.text(st.characters(exclude_categories=["C", "M"], max_codepoint=0x24F), max_size=60), st.floats(0.3, 3))
def test_words_that_fit_stay_and_others_are_cut_to_their_room(words, room):
    words = " ".join(words.split())
    with as_spelt([]):
        short = fit(words, room, 8)
        assert width(short, 8) <= room
        assert short == words if width(words, 8) <= room else "…" in short


def test_the_two_ends_of_a_name_stay():
    with as_spelt([]):
        short = fit("IMG_20240812_164533_in_the_mountains_final.jpg", 2, 8)
        assert short.startswith("IMG_20240812") and short.endswith("final.jpg") and short.count("…") == 1
        assert width(short, 8) > 1.8  # no shorter than it must be
        assert fit("", 1, 8) == "" and fit("two\nlines\t.jpg", 3, 8) == "two lines .jpg"
        assert fit("not utf-8 \udcff", 3, 8) == "not utf-8 ?"


def test_lines_break_between_words_and_only_the_last_one_takes_more_than_it_holds():
    name = "North American river otter (Lontra canadensis)"
    with as_spelt([]):
        first, second = fit(name, 2, 10, "bold", lines=2).split("\n")
        assert first == "North American river" and second.startswith("otter (Lon") and second.endswith("sis)")
        whole = fit(name, 1, 8, lines=99)
        assert whole.replace("\n", " ") == name and all(width(line, 8) <= 1 for line in whole.split("\n"))
        assert fit("one word", 2, 8, lines=2) == "one word"
