"""vitpyramid.data.dense_pipeline: what is in which batch, of which canvas, and that boxes and masks stay on objects."""

import numpy as np
import pytest

from dense_streams import dense_config, rectangle, rectangles
from streams import assert_same, side_by_side, take
from vitpyramid.data.dense_pipeline import make_eval, make_train
from vitpyramid.data.pipeline import UnreadableError


def epochs(batches, count):
    """Labels of the boxes of batches, which are the examples' indices, as rows of `count`."""
    return np.concatenate([batch["labels"][:, 0] for batch in batches]).reshape(-1, count)


def test_train_batch_shapes_and_dtypes():
    [batch] = take(make_train(dense_config(), rectangles(13), process_count=2), 1)
    height, width = batch["image"].shape[1:3]
    assert {height, width} == {32, 48}
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((2, height, width, 3), np.uint8),
        "size": ((2, 2), np.int32),
        "boxes": ((2, 3, 4), np.float32),
        "labels": ((2, 3), np.int32),
        "valid": ((2, 3), bool),
        "dropped": ((2,), np.int32),
        "masks": ((2, 3, height, width // 8), np.uint8),
    }


@pytest.mark.parametrize("interpolation", ["bilinear", "opencv"])
def test_boxes_and_masks_stay_on_the_object(interpolation):
    config = dense_config(**{"data.interpolation": interpolation})
    mirrored = set()
    for batch in take(make_train(config, rectangles(13)), 12):
        masks = np.unpackbits(batch["masks"], axis=-1)
        for row in range(4):
            image, (height, width) = batch["image"][row], batch["size"][row]
            assert not image[height:].any() and not image[:, width:].any() and image[:height, :width].all()
            assert batch["valid"][row].tolist() == [True, False, False] and not batch["boxes"][row, 1:].any()
            bright = image[..., 0] > batch["labels"][row, 0] + 110
            assert np.mean(bright != masks[row, 0].astype(bool)) < 0.03 and not masks[row, 1:].any()
            y, x = np.nonzero(bright)
            np.testing.assert_allclose(
                batch["boxes"][row, 0], [x.min(), y.min(), x.max() + 1, y.max() + 1], rtol=0, atol=1.01
            )
            (old_height, old_width), (left, *_) = rectangle(batch["labels"][row, 0])
            assert abs(height / old_height - width / old_width) < 0.06 and 24 <= min(height, width) <= 32
            mirrored.add(abs(batch["boxes"][row, 0, 0] - left * width / old_width) > 1)
    assert mirrored == {True, False}


def test_a_part_of_half_of_the_images():
    """Boxes and masks stay on what is left of the object; on more hosts and resumed it is the same stream."""
    config = dense_config(**{"data.crop_short_side": (20, 24), "data.crop_side": (12, 20)})
    source = rectangles(13)
    batches, kinds = take(make_train(config, source), 24), []
    for batch in batches:
        assert {"boxes", "masks"} < batch.keys() and not batch["dropped"].any()
        masks = np.unpackbits(batch["masks"], axis=-1)[:, 0].astype(bool)
        for image, size, mask, box, valid in zip(
            batch["image"], batch["size"], masks, batch["boxes"][:, 0], batch["valid"][:, 0], strict=True
        ):
            seen = image[: size[0], : size[1], 0]
            assert seen.all() and not image[size[0] :].any() and not image[:, size[1] :].any()
            bright = image[..., 0] > seen.min() + 100
            assert np.mean(bright != mask) < 0.05 and valid >= mask.any()
            if mask.any():
                y, x = np.nonzero(mask)
                np.testing.assert_allclose(box, [x.min(), y.min(), x.max() + 1, y.max() + 1], rtol=0, atol=1.6)
            kinds.append((bool(valid), min(size) < 24, (size[0] < size[1]) == (image.shape[0] < image.shape[1])))
    assert 4 < sum(not valid for valid, *_ in kinds) < 40
    assert any(small for _, small, _ in kinds) and any(not same for *_, same in kinds)
    assert_same(take(make_train(config, source, 7), 3), batches[7:10])
    assert_same(side_by_side([take(make_train(config, source, 5, host, 2), 4) for host in range(2)]), batches[5:9])


def test_each_example_comes_once_in_an_epoch_and_batches_have_one_canvas():
    batches = take(make_train(dense_config(), rectangles(40)), 40)
    shapes = [batch["image"].shape[1:3] for batch in batches]
    assert len(set(shapes)) == 2 and len(set(shapes[:6])) == 2  # mixed, not one after the other
    # Up to 3 examples of either canvas wait at the end, of 4 permutations.
    counts = np.bincount(epochs(batches, 4).ravel(), minlength=40)
    assert counts.sum() == 160 and counts.min() >= 3 and counts.max() <= 5
    for shape in set(shapes):
        of_shape = np.concatenate([b["labels"][:, 0] for b, s in zip(batches, shapes, strict=True) if s == shape])
        members = np.unique(of_shape)
        whole = of_shape[: len(of_shape) // len(members) * len(members)].reshape(-1, len(members))
        assert all(sorted(epoch) == list(members) for epoch in whole) and len({tuple(epoch) for epoch in whole}) >= 3


def test_resumed_and_on_more_hosts_it_is_the_same_stream():
    config, source = dense_config(), rectangles(40)
    straight = take(make_train(config, source), 24)
    for start in (3, 11, 22):
        assert_same(take(make_train(config, source, start), 2), straight[start : start + 2])
    shares = [take(make_train(config, source, 5, host, 2), 9) for host in range(2)]
    assert_same(side_by_side(shares), straight[5:14])
    threads = dense_config(**{"data.threads": 0})
    assert_same(take(make_train(threads, source, 5), 9), straight[5:14])
    other = take(make_train(dense_config(seed=4), source), 10)
    assert not np.array_equal(epochs(other, 4), epochs(straight[:10], 4))
    assert take(make_train(config, source, 10**9), 1)[0]["image"].shape[0] == 4


def test_a_small_group_fills_a_batch_in_several_epochs():
    source = rectangles(6)
    source.examples = [source.examples[i] for i in (0, 2, 5, 1)]  # one portrait
    batches = take(make_train(dense_config(), source), 4)
    assert sum(batch["image"].shape[1:3] == (48, 32) for batch in batches) == 1
    np.testing.assert_array_equal(np.bincount(epochs(batches, 4).ravel()), [4, 4, 4, 0, 0, 4])


def test_eval_covers_every_example_once_and_one_canvas_after_the_other():
    config, source = dense_config(**{"eval.batch_size": 4}), rectangles(13)
    shares = [list(make_eval(config, source, host, 2)) for host in range(2)]
    batches = side_by_side(shares)
    assert_same(batches, list(make_eval(config, source)))
    assert [batch["image"].shape[1:3] for batch in batches] == [(32, 48)] * 2 + [(48, 32)] * 2
    flat = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0] if key != "image"}
    assert {key: value.dtype for key, value in flat.items()} == {
        "size": np.int32,
        "original_size": np.int32,
        "scale": np.float32,
        "index": np.int32,
        "mask": bool,
    }
    assert sorted(flat["index"][flat["mask"]]) == list(range(13)) and set(flat["index"][~flat["mask"]]) == {-1}
    real = flat["mask"]
    np.testing.assert_array_equal(flat["original_size"][real], source.sizes()[flat["index"][real]])
    np.testing.assert_allclose(flat["scale"] * flat["original_size"], flat["size"], rtol=1e-6)
    assert set(flat["size"].min(axis=1)[real]) == {28, 26}  # of 33 x 18 the longer side becomes 48


def test_an_own_canvas_for_every_size():
    config = dense_config(**{"data.eval_canvas": (), "data.eval_align": 32, "data.eval_short_side": 30})
    batches = list(make_eval(config, rectangles(13)))
    for batch in batches:
        assert set(map(tuple, batch["size"])) == {batch["image"].shape[1:3]}  # aligned: nothing is padded
    assert {batch["image"].shape[1:3] for batch in batches} == {(32, 64), (64, 32)}


@pytest.mark.parametrize("crop", [False, True])
def test_label_maps_stay_on_the_pixels(crop):
    keys = {"data.crop": crop, "data.canvas": ((32, 48), (48, 32)), "data.short_side_range": False}
    keys |= {"data.short_side": (28,), "data.interpolation": "opencv"}
    if crop:
        keys |= {"data.canvas": ((30, 30),), "data.scale_range": (0.8, 2.0), "data.interpolation": "bilinear"}
    sizes = set()
    for batch in take(make_train(dense_config(**keys), rectangles(13, "segment")), 8):
        assert batch["label"].dtype == np.uint8 and batch["label"].shape == batch["image"].shape[:3]
        for image, label, (height, width) in zip(batch["image"], batch["label"], batch["size"], strict=True):
            assert (label[height:] == 255).all() and (label[:, width:] == 255).all()
            known = label[:height, :width]
            assert set(np.unique(known)) <= {0, 1}
            assert np.mean((image[:height, :width, 0] > 122) != known) < 0.05
            sizes.add((int(height), int(width)))
    assert len(sizes) > 3 and (not crop or max(max(size) for size in sizes) == 30)


def test_more_objects_than_slots_and_crowds():
    source = rectangles(4)
    example = source.examples[0]
    boxes = np.repeat(example.boxes, 5, axis=0) + np.arange(5)[:, None]
    many = {"boxes": boxes, "labels": np.arange(5), "masks": example.masks * 5}
    crowd = np.array([True, False, False, False, False])
    source.examples = [type(example)(example.image, example.size, crowd=crowd, **many)]
    [batch] = take(make_train(dense_config(batch_size=1), source), 1)
    assert batch["labels"].tolist() == [[1, 2, 3]] and batch["valid"].all() and batch["dropped"].tolist() == [1]


@pytest.mark.parametrize("make", [make_train, make_eval])
def test_damaged_images(make):
    source = rectangles(13)
    good = source.examples[5]
    source.examples[5] = type(good)(good.image[:60], good.size, good.boxes, good.labels, good.crowd, good.masks)
    with pytest.raises(UnreadableError, match=r"'memory', split 'train', index 5 \(record 5\): not a readable image"):
        take(iter(make(dense_config(), source)), 5)
    config = dense_config(**{"data.on_corrupt": "skip"})
    if make is make_eval:
        batches = list(make_eval(config, source))
        assert sum(batch["skipped"].sum() for batch in batches) == 1
        assert sorted(i for b in batches for i in b["index"][b["mask"]]) == [i for i in range(13) if i != 5]
        return
    batches = take(make_train(config, source), 13)
    skipped = np.concatenate([batch["skipped"] for batch in batches])
    instead = np.concatenate([batch["labels"][:, 0] for batch in batches])[skipped]
    assert 3 <= skipped.sum() <= 5 and set(instead) == {7}  # the next landscape
    straight = take(make_train(dense_config(), rectangles(13)), 13)
    assert all(
        np.array_equal(batch["image"][~batch["skipped"]], other["image"][~batch["skipped"]])
        for batch, other in zip(batches, straight, strict=True)
    )


def test_sizes_that_contradict_each_other():
    source = rectangles(4)
    good = source.examples[0]
    source.examples = [type(good)(good.image, (21, 30), good.boxes, good.labels, good.crowd, good.masks)]
    with pytest.raises(UnreadableError, match=r"an image of \(20, 30\) pixels, the annotations say \(21, 30\)"):
        next(make_train(dense_config(), source))
    source = rectangles(2, "segment")
    first, second = source.examples
    source.examples = [type(first)(first.image, first.size, label_map=second.label_map)]
    with pytest.raises(UnreadableError, match=r"a label map of \(30, 20\) pixels, expected the image's \(20, 30\)"):
        next(make_train(dense_config(), source))
    source.examples, source.categories = [first], ("a",)
    with pytest.raises(UnreadableError, match="a label map with class 1, expected fewer than 1, or 255"):
        next(make_train(dense_config(), source))
    with pytest.raises(ValueError, match="an image of 20 x 30 becomes up to 32 x 48, expected one of 32 x 40 to hold"):
        make_train(dense_config(**{"data.canvas": ((32, 40),)}), rectangles(4))
