"""Palette, overlays, and label maps that survive the disk."""

import builtins
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from ffr import draw

label_maps = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9))


# Palette ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "colour"),
    [
        (0, (0, 0, 0)),
        (1, (128, 0, 0)),
        (2, (0, 128, 0)),
        (4, (0, 0, 128)),
        (8, (64, 0, 0)),
        (15, (192, 128, 128)),
        (20, (0, 64, 128)),
        (64, (32, 0, 0)),
        (255, (224, 224, 192)),
    ],
)
def test_the_palette_is_that_of_voc(index, colour):
    assert tuple(draw.palette()[index]) == colour
    assert draw.palette().dtype == np.uint8


def test_no_two_labels_share_a_colour():
    assert len(np.unique(draw.palette(), axis=0)) == 256


def test_a_short_palette_is_the_head_of_the_long_one():
    np.testing.assert_array_equal(draw.palette(21), draw.palette()[:21])


@pytest.mark.parametrize("num_labels", [0, 257])
def test_a_palette_of_impossible_length_is_refused(num_labels):
    with pytest.raises(ValueError, match=rf"palette: expected `num_labels` in \[1, 256\], got {num_labels}"):
        draw.palette(num_labels)


# Pictures ---------------------------------------------------------------------------------------------------------


@given(label_maps)
def test_every_pixel_has_the_colour_of_its_label(label):
    colours = draw.colorize(torch.from_numpy(label))
    assert colours.shape == (*label.shape, 3)
    for row, column in np.ndindex(label.shape):
        assert tuple(colours[row, column]) == tuple(draw.palette()[label[row, column]])


def test_an_overlay_mixes_objects_and_leaves_background_alone():
    image = torch.full((3, 1, 3), 100, dtype=torch.uint8)
    mixed = draw.overlay(image, torch.tensor([[0, 1, 255]]), alpha=0.25)
    assert mixed.tolist() == [[[100, 100, 100], [107, 75, 75], [131, 131, 123]]]  # 0.75 * 100 + 0.25 * (224, 224, 192)
    assert mixed.dtype == np.uint8


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_opacity_runs_from_the_image_to_the_colours(alpha):
    image = torch.rand(3, 5, 4)
    label = torch.randint(1, 256, (5, 4))
    expected = (image.permute(1, 2, 0) * 255).round().numpy() if alpha == 0 else draw.colorize(label)
    np.testing.assert_array_equal(draw.overlay(image, label, alpha=alpha), expected)


@given(st.floats(0, 1))
def test_an_overlay_of_bytes_is_the_mixture_rounded_for_every_value_and_label(alpha):
    value, label = np.mgrid[:256, :256]
    image = torch.from_numpy(np.stack([value, 255 - value, value[::-1]]).astype(np.uint8))
    under, over = image.permute(1, 2, 0).double().numpy(), draw.palette()[label]
    expected = np.where(label[..., None] > 0, under + (over - under) * alpha, under)
    np.testing.assert_array_equal(draw.overlay(image, label, alpha), np.rint(expected))


def test_an_overlay_of_bytes_takes_little_more_memory_than_the_picture():
    image, label = torch.zeros(3, 1000, 1000, dtype=torch.uint8), torch.zeros(1000, 1000, dtype=torch.uint8)
    tracemalloc.start()
    picture = draw.overlay(image, label)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * picture.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_float_image_and_its_bytes_look_the_same(dtype):
    pixels = torch.tensor([0, 255]).view(1, 1, 2).expand(3, 1, 2)
    label = torch.tensor([[1, 1]])
    as_float = draw.overlay(pixels.to(dtype) / 255, label)
    np.testing.assert_array_equal(as_float, draw.overlay(pixels.to(torch.uint8), label))


def test_drawing_edits_neither_image_nor_label_and_accepts_what_needs_a_gradient():
    image = torch.rand(3, 4, 4, requires_grad=True)
    label = torch.randint(0, 5, (4, 4))
    before = image.detach().clone(), label.clone()
    draw.overlay(image, label)
    draw.heatmap(image[0], image)
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])


def test_warmer_is_brighter_all_the_way():
    colours = draw.heatmap(torch.linspace(0, 1, 101)[None])[0].astype(float)
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()
    assert colours[0].tolist() == [10, 8, 46]
    assert colours[25].tolist() == [86, 26, 124]
    assert colours[50].tolist() == [192, 52, 92]
    assert colours[75].tolist() == [246, 146, 42]
    assert colours[100].tolist() == [255, 242, 170]


def test_a_default_device_does_not_reach_the_picture():
    cam = torch.linspace(0, 1, 20).view(4, 5)
    with torch.device("meta"):
        pictures = [draw.heatmap(cam), draw.heatmap(cam.numpy())]
    assert all(np.array_equal(picture, draw.heatmap(cam)) for picture in pictures)


def test_a_cam_of_the_token_grid_is_stretched_over_its_image():
    cam = torch.tensor([[0.0, 1.0]])
    alone = draw.heatmap(cam, torch.zeros(3, 6, 8), alpha=1.0)
    assert alone.shape == (6, 8, 3)
    np.testing.assert_array_equal(alone[0, 0], draw.heatmap(cam)[0, 0])
    np.testing.assert_array_equal(alone[0, -1], draw.heatmap(cam)[0, -1])
    np.testing.assert_array_equal(alone[0, 1], alone[0, 0])  # out to half a token, the CAM is that of the token
    np.testing.assert_array_equal(alone[0], alone[5])
    half = draw.heatmap(cam, torch.zeros(3, 6, 8))
    np.testing.assert_allclose(half, alone / 2, atol=0.5)  # over black, by default at half opacity


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: draw.colorize(torch.rand(2, 2)),
            TypeError,
            "colorize: expected `label` of an integer dtype, got float32",
        ),
        (
            lambda: draw.colorize(torch.tensor([[0, 256]])),
            ValueError,
            r"colorize: expected `label` in 0\.\.255, got 0\.\.256",
        ),
        (lambda: draw.colorize(torch.tensor([[-1, 3]])), ValueError, r"got -1\.\.3"),
        (
            lambda: draw.overlay(torch.zeros(3, 4, 5), torch.zeros(5, 4).long()),
            ValueError,
            r"overlay: expected `label` of shape \(4, 5\) as `image`, got \(5, 4\)",
        ),
        (
            lambda: draw.overlay(torch.zeros(4, 5, 3), torch.zeros(4, 5).long()),
            ValueError,
            r"overlay: expected `image` of shape \(3, H, W\), got \(4, 5, 3\).*channels first",
        ),
        (
            lambda: draw.overlay(torch.full((3, 1, 1), 1.5), torch.zeros(1, 1).long()),
            ValueError,
            r"overlay: expected `image` as uint8 or float in \[0, 1\].*normalisation",
        ),
        (lambda: draw.overlay(torch.full((3, 1, 1), torch.nan), torch.zeros(1, 1).long()), ValueError, "float in"),
        (lambda: draw.overlay(torch.zeros(3, 1, 1).long(), torch.zeros(1, 1).long()), ValueError, "as uint8 or float"),
        (
            lambda: draw.overlay(np.zeros((3, 1, 1)), torch.zeros(1, 1).long()),
            TypeError,
            "to be a torch.Tensor, got ndarray",
        ),
        (
            lambda: draw.overlay(torch.zeros(3, 1, 1), torch.zeros(1, 1).long(), alpha=2),
            ValueError,
            "overlay: .*`alpha`",
        ),
        (
            lambda: draw.heatmap(torch.rand(1, 2, 2)),
            ValueError,
            r"heatmap: expected `cam` of shape \(h, w\).*one class",
        ),
        (
            lambda: draw.heatmap(torch.tensor([[1.1]])),
            ValueError,
            r"heatmap: expected `cam` in \[0, 1\].*normalize_cam",
        ),
        (lambda: draw.heatmap(torch.tensor([[-0.1]])), ValueError, "normalize_cam"),
        (lambda: draw.heatmap(torch.tensor([[torch.nan]])), ValueError, "normalize_cam"),
        (lambda: draw.heatmap(torch.zeros(2, 2), alpha=-1), ValueError, "heatmap: .*`alpha`"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Files ------------------------------------------------------------------------------------------------------------


@given(label=label_maps, dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_a_label_map_comes_back_as_it_went(tmp_path_factory, label, dtype):
    path = tmp_path_factory.mktemp("labels") / "label.png"
    draw.save_label(path, torch.from_numpy(label).to(dtype))
    back = draw.load_label(path)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, label)


def test_other_programs_see_an_indexed_picture_in_the_colours_of_voc(tmp_path):
    draw.save_label(tmp_path / "a.png", np.arange(256).reshape(8, 32))
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.mode, picture.size) == ("P", (32, 8))
        np.testing.assert_array_equal(np.array(picture.convert("RGB")), draw.palette().reshape(8, 32, 3))


def test_a_mask_of_booleans_and_a_transposed_one_are_kept(tmp_path):
    mask = torch.rand(4, 7) > 0.5
    draw.save_label(tmp_path / "a.PNG", mask.T)
    np.testing.assert_array_equal(draw.load_label(tmp_path / "a.PNG"), mask.T.numpy())


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    draw.save_label(path, np.zeros((2, 2), dtype=np.uint8))
    old = path.read_bytes()

    def torn(self, file, format):
        with open(file, "wb") as stream:
            stream.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        draw.save_label(path, np.ones((2, 2), dtype=np.uint8))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_readable_by_whoever_may_read_its_neighbours(tmp_path):
    (tmp_path / "neighbour").write_text("")
    draw.save_label(tmp_path / "a.png", np.zeros((2, 2), dtype=np.uint8))
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "neighbour").stat().st_mode


def png(path, depth, kind, row, palette=b""):
    """A picture of one row, four pixels wide, byte by byte: Pillow writes no grey of 4 bits."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, kind, 0, 0, 0))
    body = (chunk(b"PLTE", palette) if palette else b"") + chunk(b"IDAT", zlib.compress(b"\0" + row))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    ("depth", "kind", "row", "palette"),
    [(8, 0, bytes([1, 2, 3, 4]), b""), (8, 3, bytes([1, 2, 3, 4]), bytes(768)), (4, 3, b"\x12\x34", bytes(48))],
    ids=["grey of 8 bits", "indexed of 8 bits", "indexed of 4 bits"],
)
def test_label_maps_of_other_programs_are_read_as_stored(tmp_path, depth, kind, row, palette):
    assert draw.load_label(png(tmp_path / "a.png", depth, kind, row, palette)).tolist() == [[1, 2, 3, 4]]


def test_grey_that_the_decoder_would_stretch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="load_label: expected an indexed or 8-bit grey PNG, got PNG of mode L"):
        draw.load_label(png(tmp_path / "a.png", 4, 0, b"\x12\x34"))


@pytest.mark.parametrize(
    ("mode", "name"), [("RGB", "a.png"), ("I;16", "a.png"), ("1", "a.png"), ("P", "a.bmp"), ("L", "a.jpg")]
)
def test_pictures_that_are_no_label_maps_are_refused(tmp_path, mode, name):
    picture = Image.new(mode, (3, 2))
    if mode == "P":
        picture.putpalette(draw.palette().tobytes())
    picture.save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"load_label: .*of mode {mode} in .*{name}.*Convert its colours"):
        draw.load_label(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "label", "error", "message"),
    [
        (
            "a.jpg",
            np.zeros((2, 2), dtype=np.uint8),
            ValueError,
            r"save_label: expected `path` to end in \.png, got 'a\.jpg'",
        ),
        ("a.png", np.zeros((1, 2, 2), dtype=np.uint8), ValueError, r"`label` of shape \(H, W\), got \(1, 2, 2\)"),
        ("a.png", np.zeros((0, 2), dtype=np.uint8), ValueError, r"`label` of shape \(H, W\), got \(0, 2\)"),
        ("a.png", np.array([[-1, 0]]), ValueError, r"save_label: expected `label` in 0\.\.255, got -1\.\.0"),
        ("a.png", np.array([[256, 0]]), ValueError, r"got 0\.\.256"),
        ("a.png", np.zeros((2, 2)), TypeError, "save_label: expected `label` of an integer dtype, got float64"),
    ],
)
def test_what_is_no_label_map_is_not_written(tmp_path, name, label, error, message):
    with pytest.raises(error, match=message):
        draw.save_label(tmp_path / name, label)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["save_label", "load_label"])
def test_without_pillow_the_error_names_the_extra(monkeypatch, function):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "PIL":
            raise ImportError("No module named 'PIL'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    arguments = ("a.png", np.zeros((2, 2), dtype=np.uint8))[: 2 if function == "save_label" else 1]
    with pytest.raises(ImportError, match=rf"^{function}: needs Pillow.*pip install '\.\[examples\]' in a checkout"):
        getattr(draw, function)(*arguments)


def test_drawing_without_files_loads_no_pillow():
    drawing = "draw.heatmap(torch.rand(2, 2), torch.rand(3, 4, 4))"
    code = f"import sys, torch; from ffr import draw; {drawing}; print('PIL' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
