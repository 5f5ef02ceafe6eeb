"""What a config's training and evaluation steps will take, compiled for devices that need not be there.

    python main.py --config=configs/pvt.py:large --mode=preflight --topology=v5e:16x16 [--num_slices=2] [--json]

The steps are the ones that training runs. `preflight` gives the findings as a dictionary, which `--json` prints.
Nothing is read from or written to a work directory, a data set or a file of weights.

FLOPs are twice the multiply-accumulates of the traced step (`macs.py`), whatever form a sum has on a device. Memory is
what the compiler reports. Times are the TPU compiler's estimated cycles and what the links need at their full rate:
estimates, not measurements, and without the wait for data.
"""

import collections
import dataclasses
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vitpyramid.data.splits import split_ranges
from vitpyramid.tasks import ConfigError, Task, make_task
from vitpyramid.tools import chips, hlo, macs
from vitpyramid.tools.preflight_text import describe
from vitpyramid.train import program
from vitpyramid.train.config import validate
from vitpyramid.train.sharding import make_mesh

log = logging.getLogger(__name__)

# Classes and splits of data sets that need not be there to be counted.
KNOWN = {
    "imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
    "digits": (10, {"train": 1_437, "test": 360}),
    "cifar10": (10, {"train": 50_000, "test": 10_000}),
    "cifar100": (100, {"train": 50_000, "test": 10_000}),
}
OPERATIONS = 20  # that are listed
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def preflight(
    config: ConfigDict, reference: ConfigDict, topology: str = "", num_slices: int = 1, search_compiles: int = 2
) -> dict:
    """Compiles the steps of a config.

    Args:
      reference: a config with every key there is, to check this one against.
      topology: such as "v5e:16x16"; "": this machine's devices.
      num_slices: of that topology, connected by the data-centre network.
      search_compiles: further compilations that the search of the largest batch may take.

    Returns:
      What can be written as JSON: `title`, `jax`, `device_kind`, `topology` (None: this machine), `num_slices`,
      `chips`, `devices`, `mesh`, `parameters`, `unit` (of a batch's rows), `batch_size`, `eval_batch_size`,
      `memory_limit` (bytes of a device, or None), `fits`, `steps` (of the recipe; None where `steps_unknown` says why),
      `largest_batch` (as the function of this name gives it), and of the two steps, `train` and `eval`:

      * `fits`, `spare` (bytes, negative where it does not fit), `memory` (bytes of a device by part), `error` (the
        compiler's, with the largest buffers), `compile_seconds`;
      * `flops` of a whole batch, `model_flops` without what is computed a second time;
      * `cycles` (estimated), `without_estimate` (how many operations have none), `operations` (`module`, `seconds` or
        `flops`, `share`), `collectives` (rows of `hlo.Transfer`), `text_error` (why the program's text is missing);
      * `estimate`, None without cycles: `seconds`, `waiting_for_links` (a part of them), `images_per_second`,
        `images_per_second_per_chip`, `mfu`, and in `train` `hours` of the recipe's training steps.

    Raises:
      ConfigError: the config cannot be run there; no such topology, or no compiler for it.
    """
    if num_slices > 1 and not topology:
        raise ConfigError(f"--num_slices={num_slices}: expected a --topology beside it")
    devices = chips.absent_devices(topology, num_slices) if topology else jax.devices()
    chip = chips.CHIPS[topology.partition(":")[0]] if topology else None
    num_chips = len(devices) // (chip.devices if chip else 1)
    config = _with_classes(config)
    validate(config, reference, len(devices), evaluation=True)
    mesh = make_mesh(config.mesh.fsdp, devices)
    limit = chip.hbm if chip else _local_memory(devices)
    on_tpu = devices[0].platform == "tpu"
    links = hlo.Links(
        places=[0 if on_tpu else device.process_index for device in mesh.devices.flat],
        names=("ICI", "DCN") if on_tpu else ("host", "network"),
        rates=(chip.ici / chip.devices, chip.dcn / chip.devices) if chip else None,
        slices=num_slices,
        clock=chip.clock if chip else 1.0,
    )
    task, missing = _task(config)
    with jax.set_mesh(mesh):
        training = program.build(task, mesh)
        batch_bytes = _bytes(program.abstract_batch(task, mesh))
        held = _bytes((training.state, training.constants))
        train = _examine("train step", *program.train_step_for(task, training, mesh), limit, held + batch_bytes, links)
        if config.model.remat:
            train["model_flops"] = _flops(_task(_without_recomputation(config))[0], mesh)
        variables = training.state.variables
        evaluation = _examine(
            "evaluation step", *program.eval_step_for(task, variables, mesh), limit, _bytes(variables), links
        )

    def needs(batch: int) -> float:
        larger = config.copy_and_resolve_references().unlock()
        larger.batch_size = batch
        log.info("looking for the largest batch: trying %s", f"{batch:,}")
        task, _ = _task(larger)
        with jax.set_mesh(mesh):
            training = program.build(task, mesh)
            step, shapes = program.train_step_for(task, training, mesh)
            return _compile("train step", step, shapes, limit, held)["memory"]["peak"]

    report = {
        "title": task.title,
        "jax": jax.__version__,
        "device_kind": devices[0].device_kind,
        "topology": topology or None,
        "num_slices": num_slices,
        "chips": num_chips,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(training.state.params)),
        "unit": task.unit,
        "batch_size": config.batch_size,
        "eval_batch_size": config.eval.batch_size,
        "memory_limit": limit,
        "fits": train["fits"] and evaluation["fits"] if limit else None,
        "train": train,
        "eval": evaluation,
        "steps": None if missing else training.horizon.total_steps,
        "steps_unknown": missing,
        "largest_batch": None,
    }
    for step, batch in ((train, config.batch_size), (evaluation, config.eval.batch_size)):
        step["estimate"] = _estimate(step, batch, num_chips, chip)
    if train["estimate"] and not missing:
        train["estimate"]["hours"] = train["estimate"]["seconds"] * report["steps"] / 3600
    if limit:
        unit = _batch_unit(config, reference, len(devices))
        report["largest_batch"] = largest_batch(
            needs, {config.batch_size: train["memory"]["peak"]}, held, limit, unit, search_compiles
        )
    return report


def run(
    config: ConfigDict, reference: ConfigDict, topology: str, num_slices: int, search_compiles: int, as_json: bool
) -> bool:
    """The command: prints the findings, progress goes to the log; whether the steps fit."""
    report = preflight(config, reference, topology, num_slices, search_compiles)
    print(json.dumps(report, indent=2) if as_json else describe(report))
    return report["fits"] is not False


def largest_batch(
    needs: Callable[[int], float], known: dict[int, float], held: float, limit: float, unit: int, compiles: int
) -> dict:
    """The largest batch whose step fits, by straight lines through what batches need.

    Args:
      needs: bytes of a device that a batch needs; it compiles.
      known: the same of batches that are compiled.
      held: of no batch: the state.
      limit: bytes that a device has.
      unit: batches are multiples of it.
      compiles: how often `needs` may be called.

    Returns:
      `compiled`: the largest that was compiled and fits, or None; `line`: the largest by the last line, which was not
      compiled if it is larger; `tried`: bytes by batch.
    """
    tried = {0: held} | known

    def line() -> int:
        best, beyond = bounds()
        # What is held at 0 is no point of the line, since some of a step's memory does not grow with the batch.
        points = sorted(filter(None, tried), key=lambda batch: abs(tried[batch] - limit))[:2]
        low, high = sorted(points if len(points) == 2 else [0, *points])
        slope = (tried[high] - tried[low]) / (high - low)
        most = beyond - 1 if beyond else 16 * high  # no line is good for more
        batch = low + (limit - tried[low]) / slope if slope > 0 else most
        return max(int(min(batch, most)) // unit * unit, best)

    def bounds() -> tuple[int, int | None]:
        beyond = [batch for batch, size in tried.items() if size > limit]
        return max((b for b, size in tried.items() if size <= limit), default=0), min(beyond, default=None)

    for _ in range(compiles):
        batch = line()
        if batch <= 1.02 * bounds()[0]:
            break
        tried[batch] = needs(batch)
    sizes = {batch: size for batch, size in sorted(tried.items()) if batch}
    return {"compiled": bounds()[0] or None, "line": line(), "tried": sizes}


def _with_classes(config: ConfigDict) -> ConfigDict:
    """The config with the number of classes of a known data set, where it says 0."""
    config = config.copy_and_resolve_references().unlock()
    if config.get("task") == "classify" and config.model.num_classes == 0 and config.data.name in KNOWN:
        config.model.num_classes = KNOWN[config.data.name][0]
    return config


def _task(config: ConfigDict) -> tuple[Task, str]:
    """The task, without its weights, and why the number of examples is not known, if it is not."""
    task = make_task(config)
    task = task.without_weights() if task.without_weights else task
    name, split, missing = config.data.name, config.data.train_split, ""
    try:
        if name in KNOWN:
            examples = sum(len(part) for _, part in split_ranges(name, split, KNOWN[name][1]))
        else:
            examples = task.num_examples()
    except ValueError as error:
        if name in KNOWN:
            raise ConfigError(str(error)) from error
        examples, missing = config.batch_size, str(error)
    return dataclasses.replace(task, num_examples=lambda: examples), missing


def _local_memory(devices: list[jax.Device]) -> int | None:
    """Bytes that a device of this machine has; of CPUs their part of the machine's; None if not known."""
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats or devices[0].platform != "cpu" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return stats.get("bytes_limit")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def _bytes(tree) -> int:
    """Of a device's part of arrays with these shapes and shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _batch_unit(config: ConfigDict, reference: ConfigDict, devices: int) -> int:
    """What batches are multiples of."""
    other, least = config.copy_and_resolve_references().unlock(), config.optim.accumulate * devices
    for times in range(1, 65):
        other.batch_size = other.eval.batch_size = unit = times * least
        try:
            validate(other, reference, devices, evaluation=True)
            return unit
        except ConfigError:
            continue
    return config.batch_size


def _examine(what: str, function, shapes: tuple, limit: float | None, held: int, links: hlo.Links) -> dict:
    """Everything that is known of a step before it runs."""
    found = _multiply_accumulates(function, shapes)
    step = _compile(what, function, shapes, limit, held)
    compiled = step.pop("compiled", None)
    step |= {"flops": 2 * found.total(), "model_flops": 2 * found.total(), "cycles": None, "collectives": []}
    step |= {"without_estimate": 0, "text_error": None, "operations": _costliest(found, "flops", 2)}
    if compiled is None:
        return step
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        return step | {"text_error": str(error).splitlines()[0]}
    cycles = hlo.cycles(text)
    step["without_estimate"] = cycles.pop(None, 0)
    transfers = hlo.transfers(hlo.collectives(text, len(links.places)), links)
    step["collectives"] = [dataclasses.asdict(transfer) for transfer in transfers]
    if links.rates and cycles:
        step["cycles"] = cycles.total()
        step["operations"] = _costliest(cycles, "seconds", 1 / links.clock)
    return step


def _costliest(amounts: collections.Counter, unit: str, factor: float) -> list[dict]:
    total = max(1, amounts.total())
    rows = hlo.by_module(amounts)[:OPERATIONS]
    return [{"module": module, unit: amount * factor, "share": amount / total} for module, amount in rows]


def _multiply_accumulates(function: jax.stages.Wrapped, shapes: tuple) -> collections.Counter:
    """Of a step by operation; `shapes` are of what it takes, the batch second."""
    names = ["images" if place == 1 else "weights" for place, tree in enumerate(shapes) for _ in jax.tree.leaves(tree)]
    sources = [frozenset({name}) for name in names]
    return macs.walk(function.trace(*shapes).jaxpr.jaxpr, sources)[0]


def _without_recomputation(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references().unlock()
    if config.model.scan:  # rules over parameters that are stacked
        config.optim.lr_rules = ()
    config.model.remat = config.model.scan = False
    return config


def _flops(task: Task, mesh: Mesh) -> int:
    """Of the training step."""
    training = program.build(task, mesh)
    return 2 * _multiply_accumulates(*program.train_step_for(task, training, mesh)).total()


def _compile(what: str, function, shapes: tuple, limit: float | None, held: int) -> dict:
    """The compiled step, its memory in bytes of a device, and by how much it fits."""
    start = time.perf_counter()
    try:
        compiled = program.compile_logged(what, function, *shapes)
    except jax.errors.JaxRuntimeError as error:
        needed = memory_needed(str(error), held)
        if needed is None:
            raise
        log.info("the %s does not fit, found after %.1f s", what, time.perf_counter() - start)
        memory = dict.fromkeys(("temporaries", "outputs", "code")) | {"arguments": held, "peak": needed}
        found = {"fits": False, "spare": (limit or 0) - needed, "memory": memory, "error": largest_buffers(str(error))}
        return found | {"compile_seconds": time.perf_counter() - start}
    stats = compiled.memory_analysis()
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # The compiler's peak is of arrays alone, and smaller than their sum where lifetimes do not meet.
    peak = max(stats.peak_memory_in_bytes, arguments + outputs + temporaries) + stats.generated_code_size_in_bytes
    memory = {"temporaries": temporaries, "outputs": outputs, "code": stats.generated_code_size_in_bytes}
    memory |= {"arguments": arguments, "peak": peak}
    found = {"compiled": compiled, "error": None, "compile_seconds": time.perf_counter() - start, "memory": memory}
    return found | {"fits": peak <= limit if limit else None, "spare": limit - peak if limit else None}


def memory_needed(message: str, held: int) -> float | None:
    """Bytes that a compiler's error says the program needs; None: it is another error.

    `held`: bytes of the program's arguments, which some messages leave out.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"([\d.]+)([KMGT])"
    if found := re.search(rf"Used {size} of", message):
        return float(found[1]) * _UNITS[found[2]]
    if found := re.search(rf"temporaries \({size}\)", message):
        return float(found[1]) * _UNITS[found[2]] + held
    return None


def largest_buffers(message: str, lines: int = 60) -> str:
    """The part of an out-of-memory error that people read: what is needed, and the largest buffers."""
    return "\n".join(line.rstrip() for line in message.splitlines()[:lines] if line.strip())


def _estimate(step: dict, batch: int, num_chips: int, chip: chips.Chip | None) -> dict | None:
    """Times of a step from estimated cycles; None without any."""
    if chip is None or not step["cycles"]:
        return None
    waited = sum(row["waited"] for row in step["collectives"])
    seconds = step["cycles"] / chip.clock + waited
    rate = batch / seconds
    mfu = step["model_flops"] / seconds / num_chips / chip.flops
    return {
        "seconds": seconds,
        "waiting_for_links": waited,
        "images_per_second": rate,
        "images_per_second_per_chip": rate / num_chips,
        "mfu": mfu,
    }
