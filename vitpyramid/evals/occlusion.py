"""Images with parts blacked out.

`centre` at a ratio of 1/4 is the "Occ" of the PiT paper's robustness table: the central 112 x 112 of 224 x 224 zeroed.
`patches` is patch drop as in Naseer et al., "Intriguing Properties of Vision Transformers" (arXiv 2105.10497).

All take images `[B, H, W, C]` of pixels and `ratio`, the share of the image to hide, which may be traced, and put black
there; a network's normalisation comes after them. They take keys, one an image, `[B]`, so that what is hidden does not
depend on the batch that an image is in.
"""

import jax
import jax.numpy as jnp


def patches(keys: jax.Array, images: jax.Array, ratio: float, grid: int = 14) -> jax.Array:
    """Hides a share of the `grid x grid` parts of each image, drawn without repetition, their number rounded."""
    height, width = images.shape[1:3]
    part = (jnp.arange(height) * grid // height)[:, None] * grid + jnp.arange(width) * grid // width

    def hide(key, image):
        rank = jax.random.permutation(key, grid * grid)
        return jnp.where((rank[part] < jnp.round(ratio * grid * grid))[..., None], 0, image)

    return jax.vmap(hide)(keys, images)


def centre(keys: jax.Array, images: jax.Array, ratio: float) -> jax.Array:
    """Hides the central rectangle with the image's aspect, its sides rounded to whole pixels; `keys` are not read."""
    height, width = images.shape[1:3]
    tall, wide = box_sides(height, width, ratio)
    return _hide(images, (height - tall) // 2, (width - wide) // 2, tall, wide)


def box(keys: jax.Array, images: jax.Array, ratio: float) -> jax.Array:
    """Hides a rectangle like `centre`'s wherever it fits."""
    height, width = images.shape[1:3]
    tall, wide = box_sides(height, width, ratio)

    def hide(key, image):
        top_key, left_key = jax.random.split(key)
        top = jax.random.randint(top_key, (), 0, height - tall + 1)
        return _hide(image, top, jax.random.randint(left_key, (), 0, width - wide + 1), tall, wide)

    return jax.vmap(hide)(keys, images)


def box_sides(height: int, width: int, ratio: float) -> tuple[jax.Array, jax.Array]:
    """Height and width of a rectangle with `ratio` of the area of an image."""
    tall, wide = (jnp.round(side * jnp.sqrt(ratio)).astype(jnp.int32) for side in (height, width))
    return tall, wide


def _hide(images, top, left, tall, wide):
    rows, columns = jnp.arange(images.shape[-3]) - top, jnp.arange(images.shape[-2]) - left
    inside = ((rows >= 0) & (rows < tall))[:, None] & (columns >= 0) & (columns < wide)
    return jnp.where(inside[..., None], 0, images)
