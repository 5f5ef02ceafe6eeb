"""Attention maps of any network, and what is read off them: entropy, distance, rollout.

Entropy and distance are PiT's analysis (Heo et al., arXiv 2103.16302, on attention in ViT and PiT), which gives them
in words; three things are our choice: natural logarithms, the L1 norm, and that rows are divided by what is left of
them once class tokens are taken off. Rollout is Abnar and Zuidema's (arXiv 2005.00928), carried over the
places where a pyramid changes its tokens.
"""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vitpyramid.models.backbone import Backbone

Grid = tuple[int, int]


@flax.struct.dataclass
class AttentionMap:
    """The attention of one layer, for a batch.

    Attributes:
      weights: `[B, heads, N, M]`, what values are multiplied by: queries are rows, keys columns.
      softmax: the same before it was normalised (ResT's heads, whose rows in `weights` sum to 0); None elsewhere.
      path: of the module, parts joined by "/".
      kind: "full"; "reduced", keys are of a smaller map (PVT); "mixed", also across heads, and normalised (ResT);
        "kernel", what the performer's sums amount to (T2T-ViT).
      stage: from 1; 0 for what stands before the first.
      grid, key_grid: `(h, w)` of the spatial tokens among queries and among keys.
      extra: class tokens, which stand in front of the spatial ones.
    """

    weights: jax.Array
    softmax: jax.Array | None
    path: str = flax.struct.field(pytree_node=False)
    kind: str = flax.struct.field(pytree_node=False)
    stage: int = flax.struct.field(pytree_node=False)
    grid: Grid = flax.struct.field(pytree_node=False)
    key_grid: Grid = flax.struct.field(pytree_node=False)
    extra: int = flax.struct.field(pytree_node=False)

    @property
    def distribution(self) -> jax.Array:
        """`[B, heads, N, M]` with rows that sum to 1 (the performer's but for the guard of its denominator)."""
        return self.weights if self.softmax is None else self.softmax


@functools.partial(jax.jit, static_argnums=0)
def attention_maps(model: Backbone, variables: dict, images: jax.Array) -> tuple[AttentionMap, ...]:
    """Every attention map of a network, in the order in which they are computed; none if it has no attention.

    They are `N x M` numbers a head and image. In T2T-ViT's first layer that is 3136 x 3136 at 224 x 224, 39 MB.

    Args:
      model: with `scan=False`.
      images: `[B, H, W, 3]`, normalised.

    Raises:
      ValueError: `scan=True`; images that the model refuses.
    """
    if model.scan:
        raise ValueError("scan=True: expected a model with scan=False, whose layers can be told apart")
    levels, state = model.apply(
        variables,
        images,
        method="features",
        mutable="intermediates",
        capture_intermediates=lambda module, _: module.name == "sr",  # the reduced map, which has the keys' grid
    )
    sown = traverse_util.flatten_dict(state.get("intermediates", {}), sep="/")
    sown = {path: found[0] for path, found in sown.items()}
    places = [(path, grid, 0) for path, grid in model.entrance_grids(*images.shape[1:3]).items()]
    for number, (stage, level) in enumerate(zip(model.stages, levels, strict=True), start=1):
        places += [(block, level.x.shape[1:3], number) for block in stage.blocks]
    maps = []
    for place, grid, stage in places:
        for path, weights in sown.items():
            module, _, name = path.rpartition("/")
            if f"{module}/".startswith(f"{place}/") and name in ("attention", "kernel_attention"):
                softmax, reduced = sown.get(f"{module}/softmax"), sown.get(f"{module}/sr/__call__")
                kind = "mixed" if softmax is not None else "reduced" if reduced is not None else "full"
                kind = "kernel" if name == "kernel_attention" else kind
                key_grid = grid if reduced is None else reduced.shape[1:3]
                extra = weights.shape[2] - grid[0] * grid[1]
                maps.append(AttentionMap(weights, softmax, module, kind, stage, tuple(grid), tuple(key_grid), extra))
    return tuple(maps)


def spatial(found: AttentionMap) -> jax.Array:
    """`[B, heads, h * w, h' * w']`: the distribution without class tokens, rows summing to 1 again."""
    keys = found.key_grid[0] * found.key_grid[1]
    weights = found.distribution[:, :, found.extra :, -keys:]
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(weights.dtype).tiny)


def entropy(found: AttentionMap) -> jax.Array:
    """`-(1 / N) sum_ij a_ij log a_ij` over spatial tokens, `[B, heads]`, in nats: 0 to `log M`."""
    weights = spatial(found)
    return -jax.scipy.special.xlogy(weights, weights).sum(-1).mean(-1)


def distance(found: AttentionMap) -> jax.Array:
    """`(1 / N) sum_ij a_ij |p_i - p_j|_1` over spatial tokens, `[B, heads]`.

    `p` are centres of cells, in sides of the image: a token that looks at the opposite corner has nearly 2.
    """
    rows, columns = (
        jnp.abs(_centres(n)[:, None] - _centres(m)) for n, m in zip(found.grid, found.key_grid, strict=True)
    )
    weights = spatial(found)
    weights = weights.reshape(*weights.shape[:2], *found.grid, *found.key_grid)
    apart = jnp.einsum("bnhwij,hi->bnhw", weights, rows) + jnp.einsum("bnhwij,wj->bnhw", weights, columns)
    return apart.mean((2, 3))


def _centres(cells: int) -> jax.Array:
    return (jnp.arange(cells) + 0.5) / cells


@functools.partial(jax.jit, static_argnums=0)
def statistics(model: Backbone, variables: dict, images: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Entropy and distance, `[B, heads]` each, of every map; the maps stay on the device."""
    return [(entropy(found), distance(found)) for found in attention_maps(model, variables, images)]


def query_map(found: AttentionMap, point: tuple[float, float] | None = None) -> jax.Array:
    """What one query attends to, `[B, heads, h', w']`, of the distribution.

    Args:
      point: `(y, x)` in sides of the image: the spatial token there. None: the first class token where there is one,
        else the token in the middle.
    """
    if point is None and found.extra:
        row = 0
    else:
        y, x = (0.5, 0.5) if point is None else point
        cells = [min(int(p * side), side - 1) for p, side in zip((y, x), found.grid, strict=True)]
        row = found.extra + cells[0] * found.grid[1] + cells[1]
    keys = found.key_grid[0] * found.key_grid[1]
    weights = found.distribution[:, :, row, -keys:]
    return weights.reshape(*weights.shape[:2], *found.key_grid)


@jax.jit
def rollout(maps: tuple[AttentionMap, ...]) -> jax.Array:
    """How much of the network's output comes from each place, `[B, h, w]` on the grid of the first map; sums to 1.

    A layer passes on half its input and half of what its heads attend to on average, `(1 + A) / 2`; the product of all
    layers is read at the class tokens, or where there are none (ResT) averaged over the last map. Between layers of
    different tokens, and from reduced keys to the tokens that they were made of, a share goes where cells overlap,
    whatever the convolution there weighs: an approximation, as is rollout itself, which knows no MLP and no values.
    """
    last = maps[-1]
    n = last.grid[0] * last.grid[1]
    batch, dtype = last.weights.shape[0], last.weights.dtype
    of_class = jnp.full((batch, last.extra), 1 / last.extra if last.extra else 0, dtype)
    of_space = jnp.full((batch, *last.grid), 0 if last.extra else 1 / n, dtype)
    for found in reversed(maps):
        of_space, of_class = spread(of_space, found.grid), of_class[:, : found.extra]
        share = jnp.concatenate([of_class, of_space.reshape(batch, -1)], axis=1)  # [B, N]
        attended = jnp.einsum("bn,bhnm->bm", share, found.distribution) / found.distribution.shape[1]
        extra_keys = attended.shape[1] - found.key_grid[0] * found.key_grid[1]
        to_space = spread(attended[:, extra_keys:].reshape(batch, *found.key_grid), found.grid)
        of_class, of_space = (of_class + attended[:, :extra_keys]) / 2, (of_space + to_space) / 2
    return of_space / of_space.sum((1, 2), keepdims=True)


def spread(values: jax.Array, grid: Grid) -> jax.Array:
    """Shares `[B, h, w]` of one grid on another one over the same image, by overlap of cells; the sum stays."""
    rows, columns = (jnp.asarray(_overlap(*sides), values.dtype) for sides in zip(values.shape[1:], grid, strict=True))
    return jnp.einsum("bhw,hi,wj->bij", values, rows, columns, precision="highest")


def _overlap(cells: int, new_cells: int) -> np.ndarray:
    """`[cells, new_cells]`: what part of each of `cells` equal parts of a side lies in each of `new_cells`."""
    edges, new_edges = np.arange(cells + 1) / cells, np.arange(new_cells + 1) / new_cells
    low = np.maximum(edges[:-1, None], new_edges[:-1])
    high = np.minimum(edges[1:, None], new_edges[1:])
    return np.maximum(high - low, 0) * cells
