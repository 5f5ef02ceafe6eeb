"""Softmax attention, and the plain transformer block that PiT, T2T-ViT and DeiT share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models.layers import DropPath, Mlp, at_least_float32, layer_norm, linear


def attend(module: nn.Module, query, key, value, scale: float, drop_rate: float = 0.0) -> jax.Array:
    """`softmax(scale * query key^T) value` for each head; heads are concatenated head-major.

    Called from a compact method of `module`, which sows the map as `attention` `[B, heads, N, M]` under
    `intermediates`. The softmax is computed in at least float32.

    Args:
      query: `[B, N, heads, d]`.
      key, value: `[B, M, heads, d]`.
      drop_rate: dropout on the map.

    Returns:
      `[B, N, heads * d]` in the dtype of `value`.
    """
    logits = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=at_least_float32(query.dtype))
    weights = jax.nn.softmax(logits * scale)
    module.sow("intermediates", "attention", weights)
    weights = nn.Dropout(drop_rate, deterministic=False)(weights.astype(value.dtype))
    out = jnp.einsum("bhnm,bmhd->bnhd", weights, value)
    return out.reshape(*out.shape[:2], -1)


class SelfAttention(nn.Module):
    """Multi-head attention with one packed projection `[query | key | value]`, each head-major.

    Attributes:
      scale: of the logits; None: `d ** -0.5` for heads of width `d`.
      torch_init: initialise as PyTorch does instead of with normal weights and zero biases.
    """

    heads: int
    qkv_bias: bool
    scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    torch_init: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        b, n, dim = x.shape
        torch_init_from = dim if self.torch_init else None
        qkv = linear(3 * dim, self.dtype, "qkv", self.qkv_bias, torch_init_from)(x)
        query, key, value = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, -1), 2, 0)
        scale = (dim // self.heads) ** -0.5 if self.scale is None else self.scale
        x = attend(self, query, key, value, scale, self.attn_drop_rate)
        x = linear(dim, self.dtype, "proj", torch_init_from=torch_init_from)(x)
        return nn.Dropout(self.drop_rate, deterministic=False)(x)


class Block(nn.Module):
    """Pre-norm transformer encoder layer with plain self-attention: timm's ViT `Block`.

    Attributes:
      epsilon: of both norms.
      drop_path: probability of dropping a branch of a sample.
    """

    heads: int
    mlp_ratio: float
    epsilon: float
    qkv_bias: bool
    scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path: float = 0.0
    torch_init: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        attn = SelfAttention(
            self.heads,
            self.qkv_bias,
            self.scale,
            self.drop_rate,
            self.attn_drop_rate,
            self.torch_init,
            self.dtype,
            name="attn",
        )
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.drop_rate, self.torch_init, self.dtype, name="mlp")
        x = x + DropPath(self.drop_path)(attn(layer_norm(self.epsilon, self.dtype, "norm1")(x)))
        return x + DropPath(self.drop_path)(mlp(layer_norm(self.epsilon, self.dtype, "norm2")(x)))
