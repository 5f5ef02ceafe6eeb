"""The contract of a task: what is learned, as a record of functions. The training loop knows nothing else of it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from vitpyramid.tasks.metrics import Metrics

Batch = dict[str, Any]  # arrays with one row for each example, on the host or on the devices


class ConfigError(ValueError):
    """A config that cannot be run; the message names each key, its value and what was expected."""


@contextlib.contextmanager
def config_errors(prefix: str = "") -> Iterator[None]:
    """Data and weights that cannot be had are a config that cannot be run."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"{prefix}{error}") from error


@dataclasses.dataclass(frozen=True)
class Task:
    """What a training run needs to know of what it learns.

    Functions that are traced are pure: the same ones run on one CPU and on a pod. Those that open files do so when they
    are called, so an evaluation asks for nothing that only training has.

    Attributes:
      config: of the run, with what follows from the data filled in.
      title: network and data in a few words.
      unit: what one row of a batch is, in the plural: "images".
      model: the network.
      call: `(network, x, train) -> outputs`, how it is called, as a method of its own; None: `network(x, train)`. A
        network whose losses are made inside it, of samples and proposals, returns them, and `x` holds what it learns.
      network: what makes the network again, by config key; checkpoints keep it.
      num_examples: `() -> int`, of the training split.
      batch: `(evaluation: bool) -> {name: ShapeDtypeStruct}`, a global batch as hosts make it. Others of its
        names and dtypes may have other shapes: a step is compiled for each when the first one comes.
      train_batches: `(step) -> iterator` of this host's rows of each batch from `step` on: a function of the seed and
        the step alone.
      eval_batches: `() -> sized iterable` of this host's rows, every example once over all hosts.
      prepare: `(key, batch, constants) -> (x, targets)`, on the device: what `call` takes, and what `loss` needs.
        Leaves have one row for each example. All that is random and not part of the network happens here.
      prepare_eval: `batch -> x`, the same for an evaluation; nothing random.
      loss: `(outputs, targets) -> (scalar, metrics)`, means over the rows.
      measure: `(outputs, batch) -> metrics` of an evaluation. A result that is no sum over examples is a metric that
        collects what it needs and computes on the host.
      words: `{name: value} -> str`, metrics for a line of text; leaves names out that it does not know.
      files: `metrics -> {name: text}`, what an evaluation writes into the work directory.
      best: the name of the evaluation's metric that says how good the network is; larger is better.
      constants: `() -> variables` that steps read and never change, such as a teacher's.
      about: `() -> {name: value}`, JSON that checkpoints keep beside the arrays: `classes`, the names of classes,
        and of detectors `category_ids`, their ids in results.
      initial: `() -> variables` to start from, on the host; None: the network's own initialisation.
      without_weights: `() -> Task`, the same for compiling alone: no file of weights is read, `constants` are shapes.
        None: this one reads none.
    """

    config: ConfigDict
    title: str
    unit: str
    model: nn.Module
    network: Mapping[str, Any]
    num_examples: Callable[[], int]
    batch: Callable[[bool], dict[str, jax.ShapeDtypeStruct]]
    train_batches: Callable[[int], Iterator[Batch]]
    eval_batches: Callable[[], Sized]
    prepare: Callable[[jax.Array, Batch, dict], tuple[Any, Any]]
    prepare_eval: Callable[[Batch], Any]
    loss: Callable[[Any, Any], tuple[jax.Array, Metrics]]
    measure: Callable[[Any, Batch], Metrics]
    words: Callable[[Mapping[str, float]], str]
    best: str
    call: Callable[[nn.Module, Any, bool], Any] | None = None
    files: Callable[[Metrics], dict[str, str]] = lambda metrics: {}
    constants: Callable[[], dict] = dict
    about: Callable[[], dict[str, Any]] = dict
    initial: Callable[[], dict | None] = lambda: None
    without_weights: Callable[[], "Task"] | None = None
