"""A byte-level GPT in plain torch: what a user brings. It knows nothing of ranks, shards or engines.

In: token ids [B, T]. Out: logits [B, T, V], or their mean loss against targets [B, T].
Shape suffixes: B batch, T positions, C width, H heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Size of a model.

    Attributes:
        vocab: Number of tokens; 256 for bytes.
        context: Most positions at once.
        layers: Number of blocks.
        width: Width of the residual stream; a multiple of `heads`.
        heads: Attention heads.
        tied: Whether the output layer shares the embedding's weight.
    """

    vocab: int = 256
    context: int = 256
    layers: int = 4
    width: int = 256
    heads: int = 4
    tied: bool = True

    @property
    def hidden_size(self) -> int:
        """The width, under the name by which others look for it."""
        return self.width


def rotate(x_BHTD: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., arXiv:2104.09864) over the whole head."""
    t, half = x_BHTD.shape[-2], x_BHTD.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=x_BHTD.device) / half)
    angle_TD = torch.arange(t, device=x_BHTD.device)[:, None] * frequency
    cos, sin = angle_TD.cos().to(x_BHTD.dtype), angle_TD.sin().to(x_BHTD.dtype)
    a, b = x_BHTD.split(half, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        b, t, c = x_BTC.shape
        qkv = self.qkv(x_BTC).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y_BHTD = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        out_BTC: Tensor = self.out(y_BHTD.transpose(1, 2).reshape(b, t, c))
        return out_BTC


class Block(nn.Module):
    """Attention and a feed-forward network, each normalised before and added after."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC))
        fed_BTC: Tensor = self.down(F.gelu(self.up(self.norm2(x_BTC))))
        return x_BTC + fed_BTC


class GPT(nn.Module):
    """Predicts the next token."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self._initialize()

    def _initialize(self) -> None:
        """Normal values; those that are added to the residual stream are smaller, the more of them there are."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                adds = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 * ((2 * self.config.layers) ** -0.5 if adds else 1.0))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; with targets, their mean cross-entropy in nats (fp32)."""
        x_BTC = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV: Tensor = self.head(self.norm(x_BTC))
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    @torch.no_grad()
    def generate(
        self, tokens_BT: Tensor, num_tokens: int, temperature: float = 0.8, top_k: int = 40
    ) -> Tensor:
        """Continue each row by `num_tokens` sampled tokens; returns [B, T + num_tokens]."""
        for _ in range(num_tokens):
            logits_BV = self(tokens_BT[:, -self.config.context :])[:, -1].float() / temperature
            lowest = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
            probabilities = logits_BV.masked_fill(logits_BV < lowest, float("-inf")).softmax(-1)
            tokens_BT = torch.cat((tokens_BT, torch.multinomial(probabilities, 1)), dim=1)
        return tokens_BT
