"""Cloud TPU chips, the shapes in which they can be had, and their devices for a compiler on a machine without them."""

import importlib.util
import itertools
import math
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from vitpyramid.tasks import ConfigError


class Chip(NamedTuple):
    """What a kind of TPU can do.

    Attributes:
      flops: bfloat16 operations a second of a chip, at most.
      flops_per_cycle: the same in a cycle of a device's matrix units, so that the two give the clock rate.
      hbm: bytes that programs may use, of a device.
      ici: bytes a second that a chip sends to others of its slice, over all its links.
      dcn: bytes a second that a chip sends to other slices.
      devices: on a chip, as JAX counts them.
      most: chips of the largest slice.
      options: for libtpu.
    """

    flops: float
    flops_per_cycle: int
    hbm: float
    ici: float
    dcn: float
    devices: int
    most: int
    options: dict[str, Any]

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.flops / self.devices / self.flops_per_cycle


# Peak, links (the documents give both directions together) and data-centre network: docs.cloud.google.com/tpu/docs, a
# page a kind. v4 and v5e: what their pods have, divided by the chips. `hbm` is what libtpu 0.0.42 says is available
# when a program does not fit, `flops_per_cycle` the matrix units of a device: 128 x 128, in v6e and tpu7x 256 x 256.
_GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 8 * 2 * 128**2, 30.75 * _GIB, 300e9, 6.25e9, 1, 4096, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 4 * 2 * 128**2, 15.75 * _GIB, 200e9, 3.125e9, 1, 256, {}),
    "v5p": Chip(459e12, 8 * 2 * 128**2, 95.73 * _GIB, 600e9, 6.25e9, 1, 6144, {}),
    "v6e": Chip(918e12, 4 * 2 * 256**2, 31.24 * _GIB, 400e9, 12.5e9, 1, 256, {}),
    "tpu7x": Chip(2307e12, 4 * 2 * 256**2, 94.74 * _GIB, 600e9, 12.5e9, 2, 9216, {}),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


def shapes(kind: str) -> list[str]:
    """Shapes in which slices of a kind can be had, smallest first; libtpu takes others, which nobody has.

    In three dimensions the large ones have sides that are multiples of 4, in rising order.
    """
    if kind in ("v5e", "v6e"):
        return list(_FLAT)
    most = CHIPS[kind].most
    cubes = itertools.combinations_with_replacement(range(4, 33, 4), 3)
    large = sorted((sides for sides in cubes if math.prod(sides) <= most), key=math.prod)
    return [*_SMALL, *("x".join(map(str, sides)) for sides in large)]


def parse_topology(text: str) -> tuple[str, str]:
    """Kind and shape of a topology such as "v5e:16x16".

    Raises:
      ConfigError: none that can be had; the message names the good ones.
    """
    kind, _, shape = text.partition(":")
    if kind in CHIPS and shape in shapes(kind):
        return kind, shape
    if kind in CHIPS:
        good = " ".join(f"{kind}:{shape}" for shape in shapes(kind)[:12])
        more = f" and other AxBxC of multiples of 4, A <= B <= C, up to {CHIPS[kind].most} chips"
        raise ConfigError(f"--topology={text}: expected one of {good}{more if len(shapes(kind)) > 12 else ''}")
    flat = " ".join(_FLAT)
    raise ConfigError(
        f"--topology={text}: expected KIND:SHAPE, such as v5e:16x16; v5e and v6e have {flat}; v4, v5p and tpu7x have "
        f"{' '.join(_SMALL)}, 4x4x4 and other AxBxC of multiples of 4"
    )


def use_absent_chips() -> None:
    """Makes this process compile for chips that it does not have; to be called before JAX looks for devices.

    Raises:
      ConfigError: no libtpu, which has the compiler.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("--topology needs the TPU's compiler: pip install 'vitpyramid[tpu]'")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may have it open
    }
    jax.config.update("jax_platforms", "cpu")


def absent_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices of a topology, for compiling only, after `use_absent_chips`.

    Raises:
      ConfigError: as `parse_topology`, and libtpu's refusals.
    """
    kind, shape = parse_topology(topology)
    options = dict(CHIPS[kind].options)
    if num_slices > 1:
        options["num_slices"] = num_slices
    if shape == "1x1":  # a part of a host, of which libtpu does not think by itself
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology={topology}: the installed libtpu refuses it: {error}") from error
