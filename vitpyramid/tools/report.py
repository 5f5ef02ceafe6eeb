"""What a classifier gets right and wrong: accuracy by class, which classes it takes for which, the worst mistakes.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart --mode=eval --report

writes into `WORKDIR/report`:

    report.json     step, metrics, and of each class its name, examples, accuracy and what it is taken for; the mistakes
    confusion.csv   examples by class (rows) and prediction (columns)
    confusion.png   the same as a picture: shares of each row
    mistakes.png    the images whose own class was the least probable, each with its class and what it was taken for
"""

import csv
import dataclasses
import functools
import io
import json
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from PIL import Image, ImageDraw, ImageFont

from vitpyramid import data
from vitpyramid.data import augment
from vitpyramid.files import write_atomically
from vitpyramid.tasks import ConfigError, Task
from vitpyramid.tasks.metrics import Metrics
from vitpyramid.tools import preview
from vitpyramid.tools.classes import saved_names
from vitpyramid.tools.draw import printable
from vitpyramid.train import loop

_LISTED = 20  # classes in the printed table
_TAKEN_FOR = 3  # other classes that are named beside one
_SMALL = 40  # classes that have their names and numbers in the picture
_CELL = 28  # pixels of the picture, of a class


@flax.struct.dataclass
class _Rows(clu_metrics.CollectingMetric.from_outputs(("label", "predicted", "probability", "own", "mask"))):
    """Of each example: its label, the prediction, that one's probability and that of the label."""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """An example whose prediction is not its label.

    Attributes:
      index: its place in the evaluation's split.
      place: its file, or file and record.
      label, predicted: classes.
      probability, label_probability: of these two.
      image: uint8 [H, W, 3], as the network saw it.
    """

    index: int
    place: str
    label: int
    predicted: int
    probability: float
    label_probability: float
    image: np.ndarray


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
      step: of the checkpoint.
      weights: "raw", or "ema", their moving average, where there is one.
      metrics: of the evaluation.
      words: the same as a line.
      names: of the K classes.
      confusion: int64 [K, K], examples by label (rows) and prediction (columns).
      mistakes: those that gave their labels the least probability, worst first.
    """

    step: int
    weights: str
    metrics: dict[str, float]
    words: str
    names: list[str]
    confusion: np.ndarray
    mistakes: list[Mistake]

    @property
    def accuracy(self) -> np.ndarray:
        """By class, float64 [K]; NaN where there are no examples."""
        with np.errstate(invalid="ignore"):
            return np.diagonal(self.confusion) / self.confusion.sum(axis=1)


def examine(task: Task, workdir: Path, worst: int = 25) -> Report:
    """Evaluates the newest checkpoint in `workdir`, or converted weights, and looks at every example.

    Args:
      task: of classification.
      worst: how many mistakes to show at most.

    Raises:
      ConfigError: another task, or one that does not fit the data or the checkpoint.
      OSError: no checkpoint is intact, or a file cannot be read.
    """
    config = task.config
    if config.task != "classify":
        raise ConfigError(f"--report: expected task = 'classify', the config has {config.task!r}")
    examined = dataclasses.replace(task, measure=functools.partial(_measure, task))
    step, measured = loop.measure_checkpoint(examined, workdir)
    rows = {prefix: one.pop("rows") for prefix, one in measured.items()}
    average = "ema_" in rows
    rows = {name: np.asarray(values) for name, values in rows["ema_" if average else ""].compute().items()}
    metrics = loop.numbers(measured)
    source = data.open_source(config.data, config.data.eval_split)
    count, real = len(source.class_names), rows["mask"]
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (rows["label"][real], rows["predicted"][real]), 1)
    wrong = np.flatnonzero(real & (rows["label"] != rows["predicted"]))
    wrong = wrong[np.argsort(rows["own"][wrong], kind="stable")][:worst]
    settings = augment.from_config(config.data)
    mistakes = [
        Mistake(
            index=int(index),
            place=source.where(int(index)),
            label=int(rows["label"][index]),
            predicted=int(rows["predicted"][index]),
            probability=float(rows["probability"][index]),
            label_probability=float(rows["own"][index]),
            image=augment.eval_image(source[int(index)]["image"], settings),
        )
        for index in wrong
    ]
    names = saved_names({"about": {"classes": list(source.class_names)}})
    return Report(step, "ema" if average else "raw", metrics, task.words(metrics), names, confusion, mistakes)


def _measure(task: Task, logits: jax.Array, batch: dict) -> Metrics:
    probabilities = jax.nn.softmax(logits)
    own = jnp.take_along_axis(probabilities, batch["label"][:, None], axis=1)[:, 0]
    rows = _Rows.from_model_output(
        label=batch["label"],
        predicted=jnp.argmax(logits, axis=1),
        probability=probabilities.max(axis=1),
        own=own,
        mask=batch["mask"],
    )
    return task.measure(logits, batch) | {"rows": rows}


def write(report: Report, folder: Path) -> str:
    """Writes a report into a folder, on the first process, and returns what to print of it. Raises `OSError`."""
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", json.dumps(as_json(report), indent=2) + "\n")
        table = io.StringIO()
        rows = ([name, *row] for name, row in zip(report.names, report.confusion.tolist(), strict=True))
        csv.writer(table).writerows([["", *report.names], *rows])
        write_atomically(folder / "confusion.csv", table.getvalue().encode(errors="backslashreplace"))
        write_atomically(folder / "confusion.png", _png(confusion_picture(report.confusion, report.names)))
        if report.mistakes:
            write_atomically(folder / "mistakes.png", _png(mistakes_picture(report)))
    return f"evaluation at step {report.step}: {report.words}\n\n{describe(report)}\n\nreport  {folder}"


def _png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "png")
    return file.getvalue()


def as_json(report: Report) -> dict:
    """What `report.json` says."""
    mistakes = [
        dataclasses.asdict(mistake)
        | {"image": None, "label": report.names[mistake.label], "predicted": report.names[mistake.predicted]}
        for mistake in report.mistakes
    ]
    return {
        "step": report.step,
        "weights": report.weights,
        "metrics": report.metrics,
        "classes": [
            {
                "name": name,
                "examples": int(row.sum()),
                "correct": int(row[label]),
                "accuracy": None if not row.sum() else float(row[label] / row.sum()),
                "taken_for": {report.names[other]: int(row[other]) for other in _taken_for(row, label)},
            }
            for label, (name, row) in enumerate(zip(report.names, report.confusion, strict=True))
        ],
        "mistakes": [{key: value for key, value in mistake.items() if key != "image"} for mistake in mistakes],
    }


def _taken_for(row: np.ndarray, label: int) -> list[int]:
    """Classes that a class is most often taken for."""
    others = [k for k in np.argsort(-row, kind="stable")[: _TAKEN_FOR + 1] if k != label and row[k]]
    return [int(k) for k in others[:_TAKEN_FOR]]


def describe(report: Report) -> str:
    """Accuracy by class as lines of text, the worst first; of many classes those alone."""
    accuracy = report.accuracy
    order = [label for label in np.argsort(accuracy, kind="stable") if not np.isnan(accuracy[label])]
    shown = order[:_LISTED]
    width = max([len("class"), *(len(report.names[label]) for label in shown)])
    lines = [f"{'class':{width}}  accuracy  examples  taken for"]
    for label in shown:
        row = report.confusion[label]
        others = ", ".join(f"{report.names[k]} {row[k]}" for k in _taken_for(row, label))
        lines.append(f"{report.names[label]:{width}}  {accuracy[label]:8.2%}  {row.sum():8d}  {others}".rstrip())
    if len(order) > len(shown):
        lines.append(f"{len(order) - len(shown)} classes with a higher accuracy are in report.json")
    return "\n".join(lines)


def confusion_picture(confusion: np.ndarray, names: list[str]) -> Image.Image:
    """The shares of each row of a matrix [K, K] in shades of blue; of few classes with their names and numbers."""
    count = len(confusion)
    small = count <= _SMALL
    cell = _CELL if small else max(1, 1000 // count)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    shades = 255 - np.rint(shares[..., None] * (255 - np.array((8, 48, 107)))).astype(np.uint8)
    picture = Image.fromarray(np.repeat(np.repeat(shades, cell, axis=0), cell, axis=1))
    if not small:
        return picture
    font = ImageFont.load_default()
    draw = ImageDraw.Draw(picture)
    for row, column in np.argwhere(confusion):
        colour = "white" if shares[row, column] > 0.5 else "black"
        centre = (column + 0.5) * cell, (row + 0.5) * cell
        draw.text(centre, str(confusion[row, column]), colour, font, anchor="mm")
    edge = int(max(font.getlength(printable(name)) for name in names)) + 8
    page = Image.new("RGB", (edge + count * cell + 1, edge + count * cell + 1), "white")
    page.paste(picture, (edge, edge))
    for place, name in enumerate(names):
        label = Image.new("RGB", (edge, cell), "white")
        ImageDraw.Draw(label).text((edge - 4, cell / 2), printable(name), "black", font, anchor="rm")
        page.paste(label, (0, edge + place * cell))
        page.paste(label.rotate(-90, expand=True), (edge + place * cell, 0))
    return page


def mistakes_picture(report: Report) -> Image.Image:
    """The images of the mistakes, each above "its class: what it was taken for, with which probability"."""
    captions = [
        f"{report.names[mistake.label][:9]}: {report.names[mistake.predicted][:9]} {mistake.probability:.0%}"
        for mistake in report.mistakes
    ]
    title = "worst mistakes: class, what it was taken for"
    return preview.sheet(title, np.stack([mistake.image for mistake in report.mistakes]), captions)
