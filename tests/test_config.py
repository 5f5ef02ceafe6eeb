"""Configs: every key is checked, every shipped config can be built and reads all its keys."""

import dataclasses
import functools
import importlib
import operator
import re
from pathlib import Path

import jax
import pytest

from configs import base, quickstart
from vitpyramid.heads.network import DenseNetwork
from vitpyramid.tasks import TASKS, make_task
from vitpyramid.train import config as configs
from vitpyramid.train.program import abstract_batch, build
from vitpyramid.train.sharding import make_mesh

SHIPPED = [
    ("base", ()),
    *(("quickstart", (family,)) for family in ("pvt", "pit", "t2t_vit", "rest")),
    *(("pvt", (text,)) for text in ("tiny", "medium", "large,finetune=384")),
    *(("pit", (text,)) for text in ("ti,setting=vanilla", "s,setting=distill", "b,setting=cutmix")),
    *(("t2t_vit", (text,)) for text in ("7", "t_14,probe=224", "14,transfer=320", "19,transfer=224,data=cifar100")),
    *(("rest", (text,)) for text in ("lite", "large,finetune=384")),
    *(("deit", (text,)) for text in ("tiny", "small,setting=distill")),
    ("detect", ("retinanet_rest_small",)),
    ("segment", ("semantic_fpn_pvt_tiny",)),
    ("detr", ("deformable_detr_two_stage_pit_s",)),
]


def shipped(name, args):
    return importlib.import_module(f"configs.{name}").get_config(*args)


def with_blanks_filled(config):
    """What the command line or the data would say."""
    config.model.num_classes = config.model.num_classes or 3
    if config.model.name.endswith("_distilled"):
        config.distill.teacher = "teacher.pth"


def test_every_config_file_is_tested():
    files = {path.stem for path in Path(base.__file__).parent.glob("*.py")}
    assert files - {"recipes"} == {name for name, _ in SHIPPED}


def shallow(model):
    if isinstance(model, DenseNetwork):
        return model.clone(backbone=shallow(model.backbone))
    depths = {"depths": (1,) * len(model.stages)} if hasattr(model, "depths") else {"depth": 1}
    return model.clone(**depths)


@pytest.mark.parametrize(("name", "args"), SHIPPED)
def test_shipped_configs_are_valid_and_trace(name, args):
    """Shapes of a whole training step, without computing anything; of one block a stage."""
    config = shipped(name, args)
    with_blanks_filled(config)
    configs.validate(config, base.get_config(), jax.device_count())  # so it has the keys of base, no others
    mesh = make_mesh(config.mesh.fsdp)
    task = dataclasses.replace(make_task(config), num_examples=lambda: 1_281_167, constants=dict)
    task = dataclasses.replace(task, model=shallow(task.model))
    with jax.set_mesh(mesh):
        program = build(task, mesh)
        state, _ = jax.eval_shape(program.train_step, program.state, abstract_batch(task, mesh), {})
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype), program.state
    )
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(state.params))


def test_every_numeric_key_has_a_rule():
    flat = configs.flatten(base.get_config())
    rules = functools.reduce(operator.or_, [module.RULES for module in TASKS.values()], configs.RULES)
    assert set(rules) <= set(flat)
    numeric = {key for key, value in flat.items() if not isinstance(value, (str, bool))}
    assert numeric <= set(rules)


def test_every_numeric_rule_has_two_finite_ends():
    flat = configs.flatten(base.get_config())
    rules = functools.reduce(operator.or_, [module.RULES for module in reversed(TASKS.values())], configs.RULES)
    for key, value in flat.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert rules[key].holds(value), key
            for bad in (float("inf"), -float("inf"), 1e300, float("nan")):
                assert not rules[key].holds(bad), key
            assert re.search(r"(at least|more than) \S+ and (at most|less than) \d", rules[key].expected), key


def test_evaluation_of_a_distilled_network_needs_no_teacher():
    config = shipped("pit", ("s,setting=distill",))
    configs.validate(config, base.get_config(), 8, evaluation=True)
    with pytest.raises(configs.ConfigError, match=r"distill.teacher = ''"):
        configs.validate(config, base.get_config(), 8)


def test_every_key_has_a_comment():
    source = Path(base.__file__).read_text()
    for key in configs.flatten(base.get_config()):
        section, _, leaf = key.rpartition(".")
        line = re.search(rf"\b(config\.)?{section or 'config'}\.{leaf} = .*", source).group()
        assert "  # " in line, key


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("batch_size", 60, "a multiple of the 8 devices"),
        ("eval.batch_size", 4, "a multiple of the 8 devices"),
        ("batch_size", -8, "at least 1"),
        ("epochs", 0.0, "more than 0"),
        ("model.name", "pvt_smal", "list_models"),
        ("optim.accumulate", 3, "a multiple of it times the 8 devices"),
        ("model.dtype", "float16", "bfloat16"),
        ("mix.groups", 3, "batch_size = 64 to be a multiple of twice as many"),
        ("mix.groups", 64, "batch_size = 64 to be a multiple of twice as many"),
        ("mesh.fsdp", 3, "a divisor of the 8 devices"),
        ("model.scan", True, "model.remat = True"),
        ("schedule.warmup_epochs", 50.0, "at most epochs"),
        ("data.crop_scale", (0.9, 0.1), "low <= high"),
        ("ema.decay", 1.0, "less than 1"),
        ("data.image_size", 16, "at least 32"),
        ("optim.lr", float("nan"), "more than 0"),
        ("optim.lr", float("inf"), "at most 100"),
        ("epochs", 1e308, "at most 100,000"),
        ("eval.every_epochs", float("inf"), "at most 100,000"),
        ("checkpoint.every_epochs", float("inf"), "at most 100,000"),
        ("data.color_jitter", float("inf"), "at least 0 and at most 10"),
        ("data.eval_crop", 0.001, "at least 0.1 and at most 1"),
        ("data.image_size", 100_000, "at least 32 and at most 4,096"),
        ("data.threads", 100_000, "at most 1,024"),
        ("data.auto_augment", "foo", "3a"),
        ("data.std", (1.0, 1.0, float("inf")), "three numbers"),
        ("batch_size", 8 * 10**10, "at most 1,048,576"),
        ("distill.model", "nonsense", "list_models"),
        ("optim.lr_rules", ((".*", float("inf")),), "at most 1,000,000"),
    ],
)
def test_impossible_values_name_key_value_and_expectation(key, value, expected):
    config = quickstart.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(configs.ConfigError, match=re.escape(expected)) as error:
        configs.validate(config, base.get_config(), 8)
    assert key in str(error.value)
    assert repr(value)[:4].strip("(") in str(error.value)


def test_unknown_missing_and_mistyped_keys():
    config = quickstart.get_config()
    with config.unlocked(), config.ignore_type():
        config.optim.nesterov = 0.9
        config.optim.wieght_decay = 0.1
        config.optim.lr = "fast"
        config.model.remat = 1
        del config["seed"]
    with pytest.raises(configs.ConfigError) as error:
        configs.validate(config, base.get_config(), 8)
    for line in (
        "optim.nesterov = 0.9: no such key",
        "optim.wieght_decay = 0.1: no such key; did you mean optim.weight_decay?",
        "optim.lr = 'fast': expected a number",
        "model.remat = 1: expected True or False",
        "seed: missing",
    ):
        assert line in str(error.value)


def test_differences_leave_neutral_keys_out():
    config, other = quickstart.get_config(), quickstart.get_config()
    other.log.every_steps, other.mesh.fsdp, other.data.threads = 3, 2, 9
    assert configs.differences(config, other) == []
    other.optim.lr = 0.5
    assert configs.differences(config, other) == ["optim.lr: 0.5 -> 0.001"]
