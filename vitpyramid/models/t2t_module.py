"""The tokens-to-token module of T2T-ViT: from an image to tokens at stride 16 (paper section 3.1).

Equal to `T2T_module`, `Token_performer` and `Token_transformer` of github.com/yitu-opensource/T2T-ViT, commit 0f63dc95,
`models/`, on the square images that those accept. Here the grid is the one that the soft splits make, square or not.

A token after a soft split holds its window. PyTorch's `Unfold` orders the window (c, ky, kx), and the parameters that
meet it are stored so. `forms.soft_split` orders it (kx, ky, c): that is two concatenations of contiguous rows, several
times faster than the other order, and only the parameters have to be permuted.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models import forms, token_forms
from vitpyramid.models.attention import attend
from vitpyramid.models.forms import written
from vitpyramid.models.layers import (
    LayerNorm,
    Mlp,
    linear,
    normal_init,
    torch_bias_init,
    torch_kernel_init,
)

SOFT_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # window, stride, zero padding on each side
TOKEN_DIM = 64
GUARD = 1e-8  # added to the performer's denominator


def split_grids(height: int, width: int) -> list[tuple[int, int]]:
    """Grid `(h, w)` behind each soft split of an image; both sides at least 3."""
    grids = [(height, width)]
    for split in SOFT_SPLITS:
        grids.append(forms.split_grid(grids[-1], *split))
    return grids[1:]


def token_grid(height: int, width: int) -> tuple[int, int]:
    """Grid `(h, w)` of the tokens of an image."""
    return split_grids(height, width)[-1]


class SplitNorm(nn.Module):
    """The parameters of LayerNorm over windows of `depth` entries, in PyTorch's order."""

    depth: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Scale and shift, `[D]` each."""
        scale = self.param("scale", nn.initializers.ones, (self.depth,))
        return scale, self.param("bias", nn.initializers.zeros, (self.depth,))


class SplitLinear(nn.Module):
    """Soft split, norm and dense layer in one, as some devices compute them; kernel rows are in PyTorch's order."""

    features: int
    split: tuple[int, int, int]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
        """`[B, H, W, C]` and the norm's parameters `[D]` -> `[B, N, features]`."""
        kernel = self.param("kernel", normal_init, (len(scale), self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return forms.split_norm_linear(x, scale, shift, kernel, bias, self.split, self.dtype)


class SplitProject(nn.Module):
    """The last soft split and the dense layer behind it. No norm stands between, so they are one convolution."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, h, w, features]`."""
        window, stride, padding = SOFT_SPLITS[2]
        dim = x.shape[-1]
        kernel = self.param("kernel", normal_init, (dim * window * window, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = kernel.reshape(dim, window, window, -1).transpose(1, 2, 0, 3)  # [ky, kx, c, features]
        return bias + forms.convolution(x, kernel, (stride, stride), [(padding, padding)] * 2)


def performer_attention(query: jax.Array, key: jax.Array, value: jax.Array, w: jax.Array) -> jax.Array:
    """Softmax attention approximated by positive random features, linear in the number of tokens.

    `phi(q) (phi(k)^T v) / (phi(q) . sum_tokens phi(k) + 1e-8)` with `phi(u) = exp(w u - |u|^2 / 2) / sqrt(m)`, in at
    least float32. This is the official value; the official code takes the exponentials as they are, which overflows
    in half precision.

    Args:
      query, key, value: `[B, N, e]`.
      w: random features, `[m, e]`.

    Returns:
      `[B, N, e]`, at least float32.
    """
    phi_query, phi_key, denominator = performer_features(query, key, w)
    key_value = jnp.einsum("bnm,bne->bme", phi_key, value.astype(phi_key.dtype))
    return jnp.einsum("bnm,bme->bne", phi_query, key_value) / denominator


def performer_weights(query: jax.Array, key: jax.Array, w: jax.Array) -> jax.Array:
    """The map `[B, 1, N, N]` that `performer_attention` applies without making it; rows sum to 1 but for the guard."""
    phi_query, phi_key, denominator = performer_features(query, key, w)
    return (jnp.einsum("bnm,bkm->bnk", phi_query, phi_key) / denominator)[:, None]


def performer_features(query: jax.Array, key: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`phi` of query and key, `[B, N, m]` each, and the denominator `[B, N, 1]`, shifted so that nothing overflows."""
    # A shift s of the exponents cancels in the quotient if it is the same in all terms of its sums, and then carries no
    # gradient. The keys' may differ by feature: exp(s_k) is given back to the query's feature, which meets the keys'
    # in each term. So the largest phi(k) of each feature is 1. The queries' must be one for all features, and divides
    # the guard as well. It is at least 0, or the guard would overflow: with s_q > 0 the denominator is at least 1, with
    # s_q = 0 the guard is m * 1e-8, beside which an underflow of phi(q) is nothing.
    key_exponent = token_forms.random_features(key, w)
    key_shift = jax.lax.stop_gradient(jnp.max(key_exponent, axis=1, keepdims=True))  # [B, 1, m]
    query_exponent = token_forms.random_features(query, w) + key_shift
    query_shift = jnp.maximum(jnp.max(query_exponent, axis=2, keepdims=True), 0)
    query_shift = jax.lax.stop_gradient(query_shift)  # [B, N, 1]
    phi_key, phi_query = jnp.exp(key_exponent - key_shift), jnp.exp(query_exponent - query_shift)

    guard = GUARD * w.shape[0] * jnp.exp(-query_shift)  # m: both phi are without their 1 / sqrt(m)
    denominator = jnp.sum(phi_query * jnp.sum(phi_key, axis=1, keepdims=True), axis=2, keepdims=True)
    return phi_query, phi_key, denominator + guard


def orthogonal_features(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`[m, e]`, `m <= e`: orthogonal rows of norm sqrt(m)."""
    return nn.initializers.orthogonal(math.sqrt(shape[0]))(key, shape)


class TokenPerformer(nn.Module):
    """Soft split and performer layer; its residual is the value, as the input has another width.

    The random features `w` are drawn once and never trained: they lie in the collection `constants`.
    """

    split: tuple[int, int, int]
    drop_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, N, 64]`."""
        scale, shift = SplitNorm(self.split[0] ** 2 * x.shape[-1], name="norm1")()
        kqv = SplitLinear(3 * TOKEN_DIM, self.split, dtype=self.dtype, name="kqv")(x, scale, shift)
        key, query, value = jnp.split(kqv, 3, axis=-1)
        shape = (TOKEN_DIM // 2, TOKEN_DIM)
        w = self.variable("constants", "w", lambda: orthogonal_features(self.make_rng("params"), shape)).value
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "kernel_attention", performer_weights(query, key, w))
        y = performer_attention(query, key, value, w).astype(self.dtype)
        y = written(linear(TOKEN_DIM, self.dtype, "proj")(y))
        x = value + nn.Dropout(self.drop_rate, deterministic=False)(y)
        y = LayerNorm(1e-5, self.dtype, name="norm2")(x)
        y = token_forms.gelu(linear(TOKEN_DIM, self.dtype, "mlp_0")(y))
        y = written(linear(TOKEN_DIM, self.dtype, "mlp_2")(y))
        return x + nn.Dropout(self.drop_rate, deterministic=False)(y)

    @nn.nowrap
    def elementwise_macs(self, out: jax.Array) -> int:
        """Multiply-accumulates of the denominators, for `tools.summary`, which cannot see them in a sum."""
        return out.size // TOKEN_DIM * (TOKEN_DIM // 2)


class TokenAttention(nn.Module):
    """Norm and self-attention with one head; its residual is the value."""

    split: tuple[int, int, int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
        """`[B, H, W, C]` and the norm's parameters `[D]` -> `[B, N, 64]`."""
        qkv = SplitLinear(3 * TOKEN_DIM, self.split, use_bias=False, dtype=self.dtype, name="qkv")(x, scale, shift)
        query, key, value = jnp.split(qkv[:, :, None], 3, axis=-1)  # [B, N, 1, 64] each
        # The scale is the input width's, not the head's: so is the official code.
        y = attend(self, query, key, value, len(scale) ** -0.5)
        return value[:, :, 0] + linear(TOKEN_DIM, self.dtype, "proj")(y)


class TokenTransformer(nn.Module):
    """Soft split and transformer layer."""

    split: tuple[int, int, int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, N, 64]`."""
        scale, shift = SplitNorm(self.split[0] ** 2 * x.shape[-1], name="norm1")()
        x = TokenAttention(self.split, self.dtype, name="attn")(x, scale, shift)
        return x + Mlp(1, dtype=self.dtype, name="mlp")(LayerNorm(1e-5, self.dtype, name="norm2")(x))


class TokensToToken(nn.Module):
    """Three soft splits with an attention layer after the first and the second; or three convolutions.

    Attributes:
      dim: width of the tokens.
      tokens_type: the attention layers, "performer" or "transformer"; or "convolution": the paper's ablation (Table 7),
        three convolutions with the windows and strides of the soft splits. The official code has their parameters and
        no forward pass. Applying them one after another with nothing between is ours.
      drop_rate: the performer's dropout. The others have none.
      remat: recompute the attention layers in the backward pass instead of storing them.
    """

    dim: int
    tokens_type: str
    drop_rate: float = 0.0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, h, w, dim]` with `(h, w) = token_grid(H, W)`."""
        if self.tokens_type == "convolution":
            for features, split, name in zip(
                (TOKEN_DIM, TOKEN_DIM, self.dim), SOFT_SPLITS, ("soft_split0", "soft_split1", "project"), strict=True
            ):
                x = self.convolution(x, features, *split, name)
            return x
        for i, split in enumerate(SOFT_SPLITS[:2], start=1):
            grid = forms.split_grid(x.shape[1:3], *split)
            x = self.attention(split, f"attention{i}")(x)  # [B, h * w, 64]
            x = x.reshape(x.shape[0], *grid, TOKEN_DIM)
        return SplitProject(self.dim, self.dtype, name="project")(x)

    def attention(self, split: tuple[int, int, int], name: str) -> nn.Module:
        """The attention layer behind a soft split."""
        kinds = {"performer": TokenPerformer, "transformer": TokenTransformer}
        if self.tokens_type not in kinds:
            raise ValueError(f"tokens_type is {self.tokens_type!r}, expected one of {', '.join(kinds)}, convolution")
        kind = kinds[self.tokens_type]
        options = {"drop_rate": self.drop_rate} if kind is TokenPerformer else {}
        return (nn.remat(kind) if self.remat else kind)(split, dtype=self.dtype, name=name, **options)

    def convolution(self, x, features: int, window: int, stride: int, padding: int, name: str) -> jax.Array:
        """Convolution initialised as PyTorch does: the official initialisation leaves convolutions alone."""
        return nn.Conv(
            features,
            (window, window),
            stride,
            padding,
            dtype=self.dtype,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(window * window * x.shape[-1]),
            name=name,
        )(x)
