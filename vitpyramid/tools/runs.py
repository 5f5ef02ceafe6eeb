"""Runs side by side: what each has reached, and in which keys their configs differ.

    python -m vitpyramid.tools.runs runs
    python -m vitpyramid.tools.runs runs/a runs/b --metric=ema_top1 --json

A run is a folder with a `config.json`; folders that are none are searched, three levels deep. The best run comes first.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from vitpyramid.files import as_path
from vitpyramid.tasks import TASKS
from vitpyramid.train.config import flatten
from vitpyramid.train.writer import read_history

CONFIG = "config.json"
_DEEP = 3
# Keys that say where and how a run was made, not what.
_LEFT_OUT = ("data.data_dir", "data.threads", "data.workers", "log.", "profile.", "checkpoint.", "compile_cache")
_WIDEST = 24  # characters of a value in the table


@dataclasses.dataclass(frozen=True)
class Run:
    """What a work directory says.

    Attributes:
      path: of the work directory.
      config: values by key, "optim.lr".
      step: the last one that was reported.
      metric: by whose name runs are compared, as an evaluation calls it: "top1".
      best, best_step: its best value, and when; None without an evaluation.
      last: its last value; None likewise.
      images_per_second: of training, of the last line; None if there is none.
    """

    path: str
    config: dict
    step: int
    metric: str
    best: float | None
    best_step: int | None
    last: float | None
    images_per_second: float | None


def find_runs(names: list[str]) -> list[Path]:
    """Work directories among these folders, or in them; sorted by name.

    Raises:
      ValueError: there is none in one of them.
      OSError: a folder cannot be listed.
    """
    found = []
    for name in names:
        inside = list(_runs_in(as_path(name), _DEEP))
        if not inside:
            raise ValueError(f"{name}: expected a folder with {CONFIG}, or with such folders in it")
        found += inside
    return list(dict.fromkeys(found))


def _runs_in(folder: Path, deep: int) -> Iterator[Path]:
    if (folder / CONFIG).is_file():
        yield folder
    elif deep and folder.is_dir():
        for inside in sorted(folder.iterdir()):
            if inside.is_dir() and not inside.name.startswith("."):
                yield from _runs_in(inside, deep - 1)


def read_run(workdir: Path, metric: str = "") -> Run:
    """What a run has reached.

    Args:
      metric: of an evaluation, "top1" or "loss"; "": the one by which the run's task tells its best. Larger is better,
        of losses smaller.

    Raises:
      ValueError: its `config.json` cannot be read, or there is no such metric in its evaluations.
    """
    try:
        config = flatten(json.loads((workdir / CONFIG).read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{workdir / CONFIG}: {error}") from error
    metric = metric or getattr(TASKS.get(config.get("task")), "BEST", "loss")
    history = read_history(workdir)
    evaluations = [record for record in history if any(name.startswith("eval/") for name in record)]
    values = {record["step"]: record[f"eval/{metric}"] for record in evaluations if f"eval/{metric}" in record}
    if evaluations and not values:
        known = sorted(name.removeprefix("eval/") for name in evaluations[-1] if name != "step")
        raise ValueError(f"{workdir}: no metric {metric!r} in its evaluations; expected one of {', '.join(known)}")
    best_step = _better(metric)(values, key=values.get, default=None)
    speeds = [value for record in history for name, value in record.items() if name.endswith("_per_second")]
    return Run(
        path=str(workdir),
        config=config,
        step=max((record["step"] for record in history), default=0),
        metric=metric,
        best=values.get(best_step),
        best_step=best_step,
        last=values[max(values)] if values else None,
        images_per_second=speeds[-1] if speeds else None,
    )


def _better(metric: str):
    return min if metric.endswith("loss") else max


def ranked(runs: list[Run]) -> list[Run]:
    """The best first, those without an evaluation last."""

    def rank(run: Run) -> float:
        if run.best is None:
            return math.inf
        return run.best if _better(run.metric) is min else -run.best

    return sorted(runs, key=rank)


def differing(runs: list[Run]) -> dict[str, list]:
    """Of each key in which configs differ its value in each run, None where a run has no such key."""
    keys = sorted(set().union(*(run.config for run in runs)))
    rows = {key: [run.config.get(key) for run in runs] for key in keys if not key.startswith(_LEFT_OUT)}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def describe(runs: list[Run]) -> str:
    """Runs as a table, and below it the keys in which they differ."""
    header = ("", "run", "step", "best", "at", "last", "metric", "images/s")
    rows = [header]
    for number, run in enumerate(runs, start=1):
        best, last = (_shown(value, run.metric) for value in (run.best, run.last))
        speed = "-" if run.images_per_second is None else f"{run.images_per_second:.0f}"
        rows.append((str(number), run.path, str(run.step), best, str(run.best_step or "-"), last, run.metric, speed))
    text = _table(rows, left=(1, 6))
    differences = differing(runs)
    if len(runs) > 1:
        numbers = ("", *map(str, range(1, len(runs) + 1)))
        values = [(key, *(_brief(value) for value in row)) for key, row in differences.items()]
        text += "\n\n" + (_table([numbers, *values], left=(0,)) if values else "the configs do not differ")
    return text


def _shown(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if metric.split("_")[-1] in ("top1", "top5") else f"{value:.4f}"


def _brief(value) -> str:
    text = "-" if value is None else str(value) or "''"
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def _table(rows: list[tuple[str, ...]], left: tuple[int, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def main(argv: list[str] | None = None) -> None:
    """The command. Prints to stdout; exits with 2 where the arguments make no sense."""
    parser = argparse.ArgumentParser("python -m vitpyramid.tools.runs", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="*", default=["runs"], metavar="FOLDER", help="runs, or folders of runs; default: runs"
    )
    parser.add_argument("--metric", default="", help="of the evaluation, to compare by; default: the task's own")
    parser.add_argument("--json", action="store_true", help="a list of what the runs say, configs included")
    args = parser.parse_args(argv)
    try:
        runs = ranked([read_run(path, args.metric) for path in find_runs(args.folders)])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(json.dumps([dataclasses.asdict(run) for run in runs], indent=2) if args.json else describe(runs))


if __name__ == "__main__":
    sys.exit(main())
