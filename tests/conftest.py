"""Eight simulated devices, and the cheapest compilation, kept between test runs: compiling is most of the time."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import pytest

from configs import quickstart
from vitpyramid import data


def pytest_configure(config):
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder where the digits lie prepared."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    config = quickstart.get_config()
    config.data.data_dir = folder
    data.open_source(config.data, "train")
    return folder
