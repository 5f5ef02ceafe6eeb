"""The training order with repeated augmentation and with groups, and what stands in for unreadable records."""

import logging
import math
import time

import grain
import numpy as np
import pytest

from streams import Memory, assert_same, make_config, memory, side_by_side, take
from vitpyramid.data import make_eval, make_train, open_source, pipeline
from vitpyramid.data.order import Grouped, eval_order


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches])


def damaged(count, indices):
    source = memory(count)
    for index in indices:
        source.records[index] = source.records[index][:60]
    return source


# Repeated augmentation


def official_epoch(permutation, ranks, batch_size):
    """`RASampler` of DeiT, PVT and ResT, and the DataLoader with drop_last: each rank's examples of each batch."""
    size = len(permutation)
    indices = [index for index in permutation for _ in range(3)]
    total = math.ceil(size * 3 / ranks) * ranks
    indices += indices[: total - len(indices)]
    drawn = [indices[rank:total:ranks][: size // 256 * 256 // ranks] for rank in range(ranks)]
    each = batch_size // ranks
    steps = len(drawn[0]) // each
    return [[one[k * each : (k + 1) * each] for one in drawn] for k in range(steps)]


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_repeats_draw_what_the_official_sampler_draws(ranks):
    size, batch_size = 600, 64
    config = make_config(batch_size=batch_size, **{"data.repeats": 3, "mix.groups": ranks})
    batches = take(make_train(config, memory(size)), 27)  # three epochs of nine steps
    order = grain.MapDataset.range(size).seed(3).shuffle().repeat()
    for epoch in range(3):
        permutation = [order[epoch * size + i] for i in range(size)]
        official = official_epoch(permutation, ranks, batch_size)
        assert len(official) == 8  # its epoch ends at 512 = 2 * 256 draws, ours at 9 * 64
        ours = [batch["label"].reshape(ranks, -1).tolist() for batch in batches[9 * epoch : 9 * (epoch + 1)]]
        assert ours[:8] == official
        assert len(np.unique(ours)) == 9 * 64 / 3  # the distinct examples of an epoch


def test_copies_stand_side_by_side_and_differ():
    [batch] = take(make_train(make_config(batch_size=12, **{"data.repeats": 3}), memory(13)), 1)
    copies = batch["label"].reshape(4, 3)
    assert np.all(copies == copies[:, :1]) and len(set(copies[:, 0])) == 4
    assert len({image.tobytes() for image in batch["image"]}) == 12


@pytest.mark.parametrize("repeats", [0, 1])
def test_no_repeats(repeats):
    config, source = make_config(**{"data.repeats": repeats}), memory(13)
    assert_same(take(make_train(config, source), 3), take(make_train(make_config(), source), 3))


def test_copies_are_dealt_out_to_groups():
    config = make_config(batch_size=48, **{"data.repeats": 3})
    [plain] = take(make_train(config, memory(50)), 1)
    config.mix.groups = 8
    batches = take(make_train(config, memory(50)), 2)
    np.testing.assert_array_equal(np.sort(batches[0]["label"]), np.sort(plain["label"]))
    assert all(len(set(group)) == 6 for batch in batches for group in batch["label"].reshape(8, 6))
    shares = [take(make_train(config, memory(50), 0, host, 2), 2) for host in range(2)]
    assert_same(side_by_side(shares), batches)
    config.mix.groups = 7
    with pytest.raises(ValueError, match=r"^mix\.groups: 7 is no divisor of batch_size = 48"):
        make_train(config, memory(50))


def test_repeats_need_a_batch_in_an_epoch():
    config = make_config(batch_size=14, **{"data.repeats": 3})
    with pytest.raises(ValueError, match=r"^data\.repeats: 3 needs a batch_size of at most the 13 examples, not 14"):
        make_train(config, memory(13))
    config.batch_size = 13
    assert len(set(labels_of(take(make_train(config, memory(13)), 1)))) == 5


# Resuming


@pytest.mark.parametrize("repeats", [0, 3])
def test_resuming_within_an_epoch_on_other_hosts_is_exact(repeats):
    """One host for five steps, then two: as if it had been one all along; with damaged records."""
    config = make_config(**{"data.repeats": repeats, "data.on_corrupt": "skip"})
    source = damaged(50, [3, 4, 30])
    straight = take(make_train(config, source), 15)
    assert any(batch["skipped"].any() for batch in straight[5:])
    shares = [take(make_train(config, source, 5, host, 2), 10) for host in range(2)]
    assert_same(side_by_side(shares), straight[5:])
    assert_same(take(make_train(config, source, 9), 6), straight[9:])


@pytest.mark.parametrize("repeats", [0, 3])
def test_resuming_late_in_imagenet_takes_no_time(repeats):
    config = make_config(**{"data.name": "synthetic", "data.repeats": repeats, "batch_size": 8})
    source = open_source(config.data, "train")
    late = int(0.9 * len(source) / 8)
    start = time.perf_counter()
    batches = take(make_train(config, source, late), 1)
    assert time.perf_counter() - start < 5  # reading the 1.1 million examples before it takes an hour
    assert batches[0]["image"].shape == (8, 8, 8, 3)


@pytest.mark.parametrize(("batch_size", "threads"), [(128, 16), (128, 2), (40, 3)])
def test_no_more_is_read_ahead_than_promised(batch_size, threads):
    """`make_train` bounds the host's memory: one batch, and 32 examples in each thread's hands."""
    reads = []

    class Counting(Memory):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    source = Counting(**vars(memory(200)))
    stream = make_train(make_config(batch_size=batch_size, **{"data.threads": threads}), source)
    for step in range(1, 4):
        next(stream)
        before = -1
        while before != len(reads):  # until the threads have nothing left to do
            before = len(reads)
            time.sleep(0.1)
        assert step * batch_size <= len(reads) <= (step + 1) * batch_size + 32 * threads
    stream.close()


# Records that cannot be read


def test_a_skipped_example_is_replaced_by_the_next_one(caplog, monkeypatch):
    monkeypatch.setattr(pipeline, "_SKIPPED", set())
    config = make_config(**{"data.on_corrupt": "skip"})
    whole, holes = memory(13), damaged(13, [3, 4, 12])
    for expected, batch in zip(take(make_train(config, whole), 8), take(make_train(config, holes), 8), strict=True):
        missing = np.isin(expected["label"], [3, 4, 12])
        np.testing.assert_array_equal(batch["skipped"], missing)
        assert batch["skipped"].dtype == bool and not expected["skipped"].any()
        stand_ins = {3: 5, 4: 5, 12: 0}
        assert batch["label"].tolist() == [stand_ins.get(label, label) for label in expected["label"].tolist()]
        np.testing.assert_array_equal(batch["image"][~missing], expected["image"][~missing])
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(line.partition(":")[0] for line in lines) == [  # one line each, though seen several times
        f"skipped 'memory', split 'train', index {i} (record {i})" for i in (12, 3, 4)
    ]


def test_evaluation_masks_what_it_skips():
    config = make_config(**{"data.on_corrupt": "skip"})
    walks = [list(make_eval(config, source)) for source in (memory(13), damaged(13, [3, 12]))]
    expected, found = ({key: np.concatenate([b[key] for b in walk]) for key in walk[0]} for walk in walks)
    assert np.flatnonzero(found["skipped"]).tolist() == [3, 12] and not expected["skipped"].any()
    assert np.flatnonzero(~found["mask"]).tolist() == [3, 12, 13, 14, 15]
    seen = found["mask"]
    np.testing.assert_array_equal(found["image"][seen], expected["image"][seen])
    np.testing.assert_array_equal(found["label"][seen], expected["label"][seen])
    assert not found["image"][~seen].any() and not found["label"][~seen].any()


@pytest.mark.parametrize("hosts", [1, 4])
def test_an_evaluation_that_reads_nothing_is_an_error(hosts):
    """Of four hosts the last two have nothing but padding."""
    config = make_config(**{"data.on_corrupt": "skip", "eval.batch_size": 16})
    for host in range(hosts):
        walk = iter(make_eval(config, damaged(7, range(7)), host, hosts))
        assert not next(walk)["mask"].any()
        if host < 2:
            count = 7 if hosts == 1 else (4, 3)[host]
            words = (
                rf"'memory', split 'train': none of the {count} examples of this host can be read, expected at least"
            )
            with pytest.raises(ValueError, match=words):
                next(walk)
        else:
            assert next(walk, None) is None
    batches = make_eval(make_config(**{"data.on_corrupt": "skip"}), damaged(13, range(12)))
    assert [int(batch["mask"].sum()) for batch in batches] == [0, 1]  # one is enough


def test_the_counter_is_there_only_where_asked_for():
    for on_corrupt, expected in ("error", set()), ("skip", {"skipped"}):
        config = make_config(**{"data.on_corrupt": on_corrupt})
        assert take(make_train(config, memory(13)), 1)[0].keys() == {"image", "label"} | expected
        assert next(iter(make_eval(config, memory(13)))).keys() == {"image", "label", "mask"} | expected


def test_a_source_that_is_gone_is_no_run_of_damaged_records():
    config = make_config(**{"data.on_corrupt": "skip", "data.threads": 1})
    stream = make_train(config, damaged(300, range(300)))
    with pytest.raises(ValueError, match=r"^data\.on_corrupt: 'memory', split 'train': none of the 100 examples from"):
        next(stream)
    last_but_one = memory(120)
    last_but_one.records[:99] = [b""] * 99
    assert take(make_train(config, last_but_one), 1)[0]["label"].min() >= 99


# Groups


def waiting_room(order, groups, batch_size, batches):
    """Batches as detectron2's `AspectRatioGroupedDataset` makes them, one example after the other."""
    waiting, made, position = {}, [], 0
    while len(made) < batches:
        example = order[position]
        room = waiting.setdefault(groups[example], [])
        room.append(example)
        if len(room) == batch_size:
            made.append(list(room))
            room.clear()
        position += 1
    return made


@pytest.mark.parametrize(("groups", "batch_size"), [("0010110", 2), ("0000001", 3), ("012", 5), ("00120012001", 4)])
def test_batches_of_one_group(groups, batch_size):
    groups = np.array([int(group) for group in groups])
    rng = np.random.default_rng(0)
    # Grain's own permutations of a few elements take 50 ms an element.
    order = grain.MapDataset.source([int(i) for _ in range(100) for i in rng.permutation(len(groups))])
    rows = Grouped(order, groups, batch_size)
    batches = [[rows[step * batch_size + row] for row in range(batch_size)] for step in range(60)]
    assert batches == waiting_room(order, groups, batch_size, 60)
    entered = Grouped(order, groups, batch_size)
    assert [entered[47 * batch_size + row] for row in range(batch_size)] == batches[47]


def test_order_of_evaluation():
    indices, real = eval_order(7, 3)
    assert indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6] and real.tolist() == [True] * 7 + [False] * 2
    indices, real = eval_order(7, 2, np.array([1, 0, 1, 1, 0, 0, 3]))
    assert indices.tolist() == [1, 4, 5, 5, 0, 2, 3, 3, 6, 6]
    assert real.tolist() == [True, True, True, False, True, True, True, False, True, False]
