"""Two processes of main.py on this machine: a request to stop, a death, two folders, and going on."""

import signal
import threading

import pytest

import soak
from vitpyramid.weights.intact import steps


@pytest.fixture(scope="module")
def rest(tmp_path_factory, data_dir):
    """Where the data lie, and a folder of compiled programs."""
    return data_dir, tmp_path_factory.mktemp("cache")


def read(run):
    """Takes a run's output, so that it never waits for a reader."""
    thread = threading.Thread(target=run.until, args=("no such line",), daemon=True)
    thread.start()
    return thread


def ends(runs):
    codes = []
    for run in runs:
        codes.append(run.process.wait(timeout=600))
    return codes


def test_two_processes_stop_together_end_together_and_go_on(rest, tmp_path):
    first, second = runs = soak.start([tmp_path] * 2, rest)
    reader = read(second)
    assert first.until(r"step +3/"), first.output
    second.process.send_signal(signal.SIGINT)  # one of them hears it, both save and leave
    readers = [read(first), reader]
    assert ends(runs) == [75, 75], first.output + second.output
    for thread in readers:
        thread.join()
    assert "stopped" in first.output and "step " not in second.output
    stopped = steps(tmp_path / "checkpoints")[0]
    assert 3 <= stopped < soak.STEPS

    first, second = runs = soak.start([tmp_path] * 2, rest)
    reader = read(first)
    read(second)
    while reader.is_alive() and f"going on from step {stopped}" not in first.output:
        reader.join(0.1)
    while reader.is_alive() and f"step {stopped + 2:2d}/" not in first.output:
        reader.join(0.1)
    second.process.kill()
    # The collective fails at once; where the coordination service is first, it ends the process with SIGABRT.
    assert ends(runs)[0] in (76, -signal.SIGABRT)
    reader.join()
    assert "another process has ended" in first.output or "another task died" in first.output

    (alone,) = soak.start([tmp_path], rest)
    assert alone.end() == 0, alone.output
    assert "going on from step" in alone.output
    assert steps(tmp_path / "checkpoints")[0] == soak.STEPS


def test_two_folders_are_found_out_at_the_start(rest, tmp_path):
    first, second = soak.start([tmp_path / "a", tmp_path / "b"], rest)
    assert [first.end(), second.end()] == [1, 1]
    for run in (first, second):
        assert "expected one folder that all 2 processes see" in run.output, run.output
    assert not (tmp_path / "a" / "checkpoints").exists()
