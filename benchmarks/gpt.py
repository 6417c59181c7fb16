"""The GPT that the benchmarks train: pre-norm blocks, learned positions, causal attention; torch alone.

`PRESETS` are sizes; `PRESETS["25m"]` has 25.6 M parameters. Shapes: B sequences, T tokens each, C channels,
H heads, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a GPT."""

    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    sequence_length: int
    tied_head: bool = False


PRESETS = {
    "tiny": GPTConfig(num_layers=2, width=64, num_heads=4, vocab_size=256, sequence_length=64),
    "25m": GPTConfig(num_layers=8, width=512, num_heads=8, vocab_size=256, sequence_length=256),
    "110m": GPTConfig(num_layers=12, width=768, num_heads=12, vocab_size=16_000, sequence_length=256),
    "350m": GPTConfig(num_layers=24, width=1024, num_heads=16, vocab_size=24_000, sequence_length=256),
}


class Attention(nn.Module):
    """Causal self-attention over all heads at once."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Attend; same shape out."""
        batch, tokens, width = x_BTC.shape
        qkv = self.qkv(x_BTC).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        out: Tensor = self.out(y_BHTD.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Block(nn.Module):
    """Attention, then a GELU MLP of four times the width, each on a normed input and added to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Same shape out."""
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC))
        out: Tensor = x_BTC + self.mlp(self.norm2(x_BTC))
        return out


class GPT(nn.Module):
    """Tokens and the tokens that follow them in, mean cross-entropy out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.sequence_length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(_initialise)
        if config.tied_head:
            self.head.weight = self.words.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss, a float32 scalar."""
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTC = self.words(tokens_BT) + self.positions(places_T)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV = self.head(self.norm(x_BTC))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def num_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def random_batch(config: GPTConfig, *, sequences: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of random text; the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, config.sequence_length + 1)
    text_BT = torch.randint(config.vocab_size, shape, generator=generator)
    return text_BT[:, :-1].contiguous(), text_BT[:, 1:].contiguous()
