"""Multi-scale deformable attention: Zhu et al., "Deformable DETR", ICLR 2021, section 4.1.

Equal to `MSDeformAttn` of github.com/fundamentalvision/Deformable-DETR, commit 11169a6. A query looks at a few points of
each level of a pyramid, which it chooses itself; the maps are sampled there bilinearly, and are zero outside.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.forms import at_least_float32, by_device
from vitpyramid.models.initialisers import xavier_uniform

Grids = tuple[tuple[int, int], ...]
# Weights of places that are held at a time, of all images and heads together (`sample_by_products`).
_MOST_WEIGHTS = 2**27


class DeformableAttention(nn.Module):
    """Attention of queries to `points` places in each of `levels` maps, in `heads` heads.

    The places, and the weights of each in all levels together, are linear functions of the query. They are sown as
    `locations` `[B, Q, heads, L, P, 2]`, x and y in sides of the map, and `weights` `[B, Q, heads, L, P]` under
    `intermediates`.
    """

    heads: int
    levels: int
    points: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, query: jax.Array, reference: jax.Array, value: jax.Array, grids: Grids, inside: jax.Array | None = None
    ) -> jax.Array:
        """What each query finds, `[B, Q, C]`.

        Args:
          query: `[B, Q, C]`.
          reference: `[B, Q, L, 2 or 4]`, of each query in each level, in sides of the map: x and y of a point that
            offsets, in cells, are added to; or centre, width and height of a box, whose half sides divided by `points`
            are then their unit.
          value: `[B, S, C]`, the cells of all levels, row-major, one level behind the other.
          grids: (height, width) of each level.
          inside: bool `[B, S]`: the others are zero.
        """
        batch, queries, dim = query.shape
        wide = at_least_float32(self.dtype)
        shape = (batch, queries, self.heads, self.levels, self.points)
        each = math.prod(shape[2:])
        projection = functools.partial(nn.Dense, dim, dtype=self.dtype, kernel_init=xavier_uniform)
        zeros = nn.initializers.zeros
        choose = functools.partial(nn.Dense, dtype=wide, kernel_init=zeros)

        value = projection(name="value_proj")(value)
        if inside is not None:
            value = jnp.where(inside[..., None], value, 0)
        offsets = choose(2 * each, bias_init=self._directions, name="sampling_offsets")(query).reshape(*shape, 2)
        weights = choose(each, name="attention_weights")(query).reshape(*shape[:3], -1)
        weights = nn.softmax(weights).reshape(shape)

        reference = reference.astype(wide)[:, :, None, :, None]  # [B, Q, 1, L, 1, 2 or 4]
        if reference.shape[-1] == 2:
            locations = reference + offsets / np.array(grids, np.float64)[:, None, ::-1].astype(wide)
        else:
            locations = reference[..., :2] + offsets / self.points * reference[..., 2:] * 0.5
        self.sow("intermediates", "locations", locations)
        self.sow("intermediates", "weights", weights)

        value = value.reshape(batch, -1, self.heads, dim // self.heads)
        out = sample(value, locations, weights, grids)
        return projection(name="output_proj")(out)

    def _directions(self, key, shape, dtype=jnp.float32) -> jax.Array:
        """Offsets at the start: each head looks in its own direction, point k at k + 1 cells."""
        angles = 2 * np.pi * np.arange(self.heads) / self.heads
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        directions /= np.abs(directions).max(-1, keepdims=True)
        steps = np.arange(1, self.points + 1)[:, None] * directions[:, None, None]  # [heads, 1, P, 2]
        return jnp.asarray(np.tile(steps, (1, self.levels, 1, 1)).ravel(), dtype)


def sample(value: jax.Array, locations: jax.Array, weights: jax.Array, grids: Grids) -> jax.Array:
    """Weighted sums of maps, sampled bilinearly and zero outside: the centres of cells lie at .5, 1.5 ... of a side.

    Args:
      value: `[B, S, heads, d]`.
      locations: `[B, Q, heads, L, P, 2]`, x and y in sides of the map.
      weights: `[B, Q, heads, L, P]`.
      grids: (height, width) of each level.

    Returns:
      `[B, Q, heads * d]` in the dtype of `value`.
    """
    return by_device(sample_by_products, sample_by_gathers, value, locations, weights, grids=grids)


def _ends(grids: Grids) -> np.ndarray:
    """Cells before each level, and all of them."""
    return np.cumsum([0, *(height * width for height, width in grids)])


def sample_by_gathers(value: jax.Array, locations: jax.Array, weights: jax.Array, grids: Grids) -> jax.Array:
    """The four cells around each place are fetched."""
    batch, queries, heads = locations.shape[:3]
    sides = np.array(grids)[:, None, ::-1]  # [L, 1, 2], width and height
    place = locations * sides.astype(locations.dtype) - 0.5
    first = jnp.floor(place)
    share = place - first
    first = first.astype(jnp.int32)
    indices, factors = [], []
    for right in (0, 1):
        for below in (0, 1):
            corner = first + np.array([right, below])
            there = ((corner >= 0) & (corner < sides)).all(-1)
            x, y = jnp.moveaxis(jnp.clip(corner, 0, sides - 1), -1, 0)
            across, down = jnp.moveaxis(share, -1, 0)
            factor = (across if right else 1 - across) * (down if below else 1 - down)
            indices.append(_ends(grids)[:-1, None] + y * sides[..., 0] + x)
            factors.append(jnp.where(there, factor * weights, 0))
    index = jnp.stack(indices, axis=-1).swapaxes(1, 2).reshape(batch, heads, -1)  # [B, heads, Q * L * P * 4]
    factor = jnp.stack(factors, axis=-1).reshape(batch, queries, heads, -1)
    cells = jnp.take_along_axis(value.swapaxes(1, 2), index[..., None], axis=2, mode="promise_in_bounds")
    cells = cells.reshape(batch, heads, queries, -1, cells.shape[-1])
    out = jnp.einsum("bhqnd,bqhn->bqhd", cells, factor.astype(value.dtype))
    return out.reshape(batch, queries, -1)


def sample_by_products(value: jax.Array, locations: jax.Array, weights: jax.Array, grids: Grids) -> jax.Array:
    """Every query has a weight for each cell, zero but for those around its places, and sums are matrix products.

    The weights of all cells are made where they are used, for some queries at a time, and again in the backward pass.
    """
    batch, queries, heads = locations.shape[:3]
    cells = value.shape[1]
    parts = -(-batch * heads * queries * cells // _MOST_WEIGHTS)
    length = -(-queries // parts)

    @jax.checkpoint
    def of_part(part):
        return _sample_densely(value, *part, grids)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, parts * length - queries), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, parts, length, *x.shape[2:]), 1, 0)

    if parts == 1:
        return of_part((locations, weights))
    out = jax.lax.map(of_part, (split(locations), split(weights)))  # [parts, B, length, heads * d]
    return jnp.moveaxis(out, 0, 1).reshape(batch, parts * length, -1)[:, :queries]


def _sample_densely(value, locations, weights, grids):
    ends, out = _ends(grids), 0
    for level, (height, width) in enumerate(grids):
        x, y = (locations[:, :, :, level, :, axis, None] * side - 0.5 for axis, side in ((0, width), (1, height)))
        across = _shares(x, width)  # [B, Q, heads, P, width]
        down = _shares(y, height) * weights[:, :, :, level, :, None]
        dense = sum(down[:, :, :, p, :, None] * across[:, :, :, p, None] for p in range(weights.shape[-1]))
        dense = dense.astype(value.dtype)  # [B, Q, heads, height, width]
        of_level = value[:, ends[level] : ends[level + 1]].reshape(len(value), height, width, *value.shape[2:])
        out = out + jnp.einsum(
            "bqhyx,byxhd->bqhd", dense, of_level, preferred_element_type=at_least_float32(value.dtype)
        )
    return out.astype(value.dtype).reshape(*out.shape[:2], -1)


def _shares(place: jax.Array, cells: int) -> jax.Array:
    """How much each of `cells` cells takes part in linear interpolation at a place, `[..., 1]` -> `[..., cells]`."""
    first = jnp.floor(place)
    apart = first - jnp.arange(cells, dtype=place.dtype)
    share = place - first
    return jnp.where(apart == 0, 1 - share, jnp.where(apart == -1, share, 0))
