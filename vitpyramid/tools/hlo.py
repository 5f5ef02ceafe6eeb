"""What a compiled program's text says: the TPU compiler's estimated cycles, and what goes between devices."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_OPCODE = re.compile(r"= .*? ([a-z][\w\-]*)\(")
_TYPES = re.compile(r"\b(pred|bf16|[suf]\d+)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation by name; "ENTRY" is the one that runs first."""
    computations, name = {}, None
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            name = "ENTRY" if found[1] else found[2]
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations


def _loop(line: str, computations: dict[str, list[str]]) -> tuple[str, int, bool] | None:
    """Body of the loop in a line, its turns (1 if unknown), and whether these are known."""
    found = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if not found:
        return None
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return found[2], int(known[1]), True
    trips = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[found[1]]))
    return found[2], int(trips[0]) if len(trips) == 1 else 1, len(trips) == 1


def cycles(text: str) -> collections.Counter:
    """Estimated cycles by operation name, of a compiled program's text; bodies of loops count for each turn.

    Key None counts operations without an estimate that are loops of unknown length or custom calls or collectives.
    """
    computations = _computations(text)

    def count(name: str) -> collections.Counter:
        total = collections.Counter()
        for line in computations[name]:
            op_name = re.search(r'op_name="([^"]*)"', line)
            if found := re.search(r'"estimated_cycles":"(\d+)"', line):
                total[op_name[1] if op_name else opcode(line)] += int(found[1])
            if loop := _loop(line, computations):
                body, turns, known = loop
                total[None] += not known
                total.update({key: value * turns for key, value in count(body).items()})
            elif re.search(r" (all-reduce|all-gather|reduce-scatter|custom-call)\(", line):
                total[None] += "estimated_cycles" not in line
        return total

    return count("ENTRY")


def opcode(line: str) -> str:
    """The operation of an instruction: "all-reduce"."""
    found = _OPCODE.search(line)
    return found[1] if found else "?"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: of the array that a device gets, or in a reduce-scatter gives.
      groups: groups of devices that take part together, by place in the mesh; of a permutation pairs.
      times: in one run of the program.
      between: estimated cycles of other work between its start and its end; 0 where the device waits for it.
      far: it goes between slices of TPUs. Their programs are compiled a slice each, so `groups` says nothing then.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...] = ()
    times: int = 1
    between: float = 0
    far: bool = False


def collectives(text: str, devices: int) -> list[Collective]:
    """Collectives of a compiled program's text for so many devices; those in a loop of unknown length count once."""
    computations, seen = _computations(text), set()

    def walk(name: str, times: int) -> Iterator[Collective]:
        started, passed = {}, 0  # cycles until here
        for line in computations.get(name, ()):
            passed += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line)))
            code = opcode(line)
            if code.endswith("-done"):
                begin, found = started.pop(re.search(rf" {code}\(%?([\w.\-]+)", line)[1], (0, []))
                yield from (dataclasses.replace(one, between=passed - begin) for one in found)
                continue
            found = list(inside(line, code, times))
            if name.startswith("all-reduce-scatter"):  # what a fusion of the two is called
                found = [dataclasses.replace(one, kind="reduce-scatter") for one in found]
            if code.endswith("-start") or code == "send":
                started[line.replace("ROOT ", "").split()[0].lstrip("%")] = passed, found
            else:
                yield from found

    def inside(line: str, code: str, times: int) -> Iterator[Collective]:
        if one := _collective(line, code, devices):
            channel = re.search(r"channel_id=(\d+)", line)
            if one.between != math.inf or channel[1] not in seen:  # else a further step of the same one
                yield dataclasses.replace(one, times=times)
            if one.between == math.inf:
                seen.add(channel[1])
        elif loop := _loop(line, computations):
            yield from walk(loop[0], times * loop[1])
        elif code in ("fusion", "call", "conditional", "async-start", "call-start"):
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip(" %") for branch in branches.split(",")]
            for inner in called:
                yield from walk(inner, times)

    return list(walk("ENTRY", 1))


def _collective(line: str, code: str, devices: int) -> Collective | None:
    kind = code.removesuffix("-start")
    if code == "send" and (far := re.search(r'_xla_megascale_transfer_type="(\w+)"', line)):
        kind = "collective-permute" if far[1] == "ONE_TO_ONE" else far[1].lower().replace("_", "-")
        return Collective(kind, _sizes(line)[0], far=True)
    if kind not in COLLECTIVES:
        return None
    groups, sizes = _groups(line, devices), _sizes(line)
    if kind != code and kind != "all-reduce":  # (operands, results, contexts)
        operands = line.split(f" {code}(", 1)[1].split(")")[0].count("%") or 1
        sizes = sizes[operands : 2 * operands]
    size = sum(sizes) * (len(groups[0]) if kind == "reduce-scatter" else 1)
    # It runs in steps, beside the work of several fusions.
    return Collective(kind, size, groups, between=math.inf if "async_collective_fusion_config" in line else 0)


def _sizes(line: str) -> list[int]:
    """Bytes of each array in an instruction's result."""
    shapes = _TYPES.findall(re.split(rf" {opcode(line)}\(", line.partition(" = ")[2])[0])
    widths = [1 if kind == "pred" else int(re.sub(r"\D", "", kind)) // 8 or 1 for kind, _ in shapes]
    sides = [[int(side) for side in sides.split(",") if side] for _, sides in shapes]
    return [width * math.prod(shape) for width, shape in zip(widths, sides, strict=True)]


def _groups(line: str, devices: int) -> tuple[tuple[int, ...], ...]:
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line):
        groups = re.findall(r"\{([\d, ]+)\}", found[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        count, size, sides = int(found[1]), int(found[2]), [int(side) for side in found[3].split(",")]
        axes = [int(axis) for axis in found[4].split(",")] if found[4] else list(range(len(sides)))
        flat = _transposed(sides, axes)
        return tuple(tuple(flat[size * i : size * (i + 1)]) for i in range(count))
    return (tuple(range(devices)),)


def _transposed(sides: Sequence[int], axes: Sequence[int]) -> list[int]:
    """0, 1 ... laid out in an array with these sides, its axes permuted, read in order."""
    strides = [math.prod(sides[axis + 1 :]) for axis in range(len(sides))]
    places = [0]
    for axis in axes:
        places = [place + strides[axis] * index for place in places for index in range(sides[axis])]
    return places


@dataclasses.dataclass(frozen=True)
class Links:
    """What connects devices.

    Attributes:
      places: of each device its slice, or process.
      names: of the links within a place, and between places.
      rates: bytes a second that a device sends over each; None: not known.
      slices: of TPUs.
      clock: cycles a second of a device.
    """

    places: Sequence[int]
    names: tuple[str, str]
    rates: tuple[float, float] | None = None
    slices: int = 1
    clock: float = 1.0


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Collectives of one kind over one link, of a step.

    Attributes:
      kind: one of `COLLECTIVES`.
      link: between which devices.
      times: how often a step does them.
      bytes: of the arrays, a device.
      seconds: that the links need for them at their full rate; None: rates not known.
      waited: the part of it for which devices have no other work.
    """

    kind: str
    link: str
    times: int
    bytes: int
    seconds: float | None
    waited: float | None


def transfers(found: Sequence[Collective], links: Links) -> list[Transfer]:
    """Collectives by kind and link, most bytes first; those of a device alone are left out."""
    totals: dict[tuple[str, str], list] = {}
    for one in found:
        group = max(one.groups, key=lambda group: len(set(group)), default=())
        if not one.far and len(set(group)) < 2:
            continue
        places = links.slices if one.far else max(len({links.places[k] for k in group}) for group in one.groups)
        row = totals.setdefault((one.kind, links.names[one.far or places > 1]), [0, 0, 0.0, 0.0])
        row[0] += one.times
        row[1] += one.times * one.bytes
        if links.rates:
            seconds = _seconds(one, len(group), places, links.rates)
            row[2] += one.times * seconds
            row[3] += one.times * max(0.0, seconds - one.between / links.clock)
    rows = [
        Transfer(kind, link, times, size, *((seconds, waited) if links.rates else (None, None)))
        for (kind, link), (times, size, seconds, waited) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes)


def _seconds(one: Collective, group: int, places: int, rates: tuple[float, float]) -> float:
    """Time of rings within places at full rate, then of each device's share between places."""
    near, far = rates
    passes = 2 if one.kind == "all-reduce" else 1
    if one.far:
        return one.bytes / far * (1 if one.kind == "collective-permute" else passes * (places - 1) / places)
    if one.kind == "collective-permute":
        return one.bytes / (far if places > 1 else near)
    inside = max(1, group // places)
    return passes * one.bytes * ((inside - 1) / inside / near + (places - 1) / places / inside / far)


def module_path(op_name: str) -> str:
    """Module of an operation's name, forward and backward pass together.

    "jit(train_step)/transpose(jvp(PVT))/PVT.encode/block1_0/attn/q/dot_general" -> "block1_0/attn/q". What no module
    does has the function's name in angle brackets, what has no name "<other>".
    """
    *parts, _ = op_name.split("/")
    functions = [found[1] for part in parts if (found := re.match(r"jit\((\w+)\)$", part))]
    kept = [part for part in parts if part and not re.search(_NO_MODULE, part)]
    if kept or not functions:
        return "/".join(kept) or "<other>"
    return f"<{functions[0]}>"


# Functions and transformations in parentheses, methods, and what loops, branches and recomputed blocks add.
_NO_MODULE = r"[().]|^(while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation)$"


def by_module(amounts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Amounts by operation name, such as cycles, summed by module, largest first."""
    total = collections.Counter()
    for name, amount in amounts.items():
        total[module_path(name)] += amount
    return total.most_common()
