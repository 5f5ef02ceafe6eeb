"""Multi-scale deformable attention: Zhu et al., "Deformable DETR", ICLR 2021, section 4.1.

Equal to `MSDeformAttn` of github.com/fundamentalvision/Deformable-DETR, commit 11169a6. A query looks at a few places
of each level of a pyramid, which it chooses itself; the maps are sampled there bilinearly, and are zero outside.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitpyramid.models.derivatives import with_backward
from vitpyramid.models.forms import at_least_float32, by_device
from vitpyramid.models.initialisers import xavier_uniform

Grids = tuple[tuple[int, int], ...]


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
            locations = reference + offsets / _sides(grids, wide)
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


def _corners(locations: jax.Array, weights: jax.Array, grids: Grids) -> tuple[jax.Array, jax.Array]:
    """The four cells around each place: upper left, upper right, lower left, lower right.

    Returns:
      Column and row of the first, int32 `[B, Q, heads, L, P, 2]`, from -1 where there is anything to be had; and how
      much each counts, `[B, Q, heads, L, P, 4]`.
    """
    place = locations * _sides(grids, locations.dtype) - 0.5
    first = jnp.floor(place)
    across, down = jnp.moveaxis(place - first, -1, 0)
    factors = ((1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across)
    return first.astype(jnp.int32), jnp.stack(factors, axis=-1) * weights[..., None]


def sample_by_gathers(value: jax.Array, locations: jax.Array, weights: jax.Array, grids: Grids) -> jax.Array:
    """The four cells around each place are fetched."""
    batch, queries, heads = locations.shape[:3]
    first, factors = _corners(locations, weights, grids)
    corner = first[..., None, :] + np.array([[0, 0], [1, 0], [0, 1], [1, 1]])  # [B, Q, heads, L, P, 4, 2]
    sides = _sides(grids, jnp.int32)[:, None]
    there = ((corner >= 0) & (corner < sides)).all(-1)
    x, y = jnp.moveaxis(jnp.clip(corner, 0, sides - 1), -1, 0)
    index = _ends(grids)[:-1, None, None] + y * sides[..., 0] + x
    index = index.swapaxes(1, 2).reshape(batch, heads, -1)
    factors = jnp.where(there, factors, 0).reshape(batch, queries, heads, -1)
    cells = jnp.take_along_axis(value.swapaxes(1, 2), index[..., None], axis=2, mode="promise_in_bounds")
    cells = cells.reshape(batch, heads, queries, -1, cells.shape[-1])  # [B, heads, Q, L * P * 4, d]
    out = jnp.einsum("bhqnd,bqhn->bqhd", cells, factors.astype(value.dtype))
    return out.reshape(batch, queries, -1)


def _sample_by_products(value, locations, weights, grids):
    """Matrix products with the weight that every query has for each cell: zero but for those around its places.

    The weights are made inside of the products, and are in no memory. JAX's own derivative of them would be a matrix
    as large that is; here the four cells are fetched for it, by products with zeros and ones.
    """
    out = 0
    for level, dense in enumerate(_dense_weights(locations, weights, grids)):
        of_level = _as_map(value, level, grids)
        wide = at_least_float32(value.dtype)
        out += jnp.einsum("bqhyx,byxhd->bqhd", dense.astype(value.dtype), of_level, preferred_element_type=wide)
    return out.astype(value.dtype).reshape(*out.shape[:2], -1), (value, locations, weights)


def _sample_backward(stored, gradient, grids):
    value, locations, weights = stored
    wide = at_least_float32(value.dtype)
    batch, _, heads, d = value.shape
    gradient = gradient.reshape(*gradient.shape[:2], heads, d)
    (first, _), backward = jax.vjp(lambda *chosen: _corners(*chosen, grids), locations, weights)
    four = jnp.tile(gradient, 4)[:, :, :, None]  # [B, Q, heads, 1, 4 d]
    sums = np.kron(np.eye(4), np.ones((d, 1)))  # [4 d, 4]
    of_value, of_factors = [], []
    for level, dense in enumerate(_dense_weights(locations, weights, grids)):
        cells = jnp.einsum("bqhyx,bqhd->byxhd", dense.astype(value.dtype), gradient, preferred_element_type=wide)
        of_value.append(cells.reshape(batch, -1, heads, d))
        # Cells from the left of the map and above it to its last, each with the three to its right and below.
        padded = jnp.pad(_as_map(value, level, grids), ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
        table = jnp.concatenate(
            [padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]], axis=-1
        )
        x, y = jnp.moveaxis(first[:, :, :, level] + 1, -1, 0)
        rows, columns = table.shape[1:3]
        index = jnp.where((x >= 0) & (x < columns) & (y >= 0) & (y < rows), y * columns + x, -1)
        chosen = (index[..., None] == np.arange(rows * columns)).astype(value.dtype)  # [B, Q, heads, P, cells]
        table = table.reshape(batch, -1, heads, 4 * d)
        found = jnp.einsum("bqhpn,bnhc->bqhpc", chosen, table, preferred_element_type=value.dtype)
        products = found.astype(wide) * four.astype(wide)
        of_factors.append(jnp.einsum("bqhpc,cf->bqhpf", products, sums.astype(wide), precision="highest"))
    no_gradient = np.zeros(first.shape, jax.dtypes.float0)
    of_locations, of_weights = backward((no_gradient, jnp.stack(of_factors, axis=3)))
    return jnp.concatenate(of_value, axis=1).astype(value.dtype), of_locations, of_weights


sample_by_products = with_backward(_sample_by_products, _sample_backward)


def _dense_weights(locations: jax.Array, weights: jax.Array, grids: Grids) -> list[jax.Array]:
    """The weight that every query has for each cell, `[B, Q, heads, h, w]` a level."""
    found = []
    place = locations * _sides(grids, locations.dtype) - 0.5
    for level, (height, width) in enumerate(grids):
        across = _shares(place[:, :, :, level, :, 0], width)  # [B, Q, heads, P, width]
        down = _shares(place[:, :, :, level, :, 1], height) * weights[:, :, :, level, :, None]
        found.append(sum(down[:, :, :, p, :, None] * across[:, :, :, p, None] for p in range(weights.shape[-1])))
    return found


def _shares(place: jax.Array, cells: int) -> jax.Array:
    """How much each of `cells` cells takes part in linear interpolation at a place, `[...]` -> `[..., cells]`."""
    first = jnp.floor(place)[..., None]
    share = place[..., None] - first
    cell = jnp.arange(cells, dtype=place.dtype)
    return jnp.where(cell == first, 1 - share, jnp.where(cell == first + 1, share, 0))


def _ends(grids: Grids) -> np.ndarray:
    """Cells before each level, and all of them."""
    return np.cumsum([0, *(height * width for height, width in grids)])


def _sides(grids: Grids, dtype) -> jax.Array:
    """`[L, 1, 2]`: width and height of each level."""
    return jnp.asarray(np.array(grids)[:, None, ::-1], dtype)


def _as_map(value: jax.Array, level: int, grids: Grids) -> jax.Array:
    """A level's part of `value`, `[B, h, w, heads, d]`."""
    begin, end = _ends(grids)[level : level + 2]
    return value[:, begin:end].reshape(len(value), *grids[level], *value.shape[2:])
