"""vitpyramid.tools.preflight: what compiled programs say of themselves, with libtpu and without it."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
from configs import base, pit, pvt, quickstart
from vitpyramid.models import registry
from vitpyramid.tasks import ConfigError, make_task
from vitpyramid.tools import chips, hlo, macs, preflight
from vitpyramid.tools.preflight_text import describe
from vitpyramid.tools.summary import count_macs
from vitpyramid.train.sharding import make_mesh

ROOT = Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed: '.[tpu]'"
)

# Lines as XLA writes them for a TPU, shortened: eight devices; a loop of three turns with an all-reduce; a permutation
# beside 700 cycles of work; a gather in steps within two fusions; a fused reduce-scatter; an offloaded all-reduce;
# a transfer between slices; a loop whose turns are not known.
TEXT = """HloModule jit_train_step, is_scheduled=true

%condition (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f.1 = f32[4]{0:T(128)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(train_step)/jvp(PVT)/PVT.encode/block1_0/attn/mul"}, backend_config={"estimated_cycles":"100"}
  ROOT %all-reduce.1 = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[10]{0:T(128)}) all-reduce(%f.1, %g), channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
}

%free (p: (s32[])) -> (s32[]) {
  ROOT %f.2 = s32[] fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"5"}
}

%forever (p: (s32[])) -> pred[] {
  ROOT %less.2 = pred[] compare(%i, %j), direction=LT
}

%fused (p: f32[4]) -> f32[4] {
  ROOT %m = f32[4] multiply(%p, %p)
}

%step.1 (p: bf16[2,8]) -> bf16[8,8] {
  %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%step.2 (p: bf16[2,8]) -> bf16[8,8] {
  %all-gather.2 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%all-reduce-scatter.1 (p: f32[8,8]) -> f32[1,8] {
  %all-reduce.2 = f32[8,8]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[1,8] dynamic-slice(%all-reduce.2, %a, %b), dynamic_slice_sizes={1,8}
}

%called_computation (p: f32[2,8]) -> f32[2,8] {
  ROOT %all-reduce.3 = f32[2,8]{1,0:T(8,128)} all-reduce(%p), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %collective-permute-start = (u8[16,3]{1,0}, u8[16,3]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=5, source_target_pairs={{0,7},{7,0}}
  %f.3 = f32[4]{0} fusion(%p), kind=kLoop, calls=%step.1, metadata={op_name="jit(train_step)/transpose(jvp(PVT))/PVT.encode/block1_0/attn/dot_general"}, backend_config={"estimated_cycles":"700"}
  %collective-permute-done = u8[16,3]{1,0} collective-permute-done(%collective-permute-start)
  %f.4 = f32[4]{0} fusion(%p), kind=kLoop, calls=%step.2, metadata={op_name="jit(train_step)/mul"}, backend_config={"estimated_cycles":"40"}
  %f.5 = f32[1,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %offloaded-start = ((f32[2,8]), f32[2,8], s32[]) call-start(%f.5), to_apply=%called_computation
  %offloaded-done = f32[2,8] call-done(%offloaded-start)
  %send.1 = (bf16[6,3]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%f.5, %t), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=1
  %while.1 = (s32[], f32[4]) while(%tuple), condition=%condition, body=%body
  ROOT %while.2 = (s32[]) while(%tuple.2), condition=%forever, body=%free
}
"""  # noqa: E501


def test_cycles_count_loops_by_their_turns():
    found = hlo.cycles(TEXT)
    assert found.pop(None) == 3 + 1  # all-reduces of the loop; the loop of unknown length
    assert sum(found.values()) == 3 * 100 + 700 + 40 + 5
    assert hlo.by_module(found) == [("block1_0/attn", 1000), ("<train_step>", 40), ("<other>", 5)]


def test_module_path():
    for name, path in {
        "jit(train_step)/jvp(PVT)/PVT.encode/block1_0/attn/sr/cond/branch_0_fun/dot_general": "block1_0/attn/sr",
        "jit(f)/transpose(jvp(ViT))/while/body/checkpoint/rematted_computation/blocks/mlp/fc1/mul": "blocks/mlp/fc1",
        "jit(f)/jvp(PVT)/PVT.encode/block2_0/DropPath_0/jit(_bernoulli)/jit(_uniform)/add": "block2_0/DropPath_0",
        "jit(train_step)/jvp(jit(log_softmax))/exp": "<train_step>",
        "multiply.148": "<other>",
    }.items():
        assert hlo.module_path(name) == path


def test_collectives_by_kind_and_link():
    links = hlo.Links([0] * 8, ("ICI", "DCN"), rates=(100.0, 10.0), slices=2, clock=1000.0)
    rows = {(row.kind, row.link): row for row in hlo.transfers(hlo.collectives(TEXT, 8), links)}
    looped = 2 * 4 * 8 + 4 * 10
    expected = {
        ("all-reduce", "ICI"): (4, 3 * looped + 64, 2 * 3 * looped * 3 / 4 / 100 + 2 * 64 * 7 / 8 / 100),
        ("all-gather", "ICI"): (1, 128, 128 * 3 / 4 / 100),
        ("reduce-scatter", "ICI"): (1, 256, 256 * 7 / 8 / 100),
        ("collective-permute", "ICI"): (1, 48, 0.48),
        ("all-reduce", "DCN"): (1, 36, 2 * 36 / 2 / 10),
    }
    assert {key: (row.times, row.bytes) for key, row in rows.items()} == {key: row[:2] for key, row in expected.items()}
    for key, row in rows.items():
        assert row.seconds == pytest.approx(expected[key][2]), key
    assert rows["collective-permute", "ICI"].waited == 0  # 0.48 s beside 0.7 s of work
    assert rows["all-gather", "ICI"].waited == 0
    assert rows["all-reduce", "DCN"].waited == rows["all-reduce", "DCN"].seconds


def test_collectives_between_processes_and_of_one_device():
    links = hlo.Links([0, 0, 0, 0, 1, 1, 1, 1], ("host", "network"))
    rows = {(row.kind, row.link): row.seconds for row in hlo.transfers(hlo.collectives(TEXT, 8), links)}
    assert rows["all-gather", "host"] is None and ("collective-permute", "network") in rows
    alone = "ENTRY %main (p: f32[4]) -> f32[4] {\n  %a = f32[4] all-reduce(%p), replica_groups={{0},{1}}\n}"
    assert hlo.transfers(hlo.collectives(alone, 2), hlo.Links([0, 0], ("host", "network"))) == []


def test_groups_in_the_short_form():
    line = "%a = f32[4]{0} all-reduce(%p), replica_groups=[2,4]<=[2,2,2]T(2,0,1), to_apply=%add"
    (one,) = hlo.collectives("ENTRY %main (p: f32[4]) -> f32[4] {\n  " + line + "\n}", 8)
    assert np.array_equal(one.groups, np.arange(8).reshape(2, 2, 2).transpose(2, 0, 1).reshape(2, 4))


IMAGES, WEIGHTS = frozenset({"images"}), frozenset({"weights"})


def counted(function, *shapes):
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr
    return macs.walk(jaxpr, [IMAGES, *[WEIGHTS] * (len(shapes) - 1)])[0]


def test_multiply_accumulates_of_a_gradient_through_a_scan():
    def loss(x, w):
        turn = jax.checkpoint(lambda x, _: (jnp.sin(x @ w), None))
        with jax.named_scope("net"), jax.named_scope("stack"):
            x, _ = jax.lax.scan(turn, x, length=5)
        return (x**2).sum()

    one = 2 * 3 * 3
    assert counted(loss, (2, 3), (3, 3)).total() == 5 * one
    found = counted(jax.grad(loss, argnums=1), (2, 3), (3, 3))
    assert found.total() == 5 * 4 * one  # forward, again, and both gradients
    assert {hlo.module_path(f"jit(f)/{name}") for name in found} == {"stack"}


def test_multiply_accumulates_of_a_strided_convolution():
    def loss(x, w):
        return (
            jax.lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2
        ).sum()

    one = 4 * 4 * 2 * 2 * 3 * 5  # kernels of 2 x 2 x 3 on 4 x 4 places, 5 features
    assert counted(loss, (1, 8, 8, 3), (2, 2, 3, 5)).total() == one
    # In the gradients none of the zeros that are put between counts; a place at the border may.
    assert one * 3 <= counted(jax.grad(loss, argnums=(0, 1)), (1, 8, 8, 3), (2, 2, 3, 5)).total() <= one * 3.6


def test_multiply_accumulates_are_of_the_form_without_padding():
    def both(x, w):
        return jax.lax.platform_dependent(x, w, tpu=lambda x, w: x @ w @ w, default=lambda x, w: x @ w)

    squares = jax.grad(lambda x, w: (both(x, w) ** 2).sum(), argnums=1)
    assert counted(squares, (2, 3), (3, 3)).total() == 2 * 18


def test_topologies():
    assert chips.parse_topology("v5e:16x16") == ("v5e", "16x16")
    assert {"2x2x1", "4x4x8", "8x16x16"} <= set(chips.shapes("v4")) and "16x16x24" in chips.shapes("v5p")
    for bad, good in [
        ("v5e:16x32", "v5e:16x16"),
        ("v4:3x4x4", "v4:2x2x1"),
        ("v5e", "v5e:16x16"),
        ("v5e-16", "4x4x4"),
        ("ironwood:2x2x1", "tpu7x"),
    ]:
        with pytest.raises(ValueError, match=f"--topology={bad}: expected ") as error:
            chips.parse_topology(bad)
        assert good in str(error.value) and "\n" not in str(error.value)


def test_clock_rates_follow_from_the_peaks():
    clocks = {kind: round(chip.clock / 1e9, 2) for kind, chip in chips.CHIPS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


def test_without_libtpu_it_says_which_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vitpyramid\[tpu\]'"):
        chips.use_absent_chips()


def test_fsdp_stays_within_a_slice():
    devices = [SimpleNamespace(slice_index=i // 4) for i in range(8)]
    with pytest.raises(ConfigError, match="mesh.fsdp = 8: expected a divisor of the 4 devices of a slice"):
        make_mesh(8, devices)


def search(needs, known, compiles, limit=1000, held=100, unit=8):
    calls = []
    found = preflight.largest_batch(
        lambda batch: calls.append(batch) or needs(batch), known, held, limit, unit, compiles
    )
    return found, calls


def test_largest_batch():
    def straight(batch):
        return 300 + batch  # 200 of it not of the batch, and not held either

    found, calls = search(straight, {64: 364}, 2)
    assert calls == [216, 696] and found["compiled"] == found["line"] == 696
    found, calls = search(straight, {64: 364}, 1)
    assert calls == [216] and (found["compiled"], found["line"]) == (216, 696)
    found, calls = search(straight, {64: 364}, 0)
    assert calls == [] and (found["compiled"], found["line"]) == (64, 216)
    found, calls = search(straight, {1024: 1324}, 2)  # too large: downwards
    assert calls == [752, 696] and found["compiled"] == found["line"] == 696
    found, _ = search(lambda batch: 5000, {64: 5000}, 3)
    assert (found["compiled"], found["line"]) == (None, 0)
    found, calls = search(lambda batch: 150, {64: 150}, 1)  # the line is not trusted for more than sixteen times
    assert max(calls) <= 16 * 64


def test_errors_of_too_little_memory():
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (30.50G) exceeds"
    )
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity"
    assert preflight.memory_needed(early, held=2**30) == 31.5 * 2**30
    assert preflight.memory_needed(late, held=2**30) == 20.25 * 2**30
    assert preflight.memory_needed("INVALID_ARGUMENT: Used 20.25G of 15.75G hbm", 0) is None


def narrow(monkeypatch, **changes):
    """A config of a narrow network, for little compiling."""
    variant, model = registry.VARIANTS["deit_micro"], harness.NARROW["deit"].clone(depth=1)
    monkeypatch.setitem(registry.VARIANTS, "deit_micro", dataclasses.replace(variant, model=model))
    config = quickstart.get_config()
    config.model.name = "deit_micro"
    config.compile_cache = ""
    config.update_from_flattened_dict({"batch_size": 16, "eval.batch_size": 16, **changes})
    return config


def test_this_machine(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    config = narrow(monkeypatch, **{"data.data_dir": str(tmp_path / "nowhere"), "epochs": 2.0})
    assert preflight.run(config, base.get_config(), "", 1, search_compiles=0, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    model = make_task(config).model
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert (report["chips"], report["mesh"], report["topology"]) == (8, {"data": 8, "fsdp": 1}, None)
    assert report["steps"] == 2 * (1437 // 16)
    train, evaluation = report["train"], report["eval"]
    forward = 2 * count_macs(model, variables, 32, 32) * 16
    assert evaluation["flops"] == forward < train["flops"] == train["model_flops"] <= 3 * forward
    # Parameters and two moments, in float32.
    assert 12 * report["parameters"] <= train["memory"]["arguments"] <= 13 * report["parameters"]
    assert train["fits"] and train["spare"] == report["memory_limit"] - train["memory"]["peak"]
    reduced = [row for row in train["collectives"] if (row["kind"], row["link"]) == ("all-reduce", "host")]
    assert sum(row["bytes"] for row in reduced) >= 4 * report["parameters"]  # the gradient
    assert train["cycles"] is None and train["estimate"] is None
    assert any("mlp" in row["module"] for row in train["operations"])
    text = describe(report)
    for part in ("this machine: 8 chips", "fits", "all-reduce", "estimated for a --topology only", "mlp"):
        assert part in text


def test_steps_that_do_not_fit_and_are_recomputed(monkeypatch):
    message = "RESOURCE_EXHAUSTED: Used 20.25G of 15.75G hbm.\n\nLargest program allocations in hbm:\n  1. Size: 9.00G"

    def refuse(what, function, *shapes):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(preflight.program, "compile_logged", refuse)
    monkeypatch.setattr(preflight, "_local_memory", lambda devices: 15.75 * 2**30)
    config = narrow(monkeypatch, **{"model.remat": True})
    report = preflight.preflight(config, base.get_config(), search_compiles=1)
    assert report["fits"] is False and report["train"]["spare"] == -4.5 * 2**30
    assert report["largest_batch"] == {"compiled": None, "line": 0, "tried": {8: 20.25 * 2**30, 16: 20.25 * 2**30}}
    assert report["train"]["model_flops"] < report["train"]["flops"]
    text = describe(json.loads(json.dumps(report)))
    assert "DOES NOT FIT, by 4.50 GiB" in text and "1. Size: 9.00G" in text and "without recomputation" in text


def test_a_teacher_is_compiled_in_without_its_file():
    config = pit.get_config("ti,setting=distill")
    config.batch_size = 16
    task, missing = preflight._task(config)
    assert task.num_examples() == 1_281_167 and not missing
    teacher = task.constants()
    assert "stem" in teacher["params"] and isinstance(jax.tree.leaves(teacher)[0], jax.ShapeDtypeStruct)
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, targets = jax.eval_shape(task.prepare, key, task.batch(False), teacher)
    assert targets["teacher"].shape == (16, 1000)
    config.distill.model = ""
    with pytest.raises(ConfigError, match=r"distill\.model = '': expected the teacher's network"):
        preflight._task(config)


def test_data_need_not_be_there(tmp_path):
    config = pvt.get_config("tiny,transfer=224")
    assert preflight._with_classes(config).model.num_classes == 1000
    config = base.get_config()
    config.data.train_split = "train[:50%]"
    assert preflight._task(config)[0].num_examples() == 640_584
    config.data.name, config.data.data_dir = "folder", str(tmp_path / "none")
    task, missing = preflight._task(config)
    assert task.num_examples() == config.batch_size and "none" in missing


def test_command_names_good_topologies_and_leaves_no_folder(tmp_path):
    command = [sys.executable, "main.py", "--mode=preflight", "--topology=v5e:16x32", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "run").exists()
    assert done.stderr.startswith("--topology=v5e:16x32: expected one of v5e:1x1 ") and done.stderr.count("\n") == 1


@needs_libtpu
@pytest.mark.parametrize(("topology", "slices", "links"), [("v5e:2x2", 1, {"ICI"}), ("v6e:2x2", 2, {"ICI", "DCN"})])
def test_absent_chips(monkeypatch, topology, slices, links):
    chips.use_absent_chips()
    config = narrow(monkeypatch, **{"model.dtype": "bfloat16", "mix.mixup": 0.8})
    report = preflight.preflight(config, base.get_config(), topology, slices, search_compiles=0)
    assert report["fits"] and report["chips"] == 4 * slices
    assert {row["link"] for row in report["train"]["collectives"]} == links
    found = report["train"]["estimate"]
    assert found["seconds"] > 0 and 0 < found["mfu"] < 1
    assert found["images_per_second_per_chip"] == pytest.approx(16 / found["seconds"] / report["chips"])
    assert found["hours"] == pytest.approx(found["seconds"] * report["steps"] / 3600)
    assert "not measured" in describe(report)
