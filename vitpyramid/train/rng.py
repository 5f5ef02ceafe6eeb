"""Random keys: one root, everything else by folding in a name and a step, so that no key is ever saved."""

import zlib

import jax


def named_key(seed: int, name: str) -> jax.Array:
    """Key of one purpose, such as "init" or "dropout"."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
