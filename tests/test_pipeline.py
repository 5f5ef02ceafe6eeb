"""vitpyramid.data.make_train and make_eval: what is in which batch, errors, and how streams end."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import grain
import numpy as np
import pytest

from streams import assert_same, make_config, memory, python_environment, run_python, side_by_side, take
from vitpyramid.data import augment, make_eval, make_train, open_source

# Training stream


def test_every_epoch_is_a_fresh_permutation():
    source = memory(13)  # not a multiple of the batch size: batches straddle epochs
    labels = np.concatenate([batch["label"] for batch in take(make_train(make_config(), source), 13)])
    epochs = labels.reshape(8, 13)
    assert [sorted(epoch) for epoch in epochs] == [list(range(13))] * 8
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_train_batch_shapes_and_dtypes():
    config = make_config(**{"data.image_size": (6, 9)})
    [batch] = take(make_train(config, memory(13), process_count=2), 1)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((4, 6, 9, 3), np.uint8),
        "label": ((4,), np.int32),
    }


def test_the_same_image_is_augmented_anew_each_epoch():
    batches = take(make_train(make_config(batch_size=1), memory(1)), 8)
    assert len({batch["image"].tobytes() for batch in batches}) == 8


def test_the_seed_decides_order_and_crops():
    one, same, other = (take(make_train(make_config(seed=seed), memory(13)), 2) for seed in (0, 0, 1))
    assert_same(one, same)
    assert not np.array_equal(one[0]["label"], other[0]["label"])
    single = [take(make_train(make_config(seed=seed, batch_size=1), memory(1)), 1)[0]["image"] for seed in (0, 1)]
    assert not np.array_equal(*single)


@pytest.mark.parametrize("hosts", [1, 2])
def test_start_step_equals_skipping(hosts):
    config, source = make_config(), memory(13)
    for host in range(hosts):
        straight = take(make_train(config, source, 0, host, hosts), 9)
        assert_same(take(make_train(config, source, 5, host, hosts), 4), straight[5:])


def test_start_step_costs_nothing():
    batch = take(make_train(make_config(), memory(13), start_step=10**12), 1)[0]  # reading up to it would take years
    assert batch["label"].shape == (8,)


@pytest.mark.parametrize(("batch_size", "hosts"), [(8, 2), (8, 4), (96, 2), (74, 2)])
def test_hosts_side_by_side_are_one_host(batch_size, hosts):
    config, source = make_config(batch_size=batch_size), memory(13)
    shares = [take(make_train(config, source, 2, host, hosts), 3) for host in range(hosts)]
    assert_same(side_by_side(shares), take(make_train(config, source, 2), 3))


@pytest.mark.parametrize("batch_size", [1, 8, 37, 96])
def test_batch_size_only_cuts_the_stream(batch_size):
    order = grain.MapDataset.range(13).seed(3).shuffle().repeat()  # pinned: a resumed run must find its order again
    labels = np.concatenate([b["label"] for b in take(make_train(make_config(batch_size=batch_size), memory(13)), 3)])
    np.testing.assert_array_equal(labels, [order[i] for i in range(3 * batch_size)])


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_do_not_matter(threads):
    source = memory(13)
    batches = take(make_train(make_config(batch_size=96, **{"data.threads": threads}), source), 3)
    assert_same(batches, take(make_train(make_config(batch_size=96), source), 3))


def test_workers_do_not_matter(data_dir):
    keys = {"batch_size": 96, "eval.batch_size": 96}
    plain, workers = make_config(data_dir, **keys), make_config(data_dir, **keys, **{"data.workers": 2})
    source = open_source(plain.data, "train[:200]")
    assert_same(take(make_train(workers, source, 1), 4), take(make_train(plain, source, 1), 4))
    assert_same(list(make_eval(workers, source)), list(make_eval(plain, source)))


# Evaluation


@pytest.mark.parametrize(("batch_size", "hosts"), [(1, 1), (13, 1), (5, 1), (16, 1), (12, 2), (4, 4), (12, 4), (40, 2)])
def test_eval_covers_every_example_once(batch_size, hosts):
    config, source = make_config(**{"eval.batch_size": batch_size}), memory(13)
    shares = [make_eval(config, source, host, hosts) for host in range(hosts)]
    assert {len(share) for share in shares} == {math.ceil(13 / batch_size)}
    batches = side_by_side([list(share) for share in shares])
    assert len(batches) == len(shares[0])
    flat = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    assert all(len(value) == len(batches) * batch_size for value in flat.values())
    assert flat["mask"].dtype == bool and flat["label"].dtype == np.int32
    np.testing.assert_array_equal(flat["label"][flat["mask"]], np.arange(13))
    np.testing.assert_array_equal(np.flatnonzero(flat["mask"]), np.arange(13))
    for index in range(13):
        image = augment.eval_crop(augment.decode(source[index]["image"]), 8, 0.875)
        np.testing.assert_array_equal(flat["image"][index], np.asarray(image))


def test_eval_can_be_walked_again_even_when_left_early():
    batches = make_eval(make_config(), memory(13))
    for _ in batches:
        break
    assert_same(list(batches), list(batches))
    assert [int(batch["mask"].sum()) for batch in batches] == [8, 5]


# Errors and endings


@pytest.mark.parametrize("make", [make_train, make_eval])
def test_a_damaged_record_is_named(make):
    source = memory(13)
    source.records[7] = source.records[7][:60]
    batches = iter(make(make_config(), source))
    with pytest.raises(ValueError, match=r"'memory', split 'train', index 7 \(record 7\): not a readable image"):
        take(batches, 2)
    assert list(batches) == []  # it does not go on with shifted batches


@pytest.mark.parametrize(("make", "key"), [(make_train, "batch_size"), (make_eval, "eval.batch_size")])
def test_batch_size_must_divide_by_hosts(make, key):
    with pytest.raises(ValueError, match=f"^{key}: 8 .* 3"):
        make(make_config(), memory(13), process_index=0, process_count=3)
    with pytest.raises(ValueError, match="process_index 2"):
        make(make_config(), memory(13), process_index=2, process_count=2)


def test_a_closed_stream_has_ended():
    stream = make_train(make_config(), memory(13))
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_exit_is_quiet_and_tensorflow_stays_out(data_dir, tmp_path, workers):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from streams import make_config
        from vitpyramid.data import make_eval, make_train, open_source
        if __name__ == "__main__":  # workers import this file
            config = make_config(sys.argv[1], **{"data.workers": int(sys.argv[2]), "eval.batch_size": 100})
            stream = make_train(config, open_source(config.data, "train"))
            batch, other = next(stream), next(stream)
            evaluation = iter(make_eval(config, open_source(config.data, "test")))
            mask = next(evaluation)["mask"]
            print(mask.sum(), "tensorflow" in sys.modules)  # and leaves with everything open
        """)
    )
    done = run_python(script, data_dir, workers)
    assert (done.returncode, done.stdout, done.stderr) == (0, "100 False\n", "")


SHARED_MEMORY = Path("/dev/shm")


@pytest.mark.skipif(not SHARED_MEMORY.is_dir() or not Path("/proc/self/stat").exists(), reason="as Linux shows them")
def test_workers_end_with_a_killed_parent(data_dir, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, os, signal, sys, time
        from streams import make_config
        from vitpyramid.data import make_train, open_source
        if __name__ == "__main__":
            config = make_config(sys.argv[1], **{"data.workers": 2})
            stream = make_train(config, open_source(config.data, "train"))
            next(stream)
            time.sleep(0.5)  # until there is shared memory that nobody received
            print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    before = set(SHARED_MEMORY.iterdir())
    command = [sys.executable, script, data_dir]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=python_environment()
    ) as parent:
        workers = parent.stdout.readline().split()
    assert parent.returncode == -signal.SIGKILL and len(workers) == 2
    shared = set(SHARED_MEMORY.iterdir()) - before
    assert any(path.name.startswith("psm_") for path in shared)
    deadline = time.monotonic() + 10
    try:
        while any(map(is_running, workers)) or any(path.exists() for path in shared):
            assert time.monotonic() < deadline, "workers or shared memory outlive the parent"
            time.sleep(0.1)
        assert set(SHARED_MEMORY.iterdir()) <= before  # nothing was added after the kill
    finally:
        for worker in filter(is_running, workers):
            os.kill(int(worker), signal.SIGKILL)


def is_running(process):
    """Whether a process is there and no zombie, as it is where nobody waits for orphans."""
    try:
        return Path(f"/proc/{process.decode()}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
