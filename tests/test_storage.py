"""Work directories, weights and data in a bucket: what holds on a disk holds there, and what does not is said."""

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

import fake_gcs
import soak
from harness import random_state_dict
from streams import make_config
from test_folder import make_tree
from test_prepared import FORMATS, imagenet, open_imagenet  # noqa: F401
from test_toy_task import boxes
from test_train import tensorboard_tags
from test_workdir import python
from vitpyramid import files, load_pretrained
from vitpyramid.data import open_source
from vitpyramid.files import as_path
from vitpyramid.tasks import ConfigError
from vitpyramid.tools import convert
from vitpyramid.train import lease, loop
from vitpyramid.train.workdir import held, open_workdir
from vitpyramid.train.writer import GrowingObject
from vitpyramid.weights import intact, store

RUN = {"epochs": 1.0}  # 20 steps, saved at 5, 10, 15 and 20


@pytest.fixture(scope="module")
def bucket():
    with fake_gcs.serve() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served.environment.items():
            patch.setenv(name, value)
        patch.setattr(lease, "BEAT", 0.2)
        yield served


@pytest.fixture(autouse=True)
def served(bucket):
    """The bucket serves all requests again after each test, and only names of the run that several tests read stay."""
    yield
    bucket.status = lambda method, name: None
    for name in bucket.names():
        if not name.startswith("whole/"):
            del bucket.objects[name]


@pytest.fixture(scope="module")
def whole(bucket):
    workdir = open_workdir("gs://bucket/whole")
    summary = loop.train(boxes(**RUN), workdir)
    assert summary.step == 20
    return workdir


def lines(bucket, name):
    return [json.loads(line) for line in bucket.objects[f"{name}/metrics.jsonl"].content.decode().splitlines()]


def upload(bucket, folder, name):
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())


def numbers(records):
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


def test_a_run_leaves_in_a_bucket_what_it_leaves_on_a_disk(bucket, whole, tmp_path):
    loop.train(boxes(**RUN), tmp_path)
    assert soak.differing(soak.arrays(whole, 20), soak.arrays(tmp_path, 20)) == []
    on_disk = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert numbers(lines(bucket, "whole")) == numbers(on_disk)
    assert bucket.objects["whole/config.json"].content == (tmp_path / "config.json").read_bytes()
    for name in bucket.names("whole/tensorboard/"):
        (tmp_path / "copy" / "tensorboard").mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / "tensorboard" / Path(name).name).write_bytes(bucket.objects[name].content)
    assert tensorboard_tags(tmp_path / "copy") == tensorboard_tags(tmp_path) > {"train/loss"}
    assert "whole/.owner.json" not in bucket.objects
    assert not Path("gs:").exists()
    # A step is marked as complete after all else of it is there, its checksums included.
    written = [name for method, name in bucket.calls if method in ("POST", "PUT") and "whole/checkpoints/20/" in name]
    assert written[-1] == "whole/checkpoints/20/commit_success.txt"
    assert "whole/checkpoints/20/checksums.json" in written[-6:-1]
    assert loop.evaluate_checkpoint(boxes(**RUN), whole)[0] == 20


KILLED = """
from test_toy_task import boxes
from vitpyramid.train import lease, loop
from vitpyramid.train.workdir import open_workdir
lease.BEAT = 0.2
loop.train(boxes(epochs=1.0), open_workdir("gs://bucket/killed"))
"""


def test_a_run_that_is_killed_in_a_save_ends_with_the_same_bits(bucket, whole, monkeypatch):
    process = []

    def kill(method, name):
        if process and method == "POST" and name == "killed/checkpoints/10/commit_success.txt":
            process[0].send_signal(signal.SIGKILL)
            return 503
        return None

    bucket.status = kill
    process.append(python(KILLED))
    output = process[0].communicate()[1]
    assert process[0].returncode == -signal.SIGKILL, output
    bucket.status = lambda method, name: None
    workdir = as_path("gs://bucket/killed")
    assert "killed/checkpoints/10/checksums.json" in bucket.objects and "killed/.owner.json" in bucket.objects
    assert intact.steps(workdir / "checkpoints") == [5]
    assert [record["step"] for record in lines(bucket, "killed")][:5] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(lease, "PATIENCE", 1.0)
    loop.train(boxes(**RUN), workdir)
    assert soak.differing(soak.arrays(workdir, 20), soak.arrays(whole, 20)) == []
    assert numbers(lines(bucket, "killed")) == numbers(lines(bucket, "whole"))


def test_a_damaged_checkpoint_is_set_aside(bucket, whole):
    for name in bucket.names("whole/"):
        bucket.put(name.replace("whole", "damaged", 1), bucket.objects[name].content)
    largest = max(bucket.names("damaged/checkpoints/20/state/"), key=lambda name: len(bucket.objects[name].content))
    content = bytearray(bucket.objects[largest].content)
    content[len(content) // 2] ^= 1
    bucket.put(largest, content)
    before = bucket.names("damaged/checkpoints/20/")
    workdir = as_path("gs://bucket/damaged")
    assert intact.newest_intact(workdir / "checkpoints") == 15
    assert bucket.names("damaged/checkpoints/20/") == before  # nothing is moved but by a run
    assert intact.newest_intact(workdir / "checkpoints", set_aside=True) == 15
    with store.open_checkpoints(workdir) as manager:
        assert manager.all_steps() == [15]
    moved = [name.replace("20.damaged-1", "20") for name in bucket.names("damaged/checkpoints/20.damaged-1/")]
    assert moved == before and not bucket.names("damaged/checkpoints/20/")


def test_a_work_directory_is_held_by_one_run(bucket, monkeypatch):
    workdir = as_path("gs://bucket/held")
    with held(workdir) as check:
        check()
        with (
            pytest.raises(ConfigError, match=r"--workdir=gs://bucket/held: process \d+ on .* has been running"),
            held(workdir),
        ):
            pass
        check()
        # Cut off for so long that another run took it for dead: it saves no more, and leaves the other's alone.
        bucket.put("held/.owner.json", json.dumps({"token": "another"}).encode())
        with pytest.raises(OSError, match="another run has taken this folder over"):
            check()
    assert b"another" in bucket.objects["held/.owner.json"].content
    monkeypatch.setattr(lease, "PATIENCE", 1.0)
    with held(workdir):  # that one does not write to it any more
        owner = bucket.objects["held/.owner.json"]
        assert b"another" not in owner.content
        beaten = threading.Event()
        while not beaten.wait(0.1) and bucket.objects["held/.owner.json"].generation == owner.generation:
            pass
    assert "held/.owner.json" not in bucket.objects


def test_of_two_runs_that_start_at_once_one_holds_it(bucket):
    first, second = (lease.Lease(as_path("gs://bucket/race/.owner.json")) for _ in range(2))
    look = first._look

    def taken_meanwhile(blob):
        seen = look(blob)
        if not second._generation:
            second.acquire({"token": "second"})
        return seen

    first._look = taken_meanwhile
    with pytest.raises(FileExistsError):
        first.acquire({"token": "first"})
    second.check()
    second.release()


def test_lines_are_there_before_their_checkpoint(bucket):
    """And a profile, which JAX writes to disks alone."""
    task = boxes(epochs=0.5)
    task.config.profile.start = task.config.profile.steps = 1
    first = len(bucket.calls)
    loop.train(task, as_path("gs://bucket/lines"))
    written = [name for method, name in bucket.calls[first:] if method == "POST"]
    complete = written.index("lines/checkpoints/5/commit_success.txt")
    assert written.index("lines/metrics.jsonl", written.index("lines/metrics.jsonl") + 1) < complete
    assert [record["step"] for record in lines(bucket, "lines") if "train/loss" in record] == list(range(1, 11))
    assert any(name.endswith(".xplane.pb") for name in bucket.names("lines/tensorboard/plugins/profile/"))


def test_a_bucket_that_refuses_for_a_while_costs_nothing(bucket):
    refused = threading.Event()
    bucket.status = lambda method, name: refused.set() or 403
    growing = GrowingObject("gs://bucket/grows", b"0")
    growing.write(b"1")
    growing.flush()
    assert refused.wait(60)
    with pytest.raises(OSError, match="gs://bucket/grows: Forbidden"):
        growing.sync()
    bucket.status = lambda method, name: None
    growing.write(b"2")
    growing.close()
    assert bucket.objects["grows"].content == b"012"


def test_weights(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    state_dict = random_state_dict("pvt_micro")
    bucket.put("in/pvt.safetensors", save(state_dict))
    run = lambda *args: monkeypatch.setattr("sys.argv", ["convert", *args]) or convert.main()  # noqa: E731
    assert run("gs://bucket/in/pvt.safetensors", "--out=gs://bucket/out") == 0
    assert json.loads(bucket.objects["out/conversion.json"].content)["source"] == "gs://bucket/in/pvt.safetensors"
    assert run("gs://bucket/in/pvt.safetensors", "--out=gs://bucket/out") == 1  # nothing is replaced
    assert run("gs://bucket/out", "--to-torch", "--out=gs://bucket/back/pvt.safetensors") == 0
    (tmp_path / "back").write_bytes(bucket.objects["back/pvt.safetensors"].content)
    back = load_file(tmp_path / "back")
    assert back.keys() == state_dict.keys()
    assert all(np.array_equal(back[key], state_dict[key]) for key in back)

    (cached,) = (tmp_path / "cache").rglob("pvt.safetensors")
    before = cached.stat()
    _, folder = load_pretrained("gs://bucket/out")
    _, file = load_pretrained("gs://bucket/in/pvt.safetensors")
    assert all(np.array_equal(*pair) for pair in zip(*map(leaves, (folder, file)), strict=True))
    assert cached.stat() == before  # neither downloaded again
    changed = save({key: array + 1 for key, array in state_dict.items()})
    bucket.put("in/pvt.safetensors", changed)  # another version is no longer the one in the cache
    _, newer = load_pretrained("gs://bucket/in/pvt.safetensors")
    assert not any(np.array_equal(*pair) for pair in zip(*map(leaves, (newer, file)), strict=True))
    assert len(list((tmp_path / "cache").rglob("pvt.safetensors"))) == 2
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/nothing: no such file or folder"):
        load_pretrained("gs://bucket/nothing")


def leaves(variables):
    import jax

    return jax.tree.leaves(variables)


def contents(source):
    return [source[index] for index in range(len(source))]


def test_folders_of_images(bucket, tmp_path):
    upload(bucket, make_tree(tmp_path), "images")
    bucket.put("images/train/dog/.hidden/x.png", b"")
    bucket.put("images/val/ant/notes.txt", b"")  # a class without an image has to have something in a bucket
    for split in ("train", "train+val", "train[:50%]"):
        there, here = (
            open_source(make_config(root, **{"data.name": "folder", "data.eval_split": "val"}).data, split)
            for root in ("gs://bucket/images", tmp_path)
        )
        assert there.records.paths == here.records.paths and there.num_classes == 3
        assert contents(there) == contents(here)
    assert there.where(0).startswith("'gs://bucket/images/train/")


def test_prepared_sets(bucket, imagenet, tmp_path, monkeypatch):  # noqa: F811
    for file_format in FORMATS:
        upload(bucket, imagenet[0] / file_format, f"tfds/{file_format}")
    root = GsFolder("gs://bucket/tfds")
    source = open_imagenet(root, "tfrecord")
    assert contents(source) == imagenet[1]["train"]
    with pytest.raises(ValueError, match="array_record: ArrayRecord's library reads no buckets|gcsfuse"):
        open_imagenet(root, "array_record")
    first = len(bucket.calls)
    assert contents(open_imagenet(root, "tfrecord"))[0] == imagenet[1]["train"][0]
    shards = [call for call in bucket.calls[first:] if "imagenet2012-train.tfrecord" in call[1]]
    assert len(shards) < 3 * 20 + 20  # the index is kept: a request for each record, and for each file's version


class GsFolder(str):
    """A bucket's folder, with the one operator of paths that the helpers use."""

    def __truediv__(self, name):
        return GsFolder(f"{self}/{name}")


def test_what_is_missing_is_said_in_one_line(bucket, monkeypatch):
    def words(error, act, *args):
        with pytest.raises(error) as raised:
            act(*args)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "--workdir=s3://bucket/run: expected a path or gs://" in words(ConfigError, open_workdir, "s3://bucket/run")
    assert "gs://elsewhere/run: no bucket 'elsewhere'" in words(OSError, open_workdir, "gs://elsewhere/run")
    bucket.status = lambda method, name: 403
    assert "gcloud auth application-default login" in words(OSError, open_workdir, "gs://bucket/run")
    config = make_config("gs://bucket/images", **{"data.name": "folder"}).data
    assert "data.data_dir: gs://bucket/images: Forbidden" in words(ValueError, open_source, config, "train")
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    for act, args in [(open_workdir, ("gs://bucket/run",)), (load_pretrained, ("gs://bucket/run",))]:
        assert "gs://bucket/run: expected gcsfs: pip install 'vitpyramid[gcs]'" in words(ValueError, act, *args)
    assert as_path("run") == Path("run") and os.fspath(as_path("~/run")) == "~/run"
