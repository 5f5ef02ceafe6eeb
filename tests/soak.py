"""Runs of main.py that are killed again and again, and must end with the bits of one that was not.

    python tests/soak.py --kills=100

Kills (SIGKILL) fall at random moments of a run and, every second one, inside a save; of two processes one or both are
killed. A table of what was done is printed at the end, and the seed at the beginning.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from vitpyramid.configs import quickstart
from vitpyramid.weights.intact import steps
from vitpyramid.weights.store import open_checkpoints

ROOT = Path(__file__).parent.parent
CHANGES = {
    "epochs": 2.0,
    "ema.decay": 0.9,
    "model.drop_rate": 0.1,
    "eval.every_epochs": 1.0,
    "checkpoint.every_epochs": 0.25,
    "log.every_steps": 1,
    "schedule.warmup_epochs": 0.5,
    "schedule.cooldown_epochs": 0.0,
}
STEPS = 44
SCENES = {"data.train_split": "train[:176]", "data.eval_split": "test[:40]"}  # as many steps


class Run:
    """`main.py` in a process of its own, on one device, with its output at hand."""

    def __init__(self, workdir: Path, data_dir: Path, cache: Path, *args: str, family: str = "pvt"):
        changes = {**CHANGES, "data.data_dir": data_dir, "compile_cache": cache}
        changes |= SCENES if family in quickstart.DENSE else {}
        command = [sys.executable, "main.py", f"--config=configs/quickstart.py:{family}", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in changes.items()]
        flags = re.sub("--xla_force_host_platform_device_count=[0-9]+", "", os.environ.get("XLA_FLAGS", ""))
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*command, *args], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.output = ""

    def until(self, pattern: str) -> bool:
        """Reads up to a line with `pattern`; False if the run ends before."""
        for line in self.process.stdout:
            self.output += line
            if re.search(pattern, line):
                return True
        return False

    def stop(self, signum: int) -> int:
        """The exit code after a signal."""
        self.process.send_signal(signum)
        return self.end()

    def end(self) -> int:
        """The exit code."""
        self.output += self.process.communicate(timeout=1200)[0]
        return self.process.returncode


def arrays(workdir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of the checkpoint of `step`, which must be the newest, by name."""
    assert steps(workdir / "checkpoints")[0] == step
    with open_checkpoints(workdir, read_only=True) as manager:
        tree = manager.item_metadata(step)["state"].tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        state = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def differing(ours: dict, theirs: dict) -> list[str]:
    """Names of arrays that are not the same bits in both."""
    return [name for name in ours | theirs if not np.array_equal(ours.get(name), theirs.get(name))]


def wait_for_a_save(workdir: Path, process: subprocess.Popen) -> None:
    """Returns when a checkpoint is being written that was not before, or the process has ended."""
    folder = workdir / "checkpoints"
    seen = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    while process.poll() is None:
        if folder.is_dir() and any("tmp" in path.name for path in folder.iterdir() if path.name not in seen):
            return
        time.sleep(0.0005)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(workdirs: list[Path], rest: tuple, family: str = "pvt") -> list[Run]:
    """The processes of one run, each with its work directory, which should be the same."""
    if len(workdirs) == 1:
        return [Run(workdirs[0], *rest, family=family)]
    flags = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={len(workdirs)}"]
    return [Run(path, *rest, *flags, f"--process_id={i}", family=family) for i, path in enumerate(workdirs)]


def soak(folder: Path, kills: int, family: str, processes: int, rng: np.random.Generator) -> dict:
    """Kills a run `kills` times, lets it end, and compares it with an uninterrupted one."""
    rest = (folder / "data", folder / "cache")
    whole, workdir = (folder / f"{family}{processes}-{name}" for name in ("whole", "killed"))
    for run in start([whole] * processes, rest, family):
        assert run.end() == 0, run.output
    counts = {"family": family, "processes": processes, "kills": 0, "in a save": 0, "after the end": 0, "skipped": 0}
    while counts["kills"] < kills:
        runs = start([workdir] * processes, rest, family)
        for run in runs[1:]:
            threading.Thread(target=run.until, args=("never",), daemon=True).start()
        inside = counts["kills"] % 2 == 1
        began = runs[0].until("going on from step|from the start")
        if inside and began:
            wait_for_a_save(workdir, runs[0].process)
            time.sleep(rng.uniform(0, 0.1))
        elif began:
            runs[0].until(rf"step +\d*{rng.integers(10)}/") if rng.random() < 0.7 else time.sleep(rng.uniform(0, 6))
        ended = runs[0].process.poll() is not None
        victims = runs if rng.random() < 0.5 else [runs[rng.integers(len(runs))]]
        for run in victims:
            run.process.kill()
        for run in runs:
            try:
                run.process.wait(timeout=180)
            except subprocess.TimeoutExpired:
                run.process.kill()
        counts["kills"] += 1
        counts["in a save"] += inside
        counts["after the end"] += ended
        counts["skipped"] += runs[0].output.count("skipped the checkpoint")
        print(f"{family}, {processes} processes: kill {counts['kills']} of {kills}", file=sys.stderr, flush=True)
        if ended:
            for path in sorted((workdir / "checkpoints").iterdir()):  # all but its beginning is done again
                shutil.rmtree(path)
    for run in start([workdir] * processes, rest, family):
        assert run.end() == 0, run.output
    counts["arrays that differ"] = len(differing(arrays(workdir), arrays(whole)))
    return counts


def main() -> int:
    """The command; exit code 1 if any bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="in all, over families and numbers of processes")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    kinds = [(family, 1) for family in ("pvt", "t2t_vit", "rest", "detect", "mask")] + [("pvt", 2), ("mask", 2)]
    share = -(-args.kills // len(kinds))
    rng, differ = np.random.default_rng(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for family, processes in kinds:
            row = soak(Path(folder), share, family, processes, rng)
            if (family, processes) == kinds[0]:
                print(f"| {' | '.join(row)} |\n|" + " --- |" * len(row))
            print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
            differ += row["arrays that differ"]
    return int(differ > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
