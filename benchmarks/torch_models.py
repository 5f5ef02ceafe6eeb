"""T2T-ViT (performer) and ResT in PyTorch, for `step_torch.py`: no library has them.

Written from the papers, as their authors compute them (`Unfold`, packed projections, `einsum`), with the names of the
released weights, so that weights converted from here load, and both sides can be seen to give the same logits.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim * ratio), nn.Linear(dim * ratio, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; `attention` takes the arguments that `forward` is given behind the tokens."""

    def __init__(self, dim: int, mlp_ratio: int, attention: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = attention, Mlp(dim, mlp_ratio)

    def forward(self, x, *args):
        x = x + self.attn(self.norm1(x), *args)
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Performer(nn.Module):
    def __init__(self, width: int, dim: int = 64):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(dim)
        self.kqv, self.proj = nn.Linear(width, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(0.1))
        self.dropout = nn.Dropout(0.1)
        self.w = nn.Parameter(torch.empty(dim // 2, dim), requires_grad=False)

    def features(self, u):
        exponent = torch.einsum("bne,me->bnm", u, self.w) - (u * u).sum(-1, keepdim=True) / 2
        return exponent.exp() / len(self.w) ** 0.5

    def forward(self, x):
        k, q, v = self.kqv(self.norm1(x)).chunk(3, -1)
        k, q = self.features(k), self.features(q)
        denominator = torch.einsum("bnm,bm->bn", q, k.sum(1))[..., None] + 1e-8
        y = torch.einsum("bnm,bme->bne", q, torch.einsum("bnm,bne->bme", k, v)) / denominator
        x = v + self.dropout(self.proj(y))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.attention1, self.attention2 = Performer(3 * 49), Performer(64 * 9)
        self.project = nn.Linear(64 * 9, dim)

    def forward(self, x):
        x = self.attention1(F.unfold(x, 7, stride=4, padding=2).transpose(1, 2))
        x = self.attention2(self.windows(x))
        return self.project(self.windows(x))

    @staticmethod
    def windows(x):
        side = round(x.shape[1] ** 0.5)
        return F.unfold(x.transpose(1, 2).unflatten(2, (side, side)), 3, stride=2, padding=1).transpose(1, 2)


class T2TViT(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, mlp_ratio: int, classes: int, tokens: int):
        super().__init__()
        self.tokens_to_token = TokensToToken(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, mlp_ratio, SelfAttention(dim, heads)) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class PixelAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.pa_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        return x * self.pa_conv(x).sigmoid()


class Stem(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.conv1 = nn.Conv2d(3, half, 3, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, bias=False)
        self.conv3 = nn.Conv2d(half, dim, 3, 2, 1, bias=False)
        self.norm1, self.norm2, self.pos = nn.BatchNorm2d(half), nn.BatchNorm2d(half), PixelAttention(dim)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.pos(self.conv3(x))


class PatchEmbed(nn.Module):
    def __init__(self, before: int, dim: int):
        super().__init__()
        self.conv, self.norm, self.pos = nn.Conv2d(before, dim, 3, 2, 1), nn.BatchNorm2d(dim), PixelAttention(dim)

    def forward(self, x):
        return self.pos(self.norm(self.conv(x)))


class EfficientAttention(nn.Module):
    def __init__(self, dim: int, heads: int, sr: int):
        super().__init__()
        self.heads, self.mixed, self.reduced = heads, heads > 1, sr > 1
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if self.reduced:
            self.sr = nn.Conv2d(dim, dim, sr + 1, sr, sr // 2, groups=dim)
            self.sr_norm = nn.LayerNorm(dim)
        if self.mixed:
            self.transform_conv, self.transform_norm = nn.Conv2d(heads, heads, 1), nn.InstanceNorm2d(heads)

    def forward(self, x, side: int):
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        if self.reduced:
            x = self.sr(x.transpose(1, 2).reshape(b, c, side, side))
            x = self.sr_norm(x.flatten(2).transpose(1, 2))
        k, v = self.kv(x).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = (self.transform_conv(weights) if self.mixed else weights).softmax(-1)
        weights = self.transform_norm(weights) if self.mixed else weights
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class ResT(nn.Module):
    def __init__(self, depths, dims, heads, mlp_ratios, sr_ratios, classes: int):
        super().__init__()
        self.stem = Stem(dims[0])
        self.embeds, self.stages = [], []
        for s, depth in enumerate(depths):
            if s > 0:
                self.embeds.append(PatchEmbed(dims[s - 1], dims[s]))
                self.add_module(f"patch_embed_{s + 1}", self.embeds[-1])
            attentions = [EfficientAttention(dims[s], heads[s], sr_ratios[s]) for _ in range(depth)]
            self.stages.append(nn.ModuleList(Block(dims[s], mlp_ratios[s], attention) for attention in attentions))
            self.add_module(f"stage{s + 1}", self.stages[-1])
        self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], classes)

    def forward(self, x):
        x = self.stem(x)
        for s, blocks in enumerate(self.stages):
            x = self.embeds[s - 1](x) if s > 0 else x
            side = x.shape[-1]
            x = x.flatten(2).transpose(1, 2)
            for block in blocks:
                x = block(x, side)
            x = x.transpose(1, 2).unflatten(2, (side, side)) if s < len(self.stages) - 1 else x
        return self.head(self.norm(x).mean(1))
