"""The findings of `vitpyramid.tools.preflight` as lines of text."""

ESTIMATE = "the compiler's estimate, not measured"


def describe(report: dict) -> str:
    """What `preflight.preflight` found."""
    train, evaluation, unit = report["train"], report["eval"], report["unit"]
    each = train["flops"] / report["batch_size"]
    mesh = ", ".join(f"{name}={size}" for name, size in report["mesh"].items())
    slices = f" x {report['num_slices']} slices" if report["num_slices"] > 1 else ""
    where = f"{report['topology']}{slices}" if report["topology"] else "this machine"
    lines = [
        f"{report['title']} on {where}: {report['chips']} chips ({report['device_kind']}), mesh {mesh}",
        f"parameters    {report['parameters']:,}",
        f"batch         {report['batch_size']:,} {unit}, {report['batch_size'] / report['chips']:g} a chip; evaluation "
        f"{report['eval_batch_size']:,}",
        "",
        f"memory a device, {_gib(report['memory_limit'])} to be used",
        *_memory("training", train),
        *_memory("evaluation", evaluation),
        *_largest(report),
        "",
        f"FLOPs         training step {_si(train['flops'])}, {_si(each)} for each of the {unit}"
        + (f" ({_si(train['model_flops'])} without recomputation)" if train["model_flops"] < train["flops"] else "")
        + f"; evaluation step {_si(evaluation['flops'])}",
        *_times(report),
        *_collectives("training", train, report),
        *_collectives("evaluation", evaluation, report),
        *_operations(train),
    ]
    for step, name in ((train, "training"), (evaluation, "evaluation")):
        if step["error"]:
            lines += ["", f"what the compiler says of the {name} step:", step["error"]]
    return "\n".join(lines)


def _memory(name: str, step: dict) -> list[str]:
    memory, spare = step["memory"], step["spare"]
    verdict = ""
    if spare is not None:
        verdict = f"fits, {_gib(spare)} left" if step["fits"] else f"DOES NOT FIT, by {_gib(-spare)}"
    parts = [f"{part} {_gib(memory[part])}" for part in ("arguments", "temporaries", "peak")]
    return [f"  {name:12}{', '.join(parts)}; {verdict}".rstrip("; ")]


def _largest(report: dict) -> list[str]:
    found = report["largest_batch"]
    if not found:
        return []
    chips, lines = report["chips"], []
    compiled, line = found["compiled"], found["line"]
    tried = f"compiled: {', '.join(f'{int(batch):,}' for batch in found['tried'])}"
    if compiled:
        lines.append(f"largest batch {compiled:,} ({compiled / chips:g} a chip) fits; {tried}")
    else:
        lines.append(f"largest batch none that was compiled fits; {tried}")
    if line > (compiled or 0):
        lines.append(
            f"              about {line:,} ({line / chips:g} a chip) by a straight line through these, not compiled"
        )
    return lines


def _times(report: dict) -> list[str]:
    train, evaluation, steps = report["train"], report["eval"], report["steps"]
    if not report["topology"]:
        return ["times         are estimated for a --topology only"]
    lines = []
    for name, step in (("training step", train), ("evaluation step", evaluation)):
        if not step["estimate"]:
            reason = "it does not fit" if step["error"] else "the compiler gives no cycles for this chip"
            lines.append(f"times         none for the {name}: {step['text_error'] or reason}")
            continue
        found = step["estimate"]
        lines.append(
            f"estimate      {name} {found['seconds'] * 1e3:.2f} ms ({found['waiting_for_links'] * 1e3:.2f} ms of it "
            f"waiting for links), {found['images_per_second']:,.0f} {report['unit']}/s, "
            f"{found['images_per_second_per_chip']:,.0f} a chip, MFU {found['mfu']:.1%}"
        )
        if step["without_estimate"]:
            lines.append(f"              {step['without_estimate']} operations have no cycles and are left out")
    if steps is None:
        lines.append(f"hours         not known: {report['steps_unknown']}")
    elif train["estimate"]:
        lines.append(
            f"estimate      {train['estimate']['hours']:.2f} hours for {steps:,} steps, evaluation not counted"
        )
    return [*lines, f"              ({ESTIMATE})"]


def _collectives(name: str, step: dict, report: dict) -> list[str]:
    if not step["collectives"]:
        return ["", f"collectives of the {name} step: none"] if report["devices"] > 1 and not step["error"] else []
    lines = ["", f"collectives of the {name} step, a device"]
    lines.append(f"  {'kind':20}{'link':9}{'times':>6}{'MiB':>11}{'ms':>9}{'waited':>9}")
    for row in step["collectives"]:
        times = ["-" if row[key] is None else f"{row[key] * 1e3:.3f}" for key in ("seconds", "waited")]
        lines.append(
            f"  {row['kind']:20}{row['link']:9}{row['times']:6}{row['bytes'] / 2**20:11.3f}{times[0]:>9}{times[1]:>9}"
        )
    return lines


def _operations(step: dict) -> list[str]:
    rows = step["operations"]
    if not rows:
        return []
    timed = "seconds" in rows[0]
    lines = [
        "",
        f"costliest modules of the training step, forward and backward ({'ms, ' + ESTIMATE if timed else 'FLOPs'})",
    ]
    for row in rows:
        amount = f"{row['seconds'] * 1e3:.3f}" if timed else _si(row["flops"])
        lines.append(f"  {amount:>9} {row['share']:6.1%}  {row['module']}")
    return lines


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def _si(amount: float) -> str:
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if amount >= factor:
            return f"{amount / factor:.3g} {letter}"
    return f"{amount:.0f}"
