"""AP and mIoU against pycocotools' and mmsegmentation's numbers."""

import json

import numpy as np
import pytest

from dense_golden import FOLDER
from vitpyramid.evals import coco, segmentation
from vitpyramid.heads.detector import Detections


def golden(name):
    with np.load(FOLDER / f"{name}.npz") as archive:
        data = {key: archive[key] for key in archive.files}
    return json.loads(str(data.pop("meta"))), data


def ellipse(box, height, width):
    """Pixels of the ellipse in a box (x, y, w, h)."""
    x, y, w, h = box
    rows, columns = np.mgrid[:height, :width] + 0.5
    return ((columns - x - w / 2) / (w / 2 + 0.01)) ** 2 + ((rows - y - h / 2) / (h / 2 + 0.01)) ** 2 < 1


@pytest.fixture(scope="module")
def example():
    """Ground truth, results, and what pycocotools says of them."""
    meta, data = golden("coco_ap")
    size = meta["height"], meta["width"]
    truth = {
        "images": [{"id": i, "height": size[0], "width": size[1]} for i in range(meta["images"])],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, meta["classes"] + 1)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": int(data["gt_image"][i]),
                "category_id": int(data["gt_class"][i]),
                "bbox": box.tolist(),
                "area": float(data["gt_area"][i]),
                "iscrowd": int(data["gt_iscrowd"][i]),
                "segmentation": coco.encode(ellipse(box, *size)),
            }
            for i, box in enumerate(data["gt_bbox_xywh"])
        ],
    }
    results = [
        {
            "image_id": int(image),
            "category_id": int(label),
            "score": float(score),
            "bbox": box.tolist(),
            "segmentation": coco.encode(ellipse(box, *size)),
        }
        for image, label, score, box in zip(
            data["det_image"], data["det_class"], data["det_score"], data["det_bbox_xywh"], strict=True
        )
    ]
    return truth, results, data


@pytest.mark.parametrize("kind", (coco.BOXES, coco.MASKS))
def test_ap_is_that_of_pycocotools(example, kind):
    truth, results, data = example
    before = json.dumps(truth), json.dumps(results)
    numbers, classes = coco.average_precision(truth, results, kind)
    assert list(numbers.values()) == pytest.approx(data[f"{kind}/stats"], abs=1e-12)
    assert np.mean(list(classes.values())) == pytest.approx(numbers["AP"], abs=1e-12)
    assert list(classes) == ["class 1", "class 2", "class 3"]
    assert (json.dumps(truth), json.dumps(results)) == before


def test_more_detections_of_an_image_count(example):
    truth, results, data = example
    numbers, _ = coco.average_precision(truth, results, coco.BOXES, most=(100, 300, 1000))
    assert [numbers[f"AR{n}"] for n in (100, 300, 1000)] == pytest.approx(
        data["bbox/mmdet_recall_maxdets_100_300_1000"]
    )
    assert numbers["AP"] == pytest.approx(float(data["bbox/mmdet_map_maxdets_1000"][0]))


def test_nothing_found_and_things_that_are_not_there(example):
    truth, results, _ = example
    numbers, classes = coco.average_precision(truth, [], coco.BOXES)
    assert (numbers["AP"], numbers["APl"], classes["class 2"]) == (0, -1, 0)
    with pytest.raises(ValueError, match="category_id 9, which is none of the ground truth's categories"):
        coco.average_precision(truth, [{**results[0], "category_id": 9}], coco.BOXES)


def test_detections_of_batches_are_of_every_image_once(example):
    """Two batches of detectors' outputs, the last with a filler row, against the same results as a list."""
    truth, results, _ = example
    size, slots = (truth["images"][0]["height"], truth["images"][0]["width"]), 110
    ids = [image["id"] for image in truth["images"]]
    answers = coco.Answers(lambda: truth, lambda: ids, lambda: [1, 2, 3])

    def batch(indices, mask):
        boxes, scores, labels = np.zeros((8, slots, 4)), np.zeros((8, slots)), np.zeros((8, slots), np.int32)
        valid = np.zeros((8, slots), bool)
        for row, index in enumerate(indices):
            for slot, result in enumerate(result for result in results if result["image_id"] == ids[index]):
                x, y, w, h = result["bbox"]
                boxes[row, slot], scores[row, slot] = (x, y, x + w, y + h), result["score"]
                labels[row, slot], valid[row, slot] = result["category_id"] - 1, True
        masks = np.ones((8, slots, 28, 28))
        found = Detections(boxes, scores, labels, valid, masks)
        return coco.Found.of(found, np.tile(size, (8, 1)), np.array(indices), np.array(mask), answers)

    found = batch(range(8), [1.0] * 8).merge(batch([8, 9, 10, 11, 12, 13, 0, 0], [1.0] * 6 + [0.0] * 2))
    assert len(found.results) == len(results)
    numbers = found.compute()
    expected, classes = coco.average_precision(truth, results, coco.BOXES)
    assert {name: numbers[f"box_{name}"] for name in expected} == pytest.approx(expected, abs=1e-9)
    whole = [  # a mask of ones is its box, where pixels' centres are in it
        {**result, "segmentation": coco.encode(rectangle(result["bbox"], *size))} for result in results
    ]
    expected, _ = coco.average_precision(truth, whole, coco.MASKS)
    assert {name: numbers[f"mask_{name}"] for name in expected} == pytest.approx(expected, abs=0.02)
    files = found.files()
    again = json.loads(files["detections.bbox.json"])
    assert coco.average_precision(truth, again, coco.BOXES).numbers["AP"] == pytest.approx(numbers["box_AP"], abs=1e-12)
    assert "bbox" not in json.loads(files["detections.segm.json"])[0]
    assert files["classes.txt"].splitlines()[1].split()[:3] == ["class", "1", f"{100 * classes['class 1']:.1f}"]


def rectangle(box, height, width):
    x, y, w, h = box
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (columns > x) & (columns < x + w) & (rows > y) & (rows < y + h)


def test_miou_is_that_of_mmsegmentation():
    meta, data = golden("miou")
    total = 0
    for i in range(meta["images"]):
        label = data[f"label{i}"]
        total += segmentation.confusion(
            data[f"prediction{i}"], np.where(label == 0, 255, label - 1), meta["num_classes"]
        )
    numbers, iou, accuracy = segmentation.scores(total)
    assert np.diagonal(total).tolist() == data["area_intersect"].tolist()
    assert np.nan_to_num(iou, nan=-1) == pytest.approx(data["iou"])
    assert np.nan_to_num(accuracy, nan=-1) == pytest.approx(data["acc"])
    names = {"mIoU": "mean_iou", "mAcc": "mean_acc", "aAcc": "all_acc"}
    assert numbers == pytest.approx({name: float(data[key][0]) for name, key in names.items()})


def test_a_class_that_nothing_is_of_has_no_part_in_the_mean():
    label = np.array([[0, 0, 1, 255]])
    numbers, iou, _ = segmentation.scores(segmentation.confusion(np.array([[0, 1, 1, 3]]), label, 4))
    assert np.array_equal(iou, [0.5, 0.5, np.nan, np.nan], equal_nan=True)
    assert numbers == pytest.approx({"mIoU": 0.5, "mAcc": 0.75, "aAcc": 2 / 3})
    with pytest.raises(ValueError, match=r"a prediction of \(1, 2\) pixels for a label map of \(1, 4\)"):
        segmentation.confusion(label[:, :2], label, 4)
    with pytest.raises(ValueError, match="label 9: expected less than num_classes = 4, or 255"):
        segmentation.confusion(label, np.array([[0, 0, 1, 9]]), 4)
