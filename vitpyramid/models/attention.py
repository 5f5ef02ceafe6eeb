"""Softmax attention, plain self-attention, and the pre-norm block that all transformers here are made of."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitpyramid.models import mlp_forms, token_forms
from vitpyramid.models.forms import written
from vitpyramid.models.layers import DropPath, LayerNorm, Mlp, PackedLinear, linear


def attend(module: nn.Module, query, key, value, scale: float | None = None) -> jax.Array:
    """`softmax(scale * query key^T) value` for each head; heads are concatenated head-major.

    Called from a compact method of `module`, which sows the map as `attention` `[B, heads, N, M]` under
    `intermediates`. The softmax is computed in at least float32.

    Args:
      query: `[B, N, heads, d]`.
      key, value: `[B, M, heads, d]`.
      scale: None: `d ** -0.5`.

    Returns:
      `[B, N, heads * d]` in the dtype of `value`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", "attention", token_forms.attention_weights(query, key, scale))
    out = token_forms.attention(query, key, value, scale)
    return out.reshape(*out.shape[:2], -1)


def output_dropout(rate: float) -> nn.Dropout:
    """Dropout behind the projection of an attention, called from its compact method."""
    # What it drops follows from its name: another one would change runs that are resumed.
    return nn.Dropout(rate, deterministic=False, name="Dropout_1")


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
    torch_init: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        dim = x.shape[-1]
        query, key, value = PackedLinear(3, self.heads, self.dtype, self.qkv_bias, self.torch_init, name="qkv")(x)
        x = attend(self, query, key, value, self.scale)
        x = linear(dim, self.dtype, "proj", torch_init_from=dim if self.torch_init else None)(x)
        return output_dropout(self.drop_rate)(x)


class Block(nn.Module):
    """Pre-norm transformer encoder layer: an attention, then an MLP, each added to what it reads.

    Attributes:
      attention, mlp: make the two modules, `[B, N, C]` -> `[B, N, C]`, given their `name`.
      epsilon: of both norms.
      drop_path: probability of dropping a branch of a sample.
    """

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    epsilon: float
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, N, C]` -> `[B, N, C]`."""
        attn, mlp = self.attention(name="attn"), self.mlp(name="mlp")
        x = written(x + DropPath(self.drop_path)(attn(LayerNorm(self.epsilon, self.dtype, name="norm1")(x))))
        drop_path, norm = DropPath(self.drop_path), LayerNorm(self.epsilon, self.dtype, name="norm2")
        turns = mlp.turns(x) if isinstance(mlp, Mlp) and not self.is_initializing() else 1
        if turns == 1:
            return written(x + drop_path(mlp(norm(x))))
        parameters = [self.variables["params"]["norm2"][name] for name in ("scale", "bias")]
        for layer in ("fc1", "fc2"):
            parameters += [self.variables["params"]["mlp"][layer][name] for name in ("kernel", "bias")]
        divisor = drop_path.divisor(x.shape[0], x.dtype)
        return mlp_forms.residual_mlp(x, divisor, *parameters, epsilon=self.epsilon, turns=turns)
