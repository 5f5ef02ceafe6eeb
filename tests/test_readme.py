"""README.md: its programs in Python run as they stand there, as far as they need no data."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

import harness
from vitpyramid.train.config import reference, validate

SNIPPETS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def run(containing: str) -> dict:
    (program,) = [snippet for snippet in SNIPPETS if containing in snippet]
    names = {"jax": jax, "jnp": jnp, "nn": nn}
    exec(program, names)
    return names


def test_the_config_of_ones_own_is_valid():
    config = run("def get_config")["get_config"]()
    validate(config, reference(), 8)
    assert (config.model.name, config.data.name, config.mix.cutmix) == ("pvt_tiny", "folder", 1.0)


def test_the_pyramid_has_the_levels_of_the_network():
    model, fpn = harness.NARROW["pvt"], run("class FPN")["FPN"]()

    def maps(images):
        levels = model.init_with_output(jax.random.key(0), images, method="features")[0]
        return fpn.init_with_output(jax.random.key(1), levels)[0]

    found = jax.eval_shape(maps, jnp.zeros((2, 64, 96, 3)))
    assert [x.shape for x in found] == [(2, 64 // stride, 96 // stride, 256) for stride in (4, 8, 16, 32)]
