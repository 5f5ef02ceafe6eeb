"""Initial values: what `flax.linen` draws one parameter after another, drawn in one loop that compiles in seconds.

Each draw is hundreds of instructions, and XLA compiles those of every parameter anew: minutes for a network on a CPU.
So `init` gives the modules a key that only notes what is folded into it, and the initialisers here, which notice such a
key, answer with what to draw (`Later`). All of it is then drawn in pieces of one length. The numbers are those of
`flax.linen.Module.init`, to rounding.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.extend.core
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.interpreters import partial_eval

_PIECE = 4096  # numbers drawn at once
_THREEFRY = "threefry2x32"


def _folded(key: jax.Array) -> jax.Array:
    """The Threefry key that a `_LATER` key stands for."""
    return jax.random.fold_in(jax.random.wrap_key_data(key[:2], impl=_THREEFRY), key[2])


def _later_split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    keys = jax.random.split(jax.random.wrap_key_data(key[:2], impl=_THREEFRY), shape)
    return _noted(jax.random.key_data(keys))


def _noted(key: jax.Array) -> jax.Array:
    """The `_LATER` key of a Threefry key, with nothing to fold in yet."""
    return jnp.concatenate([key, jnp.zeros_like(key[..., :1])], axis=-1)


def _counted_bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    count = key[2] + jnp.arange(math.prod(shape), dtype=jnp.uint32)
    bits = jax.extend.random.threefry_2x32(key[:2], jnp.stack([jnp.zeros_like(count), count]))
    return (bits[0] ^ bits[1]).reshape(shape)


def _unused(*_):
    raise NotImplementedError


# A Threefry key and the number that is still to be folded in; Flax folds into a key once, the hash of a path.
_LATER = jax.extend.random.define_prng_impl(
    key_shape=(3,),
    seed=_unused,
    split=_later_split,
    random_bits=lambda key, width, shape: jax.random.bits(_folded(key), shape, f"uint{width}"),
    fold_in=lambda key, data: jnp.append(key[:2], jnp.uint32(data)),
    name="vitpyramid_later",
)
# A Threefry key and how many of its numbers of 32 bits came before.
_COUNTED = jax.extend.random.define_prng_impl(
    key_shape=(3,),
    seed=_unused,
    split=_unused,
    random_bits=_counted_bits,
    fold_in=_unused,
    name="vitpyramid_counted",
)


@struct.dataclass
class Later(nn.meta.AxisMetadata):
    """A parameter that is still to be drawn.

    Attributes:
      key: data of a `_LATER` key, `[..., 3]`; in front, the axes of the loops that the parameter was made in.
      value: of the parameter's shape, `[..., *shape]`, for the modules, which do no more than look at it.
      draw, finish: see `_initialiser`.
    """

    key: jax.Array
    value: jax.Array
    draw: Callable = struct.field(pytree_node=False)
    finish: Callable = struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        """What a module gets for the parameter."""
        return self.value

    def replace_boxed(self, val) -> "Later":
        """Called by Flax where a module changes a value."""
        return self.replace(value=val)

    def add_axis(self, index, params) -> "Later":
        """Called by Flax behind a loop."""
        return self

    def remove_axis(self, index, params) -> "Later":
        """Called by Flax before a loop."""
        return self


def _is_later(key: jax.Array) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and jax.random.key_impl(key) == _LATER


def _initialiser(draw: Callable, finish: Callable[[jax.Array, tuple[int, ...]], jax.Array]):
    """An initialiser that makes its values, `finish(numbers, shape)`, of the standard ones of `draw(key, shape)`."""

    def init(key, shape, dtype=jnp.float32):
        if dtype == jnp.float32 and _is_later(key):
            finish_later = functools.partial(finish, shape=shape)
            return Later(jax.random.key_data(key), jnp.zeros(shape, dtype), draw, finish_later)
        return finish(draw(key, shape, dtype), shape)

    return init


def _between(numbers: jax.Array, low: float, high: float) -> jax.Array:
    """What `jax.random.uniform` makes of numbers in [0, 1)."""
    low, high = (jnp.asarray(limit, numbers.dtype) for limit in (low, high))
    return jnp.maximum(low, numbers * (high - low) + low)


def _fan_in_uniform(numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _between(numbers, -1, 1) * np.sqrt(3 * np.float32(1 / 3 / math.prod(shape[:-1])))


# timm's trunc_normal_(std=.02) cuts at -2 and 2, a hundred standard deviations: a plain normal.
normal_init = _initialiser(jax.random.normal, lambda numbers, shape: numbers * 0.02)
# PyTorch's default for weights of Linear and Conv: uniform in +-1 / sqrt(fan_in).
torch_kernel_init = _initialiser(jax.random.uniform, _fan_in_uniform)


def gaussian(std: float):
    """Normal with this standard deviation."""
    return _initialiser(jax.random.normal, lambda numbers, shape: numbers * std)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs of one output of a kernel `[..., in, out]`, and outputs of one input."""
    return math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]


def _uniform_within(numbers: jax.Array, bound: float) -> jax.Array:
    return _between(numbers, -bound, bound)


# Glorot and Bengio's, of kernels [..., in, out]: PyTorch's `xavier_uniform_`.
xavier_uniform = _initialiser(
    jax.random.uniform, lambda numbers, shape: _uniform_within(numbers, math.sqrt(6 / sum(_fans(shape))))
)
# PyTorch's `kaiming_uniform_(a=1)`, which detectron2 calls Xavier's.
fan_in_uniform = _initialiser(
    jax.random.uniform, lambda numbers, shape: _uniform_within(numbers, math.sqrt(3 / _fans(shape)[0]))
)
# PyTorch's `kaiming_normal_(mode="fan_out", nonlinearity="relu")`.
fan_out_normal = _initialiser(jax.random.normal, lambda numbers, shape: numbers * math.sqrt(2 / _fans(shape)[1]))


def torch_bias_init(fan_in: int):
    """PyTorch's default for biases of Linear and Conv: uniform in +-1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return _initialiser(jax.random.uniform, lambda numbers, shape: _uniform_within(numbers, bound))


def init(module: nn.Module, rngs, images, train: bool, method) -> dict:
    """`nn.Module.init(module, rngs, images, train=train, method=method)`; of the images only the shape is read.

    They may be a tree of arrays, if the method takes one.

    Keys of another kind than JAX's default give what they give there, and take as long to compile.
    """
    plain = functools.partial(nn.Module.init, module, train=train, method=method)
    images = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), images)
    keys = dict(rngs) if isinstance(rngs, dict) else {"params": rngs}
    root = keys["params"]
    if not jnp.issubdtype(root.dtype, jax.dtypes.prng_key):
        root = jax.random.wrap_key_data(root)
    if jax.random.key_impl(root) == _THREEFRY and jax.config.jax_threefry_partitionable:
        root = jax.random.wrap_key_data(_noted(jax.random.key_data(root)), impl=_LATER)
    keys["params"] = root

    program, shapes = jax.make_jaxpr(plain, return_shape=True)(keys, images)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, Later))
    noted = iter(_notes(program.jaxpr))
    notes = [next(noted) for leaf in leaves for _ in jax.tree.leaves(leaf)]
    # Run are what is neither the forward pass nor drawn later, and keys that come out of loops.
    wanted, places = [], []
    for leaf in leaves:
        places.append(len(wanted))
        wanted += [notes[len(wanted)] is None, False] if isinstance(leaf, Later) else [True]
    jaxpr, used = partial_eval.dce_jaxpr(program.jaxpr, wanted)
    inputs = [leaf for leaf, use in zip(jax.tree.leaves((keys, images)), used, strict=True) if use]
    outputs = iter(jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, program.consts))(*inputs))
    values = [next(outputs) if wanted[place] else notes[place] for place in places]

    for draw in (jax.random.normal, jax.random.uniform):
        chosen = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Later) and leaf.draw is draw]
        if chosen:
            drawn = _draw(draw, root, [(values[i], leaves[i].value) for i in chosen])
            for i, numbers in zip(chosen, drawn, strict=True):
                values[i] = leaves[i].finish(numbers)
    return jax.tree.unflatten(tree, values)


def _notes(jaxpr) -> list[int | None]:
    """For each output of a program: what was folded into the key that it is the data of, where that is a constant."""
    notes = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "random_fold_in":
            notes[equation.outvars[0]] = getattr(equation.invars[1], "val", None)
        elif equation.primitive.name == "random_unwrap":
            notes[equation.outvars[0]] = notes.get(equation.invars[0])
        elif equation.primitive.name == "remat2":
            notes |= zip(equation.outvars, _notes(equation.params["jaxpr"]), strict=True)
    return [None if hasattr(output, "val") else notes.get(output) for output in jaxpr.outvars]


def _draw(draw: Callable, root: jax.Array, parameters: Sequence[tuple]) -> list[jax.Array]:
    """Draws parameters, each given by a note or by keys `[..., 3]`, and by its shape and dtype."""
    order = sorted(range(len(parameters)), key=lambda i: isinstance(parameters[i][0], jax.Array))  # notes come first
    notes = np.array([key for key, _ in parameters if not isinstance(key, jax.Array)], np.uint32)[:, None]
    noted = jnp.concatenate([jnp.broadcast_to(jax.random.key_data(root)[:2], (len(notes), 2)), notes], axis=1)
    keys = [noted, *(key.reshape(-1, 3) for key, _ in parameters if isinstance(key, jax.Array))]
    counts = [parameters[i][0].size // 3 if isinstance(parameters[i][0], jax.Array) else 1 for i in order]
    layout = tuple((count, parameters[i][1].size // count) for i, count in zip(order, counts, strict=True))
    drawn = dict(zip(order, _draw_flat(draw, jnp.concatenate(keys), layout), strict=True))
    return [drawn[i].reshape(shape.shape) for i, (_, shape) in enumerate(parameters)]


@functools.partial(jax.jit, static_argnames=("draw", "layout"))
def _draw_flat(draw: Callable, keys: jax.Array, layout: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    """For each (count, size) of `layout`: `size` numbers of each of the next `count` keys, float32 [count, size]."""
    keys = jax.random.key_data(jax.vmap(_folded)(keys))
    pieces = np.array([-(-size // _PIECE) for count, size in layout for _ in range(count)])
    before = np.concatenate([_PIECE * np.arange(number, dtype=np.uint32) for number in pieces])
    counted = jnp.concatenate([keys[np.repeat(np.arange(len(pieces)), pieces)], before[:, None]], axis=1)
    counted = jax.random.wrap_key_data(counted, impl=_COUNTED)
    numbers = jax.lax.map(lambda key: draw(key, (_PIECE,), jnp.float32), counted)
    rows = [count * -(-size // _PIECE) for count, size in layout]
    ends = np.cumsum(rows)
    return [
        numbers[end - height : end].reshape(count, -1)[:, :size]
        for end, height, (count, size) in zip(ends, rows, layout, strict=True)
    ]
