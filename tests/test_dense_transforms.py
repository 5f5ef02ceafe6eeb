"""vitpyramid.data.dense_transforms and opencv: sizes and pixels of the original code, crops, colours."""

import dataclasses
import pathlib
import zlib

import numpy as np
import pytest
from PIL import Image

from vitpyramid.data import dense_transforms as transforms
from vitpyramid.data.dense_transforms import Resize, SizeCrop
from vitpyramid.data.opencv import resize_linear

SIZES = np.load(pathlib.Path(__file__).parent / "goldens" / "dense" / "image_sizes.npz")


@pytest.mark.parametrize(
    ("key", "rule", "short", "long", "align"),
    [
        ("mmcv_1333x800", "mmdet", 800, 1333, 1),
        ("mmcv_1066x640", "mmdet", 640, 1066, 1),
        ("mmcv_1333x640", "mmdet", 640, 1333, 1),
        ("mmcv_1333x672", "mmdet", 672, 1333, 1),
        ("mmcv_2048x512", "mmdet", 512, 2048, 1),
        ("align_resize_2048x512", "mmdet", 512, 2048, 32),
        ("d2_800_1333", "detectron2", 800, 1333, 1),
        ("d2_640_1333", "detectron2", 640, 1333, 1),
        ("detr_800_1333", "detr", 800, 1333, 1),
        ("detr_480_1333", "detr", 480, 1333, 1),
        ("detr_400_666", "detr", 400, 666, 1),
        ("detr_240_666", "detr", 240, 666, 1),
    ],
)
def test_sizes_are_those_of_the_original_code(key, rule, short, long, align):
    resize = Resize(rule, (short,), long, align=align)
    sizes = [resize.aligned((height, width)) for height, width in SIZES["hw"].tolist()]
    np.testing.assert_array_equal(sizes, SIZES[key])
    if f"{key}_scale_factor_wh" in SIZES:
        pairs = zip(SIZES["hw"].tolist(), sizes, strict=True)
        factors = [transforms.scale_factors(tuple(old), new)[::-1] for old, new in pairs]
        np.testing.assert_array_equal(factors, SIZES[f"{key}_scale_factor_wh"].astype(np.float32))


def test_drawn_sides():
    rng = np.random.default_rng(0)
    choice, in_range = Resize("detectron2", (640, 672, 800), 1333), Resize("mmdet", (640, 800), 1333, in_range=True)
    assert {choice.draw(rng).short_sides for _ in range(50)} == {(640,), (672,), (800,)}
    drawn = [in_range.draw(rng).short_sides[0] for _ in range(3000)]
    assert (min(drawn), max(drawn), len(set(drawn))) == (640, 800, 161)
    ratio = Resize("mmdet", (512,), 2048, ratio_range=(0.5, 2.0))
    pairs = [(one.short_sides[0], one.long_side) for one in (ratio.draw(rng) for _ in range(300))]
    assert min(pairs)[0] < 280 and max(pairs)[0] > 950 and all(abs(long - 4 * short) < 4 for short, long in pairs)
    assert ratio.largest().short_sides == (1024,)


def test_parts_of_half_of_the_images():
    """Of DETR: shorter sides of 400, 500 or 600, then 384 to 600 pixels, at any place."""
    rng, crop, upright = np.random.default_rng(0), SizeCrop((400, 500, 600), (384, 600)), set()
    sizes, heights, widths, rooms = set(), set(), set(), set()
    for _ in range(2000):
        (height, width), (rows, columns) = crop.draw((480, 640), "detr", rng)
        sizes.add((height, width))
        heights.add(rows.stop - rows.start)
        widths.add(columns.stop - columns.start)
        rooms |= {rows.start == 0, rows.stop == height, columns.start == 0, columns.stop == width}
        assert 0 <= rows.start < rows.stop <= height and 0 <= columns.start < columns.stop <= width
        upright.add(rows.stop - rows.start > columns.stop - columns.start)
    assert sizes == {(400, 533), (500, 666), (600, 800)} and rooms == upright == {False, True}
    assert (min(heights), max(heights), min(widths), max(widths)) == (384, 600, 384, 600) and len(widths) == 217
    assert SizeCrop((40,), (384, 600)).draw((40, 60), "detr", rng) == ((40, 60), (slice(0, 40), slice(0, 60)))


def test_boxes_of_a_part():
    boxes = np.array([[0, 0, 10, 8], [8, 4, 30, 40], [12, 9, 14, 11], [0, 5, 5, 9], [2, 4, 5, 20]], np.float32)
    found, kept = transforms.crop_boxes(boxes, (slice(4, 10), slice(5, 20)))
    np.testing.assert_array_equal(found[kept], [[0, 0, 5, 4], [3, 0, 15, 6], [7, 5, 9, 6]])
    assert kept.tolist() == [True, True, True, False, False] and found.dtype == np.float32


def test_sizes_that_fit_on_a_canvas():
    resize = Resize("detr", (480, 512, 544, 800), 1333)
    assert resize.fitting((600, 384), (800, 1344)).short_sides == (480, 512)
    assert resize.fitting((384, 600), (800, 1344)) == resize
    in_range = dataclasses.replace(resize, in_range=True).fitting((600, 384), (800, 1344)).short_sides
    assert (min(in_range), max(in_range)) == (480, 512)
    assert resize.fitting((300, 1000), (100, 100)).short_sides == (30,)


def ramp(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([(37 * y + 11 * x) % 256, (91 * x + y * y) % 256, (5 * x * y + 3) % 256], axis=-1).astype(np.uint8)


# Checksums of what OpenCV 5.0 makes of `ramp(24, 32)`: INTER_LINEAR, and INTER_NEAREST of its first channel.
@pytest.mark.parametrize(
    ("size", "linear", "nearest"),
    [
        ((45, 80), 4163194661, 4143742728),
        ((13, 17), 2349099226, 263303800),
        ((24, 32), 4242910757, 3844365770),
        ((12, 16), 1868604398, 771015280),
        ((100, 7), 3654238561, 742309017),
    ],
)
def test_pixels_are_those_of_opencv(size, linear, nearest):
    assert zlib.crc32(resize_linear(ramp(24, 32), size).tobytes()) == linear
    assert zlib.crc32(transforms.resize_nearest(ramp(24, 32)[..., 0], size, "opencv").tobytes()) == nearest


def test_levels_of_opencv():
    expected = [[0, 63, 136, 132, 17], [1, 64, 137, 133, 18], [2, 66, 138, 134, 19], [4, 67, 140, 136, 21]]
    np.testing.assert_array_equal(resize_linear(ramp(3, 4), (4, 5))[..., 1], expected)


def test_boxes_are_scaled_cut_and_mirrored():
    boxes = transforms.resize_boxes(np.array([[-3.0, 4, 10, 30], [1, 2, 3, 4]]), (20, 10), (30, 20))
    assert boxes.dtype == np.float32
    np.testing.assert_array_equal(boxes, [[0, 6, 20, 30], [2, 3, 6, 6]])
    np.testing.assert_array_equal(transforms.flip_boxes(boxes, 20), [[0, 6, 20, 30], [14, 3, 18, 6]])


def test_nearest_pixels_are_those_of_pillow():
    levels = np.random.default_rng(0).integers(0, 256, (23, 31), np.uint8)
    for height, width in ((50, 70), (11, 9), (23, 31), (46, 62)):
        expected = Image.fromarray(levels).resize((width, height), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(transforms.resize_nearest(levels, (height, width), "bilinear"), expected)


def test_a_crop_shows_two_classes_where_it_can():
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:32] = 1
    labels[:, 32:] = 255
    shown = []
    for seed in range(200):
        window = transforms.crop_window(labels, (8, 8), 0.75, np.random.default_rng(seed))
        counts = np.bincount(labels[window].ravel(), minlength=256)[:255]
        assert labels[window].shape == (8, 8)
        shown.append(counts[1] > 0 and counts[0] > 0 and counts.max() / counts.sum() < 0.75)
    once = [transforms.crop_window(labels, (8, 8), 1.0, np.random.default_rng(seed)) for seed in range(200)]
    alone = [len(np.unique(labels[window][labels[window] < 255])) == 2 for window in once]
    # One window in 53 (left from 23 to 24, and more) is good: eleven draws find one in about 0.4 of all cases.
    assert np.mean(alone) < 0.25 < 2 * np.mean(alone) < np.mean(shown) < 0.9
    assert labels[transforms.crop_window(labels, (64, 64), 0.75, np.random.default_rng(0))].shape == (40, 60)


def test_photometric_distortion():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    made = [transforms.photometric_distortion(image, np.random.default_rng(seed)) for seed in range(64)]
    same = np.mean([np.array_equal(one, image) for one in made])
    assert 0 < same < 0.25 and all(one.dtype == np.uint8 for one in made)  # nothing in one of 16
    grey = np.repeat(image[..., :1], 3, axis=-1)
    assert all(np.ptp(transforms._turn_colours(grey, 1.4, hue), axis=-1).max() == 0 for hue in (-18, 0, 17))
    np.testing.assert_array_equal(transforms._turn_colours(image, 1.0, 0), image)
    # A third of the circle is from red to green.
    np.testing.assert_array_equal(transforms._turn_colours(image, 1.0, 60), np.roll(image, 1, axis=-1))


def test_an_image_is_padded_on_the_right_and_below():
    canvas = transforms.pad(np.ones((2, 3), np.uint8), (4, 4), 255)
    np.testing.assert_array_equal(canvas, [[1, 1, 1, 255], [1, 1, 1, 255], [255] * 4, [255] * 4])
    with pytest.raises(ValueError, match=r"\(2, 3\) does not fit into \(4, 2\)"):
        transforms.pad(np.ones((2, 3), np.uint8), (4, 2))
