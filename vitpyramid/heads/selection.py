"""The largest of very many numbers, without sorting them all.

Of hundreds of thousands of numbers a few hundred are wanted. The last of these is found bit by bit, from the highest:
each bit costs one count over all numbers.
"""

import jax
import jax.numpy as jnp

_SORTED = 2**13  # so many are sorted at once
_ROW = 128  # so many are counted at once


def largest(values: jax.Array, number: jax.Array | int) -> jax.Array:
    """Which are the `number` largest, of equals those with the lowest indices: bool `[N]` of floats `[N]`, none NaN."""
    bits = values.dtype.itemsize * 8
    signed, unsigned = jnp.dtype(f"int{bits}"), jnp.dtype(f"uint{bits}")
    pattern = jax.lax.bitcast_convert_type(values, signed)
    # Integers in the order of the numbers: below 0 larger patterns are smaller numbers.
    keys = jnp.where(pattern < 0, ~pattern, pattern ^ jnp.iinfo(signed).min).astype(unsigned)

    def with_bit(i, found):
        higher = found | (jnp.ones((), unsigned) << (bits - 1 - i).astype(unsigned))
        return jnp.where((keys >= higher).sum() >= number, higher, found)

    last = jax.lax.fori_loop(0, bits, with_bit, jnp.zeros((), unsigned))
    above, equal = keys > last, keys == last
    end = places(equal, (number - above.sum())[None])
    return above | (equal & (jnp.arange(len(values)) < end))


def places(mask: jax.Array, ranks: jax.Array) -> jax.Array:
    """Indices of those that are True in `mask` `[N]`, int32 `[n]`, the first of rank 0; N where there are fewer.

    Counted in rows: a TPU's compiler takes long for a cumulative sum over all.
    """
    n = len(mask)
    rows = jnp.pad(mask, (0, -n % _ROW)).reshape(-1, _ROW)
    counts = jnp.cumsum(rows.sum(axis=1))
    row = (counts <= ranks[:, None]).sum(axis=1)  # that the place is in
    before = jnp.where(row > 0, counts[row - 1], 0)
    column = (jnp.cumsum(rows[row], axis=1) <= (ranks - before)[:, None]).sum(axis=1)
    return jnp.where(ranks < counts[-1], row * _ROW + column, n).astype(jnp.int32)


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """As `jax.lax.top_k` of floats `[N]`, none NaN: the k largest and their indices, of equals the lowest first."""
    if values.shape[0] <= max(_SORTED, k):
        return jax.lax.top_k(values, k)
    index = places(largest(values, k), jnp.arange(k))
    found, order = jax.lax.top_k(values[index], k)
    return found, index[order]
