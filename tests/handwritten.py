"""A transformer that is not Hugging Face's: another op order, attention spelled out, an op of its own."""

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Pre-norm attention: queries scaled before the product, mask filled in, heads joined by permute and reshape."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, dim = x.shape
        size = dim // self.heads
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q / math.sqrt(size)) @ k.transpose(-2, -1)
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        return self.out((scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(batch, length, dim))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), with norms and GELU written by hand."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.scale1, self.shift1 = nn.Parameter(torch.rand(dim) + 0.5), nn.Parameter(torch.randn(dim) * 0.1)
        self.scale2 = nn.Parameter(torch.rand(dim) + 0.5)
        self.up = nn.Parameter(torch.randn(dim, 2 * dim) * 0.1)
        self.down = nn.Parameter(torch.randn(2 * dim, dim) * 0.1)

    def layer_norm(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * self.scale1 + self.shift1

    def rms_norm(self, x: Tensor) -> Tensor:
        return self.scale2 * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))

    def gelu(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.layer_norm(x), mask)
        return x + self.gelu(self.rms_norm(x) @ self.up) @ self.down


class Encoder(nn.Module):
    """ids, mask [B, S] -> (states [B, S, dim], mean over real tokens [B, dim])."""

    def __init__(self, vocab: int = 50, dim: int = 24, heads: int = 3, layers: int = 2, longest: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.places = nn.Embedding(longest, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, mask)
        weights = mask.unsqueeze(-1).to(x.dtype)
        return x, (x * weights).sum(1) / weights.sum(1)
