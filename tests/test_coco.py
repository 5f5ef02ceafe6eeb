"""vitpyramid.data.coco and objects: what is read, and what becomes of annotations that cannot be right."""

import json
import logging

import numpy as np
import pytest

from dense_streams import dense_config, write_coco
from vitpyramid.data.annotated import open_annotated
from vitpyramid.data.annotations import decode_mask, run_lengths
from vitpyramid.tasks import detect

SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]


def opened(folder, training=True, **keys):
    config = dense_config(**{"data.name": "coco", "data.data_dir": str(folder), **keys})
    return open_annotated(config.data, "val", "detect", training)


def test_labels_are_places_of_sorted_category_ids(tmp_path):
    content = write_coco(tmp_path, [{"segmentation": SQUARE}, {"category_id": 2, "image_id": 11}])
    source = opened(tmp_path, **{"data.masks": False})
    assert source.categories == ("dog", "cat") and source.category_ids == (2, 7) and source.ids == [10, 11]
    assert detect.about(source) == {"classes": ["dog", "cat"], "category_ids": [2, 7]}
    np.testing.assert_array_equal(source.sizes(), [[40, 60], [60, 40]])
    assert source[0].labels.tolist() == [1] and source[1].labels.tolist() == [0]
    np.testing.assert_array_equal(source[0].boxes, [[5, 6, 15, 14]])
    assert source.where(1).endswith("val/11.png") and source[0].size == (40, 60) and source[0].masks == ()
    assert opened(tmp_path, training=False).ground_truth() == content
    part = open_annotated(
        dense_config(**{"data.name": "coco", "data.data_dir": str(tmp_path)}).data, "val[1:]", "detect"
    )
    assert part.ids == [11] and part.ground_truth()["annotations"][0]["category_id"] == 2
    assert len(part.ground_truth()["images"]) == 1


# An annotation, what is said of it, and whether it is learned all the same.
WRONG = [
    ({"bbox": [-20, 5, 20, 10]}, "boxes outside of their image, or without area; left out", False),
    ({"bbox": [60, 5, 20, 10]}, "boxes outside of their image", False),
    ({"bbox": [5, 5, 10, 0]}, "boxes outside of their image, or without area", False),
    ({"bbox": [5, 5, -3, 10]}, "boxes outside of their image, or without area", False),
    ({"bbox": [5, 5, 0.9, 10]}, "boxes less than a pixel wide or high; left out", False),
    ({"bbox": [5, 5, 10]}, "boxes that are not four numbers; left out", False),
    ({"bbox": [5, 5, 10, float("nan")]}, "boxes that are not four numbers", False),
    ({"bbox": None}, "boxes that are not four numbers", False),
    ({"area": 0}, "objects without area; left out", False),
    ({"area": None}, "annotations without area; that of the box is taken", True),
    ({"bbox": [-5, 5, 20, 10]}, "boxes that reach beyond their image; cut at its edges", True),
    ({"category_id": 3}, "annotations of unknown categories; left out", False),
    ({"ignore": 1}, "annotations marked to be ignored; left out", False),
    ({"iscrowd": 1, "segmentation": {"size": [40, 60], "counts": [2400]}}, "boxes around crowds; not learned", True),
    ({"segmentation": [[10, 10, 20, 20]]}, "masks without a polygon of three points; left out", False),
    ({"segmentation": None}, "masks without a polygon of three points; left out", False),
    ({"segmentation": []}, "masks without a polygon of three points; left out", False),
    ({"segmentation": [[1, 1, 2, 2], *SQUARE]}, "masks with polygons of less than three points", True),
    ({"segmentation": {"size": [60, 40], "counts": [2400]}}, "masks of another size than their image; left out", False),
    ({"segmentation": {"size": [40, 60], "counts": [2399]}}, "run-length masks that do not fill their image", False),
    ({"image_id": 99}, "annotations of images that are not listed; left out", False),
]


@pytest.mark.parametrize(("annotation", "said", "learned"), WRONG)
def test_annotations_that_cannot_be_right(tmp_path, caplog, annotation, said, learned):
    write_coco(tmp_path, [{"segmentation": SQUARE}, {"segmentation": SQUARE, **annotation}])
    source = opened(tmp_path)
    [line] = [record.message for record in caplog.records if said in record.message]
    assert f"instances_val.json: 1 {said}" in line and ("annotation 2 of image 10" in line or "image 99" in line)
    assert len(source[0].boxes) == len(source[0].masks) == 1 + learned
    json.dumps(opened(tmp_path, training=False).ground_truth())


def test_each_kind_has_one_line_and_the_first_places(tmp_path, caplog):
    bad = {"bbox": [5, 5, 0.5, 10]}
    write_coco(tmp_path, [{"segmentation": SQUARE}] + [bad] * 8 + [{"area": 0}] * 2)
    opened(tmp_path)
    lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    kinds = [line for line in lines if "left out" in line]
    assert len(kinds) == 2 and ": 8 boxes less than" in kinds[1] and kinds[1].endswith("image 10 and 3 more")


def test_images_that_are_not_trained_on(tmp_path, caplog):
    crowd = {"image_id": 12, "iscrowd": 1, "segmentation": {"size": [50, 50], "counts": [2500]}}
    many = [{"image_id": 14, "segmentation": SQUARE}] * 5
    unknown = {"image_id": 13, "category_id": 1, "segmentation": SQUARE}
    sizes = ((40, 60), (31, 90), (50, 50), (50, 50), (50, 50))
    write_coco(tmp_path, [{"image_id": 11, "segmentation": SQUARE}, crowd, unknown, *many], sizes)
    source = opened(tmp_path)
    assert source.ids == [12, 14]  # a crowd alone teaches what is no object
    assert source[0].crowd.tolist() == [True] and len(source[1].boxes) == 5
    text = caplog.text
    assert "2 images without annotations; not learned: 10.png, 13.png" in text
    assert "1 images with a side of less than 32 pixels; not learned: 11.png" in text
    assert "1 images with more than data.max_boxes = 3 objects; the first ones are learned: 14.png" in text
    assert opened(tmp_path, training=False).ids == [10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[30, 20, 50, 35], [5, 6, 58, 39], [40, 10, 55, 30]], "look like x1, y1, x2, y2, and 3 of them reach beyond"),
        ([[0.1, 0.2, 0.5, 0.5], [0, 0, 1, 1]], "all numbers of all boxes are 1 or less"),
    ],
)
def test_boxes_of_another_format(tmp_path, boxes, message):
    write_coco(tmp_path, [{"bbox": box} for box in boxes])
    with pytest.raises(ValueError, match=rf"instances_val.json: .*{message}.*expected x, y, width, height in pixels"):
        opened(tmp_path)


def test_masks_are_drawn(tmp_path):
    uncompressed = {"size": [40, 60], "counts": [41, 2, 2357]}  # column by column
    compressed = run_lengths(uncompressed, 40, 60) | {}
    compressed["counts"] = compressed["counts"].decode()
    polygons = [[10, 10, 20, 10, 20, 20, 10, 20], [30, 5, 40, 5, 40, 9, 30, 9], [1, 1, 2, 2]]
    write_coco(tmp_path, [{"segmentation": mask} for mask in (polygons, uncompressed, compressed)])
    masks = [decode_mask(mask, 40, 60) for mask in opened(tmp_path)[0].masks]
    expected = np.zeros((40, 60), np.uint8)
    expected[10:20, 10:20] = expected[5:9, 30:40] = 1
    np.testing.assert_array_equal(masks[0], expected)
    assert np.argwhere(masks[1]).tolist() == [[1, 1], [2, 1]]
    np.testing.assert_array_equal(masks[2], masks[1])


def test_missing_image_files(tmp_path, caplog):
    write_coco(tmp_path, [{"segmentation": SQUARE}, {"image_id": 11, "segmentation": SQUARE}])
    (tmp_path / "val" / "11.png").unlink()
    with pytest.raises(ValueError, match=r"val: 1 of 2 images are not there, such as '11.png'"):
        opened(tmp_path)
    assert len(opened(tmp_path, **{"data.on_corrupt": "skip"})) == 2
    assert "1 image files that are not there; skipped: 11.png" in caplog.text
    (tmp_path / "val" / "10.png").unlink()
    with pytest.raises(ValueError, match="2 of 2 images are not there"):
        opened(tmp_path, **{"data.on_corrupt": "skip"})


def test_what_is_no_coco(tmp_path):
    write_coco(tmp_path, [{"segmentation": SQUARE}])
    path = tmp_path / "annotations" / "instances_val.json"
    good = json.loads(path.read_text())
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "expected lists named images, annotations, categories"),
        (json.dumps(good | {"images": [{"id": 1}]}), "KeyError"),
        (json.dumps(good | {"categories": good["categories"] * 2}), "two categories have one id"),
        (json.dumps(good | {"images": good["images"] * 2}), "two images have one id"),
        (json.dumps(good | {"annotations": []}), "the split 'val' of 'coco' is empty"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            opened(tmp_path)
    with pytest.raises(ValueError, match="cannot open the split 'test' of 'coco'; available: 'val'"):
        open_annotated(dense_config(**{"data.name": "coco", "data.data_dir": str(tmp_path)}).data, "test", "detect")
    with pytest.raises(ValueError, match="cannot list .*annotations"):
        opened(tmp_path / "nowhere")
    config = dense_config(**{"data.name": "coco", "data.data_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="data.name = 'coco': expected for task 'segment' a data set with label maps"):
        open_annotated(config.data, "val", "segment")
