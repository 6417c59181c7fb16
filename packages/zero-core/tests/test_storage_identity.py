"""Every torch.nn layer type trains under stage 3 as it does alone.

Autograd keeps views of a parameter's storage for the backward; a stage 3 that pointed parameters at other memory
would pass forward and be wrong in backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, plain_copy, relative_error, seeded

D = 12


def tokens() -> torch.Tensor:
    return torch.randn(3, 6, D)


def image() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8)


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0]


class Pair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x.flip(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(D, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x)[0]


class Ids(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner((x[..., 0].abs() * 10).long() % 9)


class InPlace(nn.Module):
    """Changes its input in place: inputs must reach a unit as they are, not as views made by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner((x * 1.0).relu_().add_(1))


class Scaled(nn.Module):
    """A weight computed from two others, one of them saved by autograd for longer than the input's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "Linear": (lambda: nn.Linear(D, 7), tokens),
    "Bilinear": (lambda: Pair(nn.Bilinear(D, D, 5)), tokens),
    "Conv1d": (lambda: nn.Conv1d(6, 5, 3), tokens),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), image),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 3), lambda: torch.randn(1, 2, 5, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 5, 3), tokens),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), image),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: torch.randn(1, 2, 4, 4, 4)),
    "Embedding": (lambda: Ids(nn.Embedding(9, D, padding_idx=0)), tokens),
    "EmbeddingBag": (lambda: Ids(nn.EmbeddingBag(9, D, mode="mean")), tokens),
    "SparseEmbedding": (lambda: Ids(nn.Embedding(9, D, sparse=True)), tokens),
    "LayerNorm": (lambda: nn.LayerNorm(D), tokens),
    "RMSNorm": (lambda: nn.RMSNorm(D), tokens),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), image),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), tokens),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), image),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), image),
    "PReLU": (lambda: nn.PReLU(6), tokens),
    "RNN": (lambda: Recurrent(nn.RNN(D, 5, batch_first=True)), tokens),
    "LSTM": (lambda: Recurrent(nn.LSTM(D, 5, num_layers=2, batch_first=True, bidirectional=True)), tokens),
    "GRU": (lambda: Recurrent(nn.GRU(D, 5, batch_first=True)), tokens),
    "RNNCell": (lambda: nn.Sequential(nn.RNNCell(D, 5)), lambda: torch.randn(4, D)),
    "LSTMCell": (lambda: Recurrent(nn.LSTMCell(D, 5)), lambda: torch.randn(4, D)),
    "GRUCell": (lambda: nn.Sequential(nn.GRUCell(D, 5)), lambda: torch.randn(4, D)),
    "MultiheadAttention": (lambda: Attention(), tokens),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 3, 16, 0.0, batch_first=True), 2),
        tokens,
    ),
    "TransformerDecoder": (
        lambda: Pair(nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 3, 16, 0.0, batch_first=True), 2)),
        tokens,
    ),
    "InPlace": (InPlace, tokens),
    "weight_norm": (Scaled, tokens),
    "AdaptiveLogSoftmax": (lambda: AdaptiveHead(), tokens),
}


class AdaptiveHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.AdaptiveLogSoftmaxWithLoss(D, 20, cutoffs=[5, 10], div_value=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, D)
        return self.inner(flat, torch.arange(flat.shape[0]) % 20).output


def train(model: nn.Module, optimizer, data: Callable[[], torch.Tensor], steps: int = 3) -> list[float]:
    losses = []
    torch.manual_seed(7)
    for _ in range(steps):
        loss = model(data()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def every_layer(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    mesh = dp_mesh(world_size)
    errors = {}
    for name, (build, data) in LAYERS.items():
        layer = seeded(build)
        # Two of the layer in a row make them repeated blocks where shapes allow; alone, the layer is the root unit.
        plain = plain_copy(layer)
        expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), data)
        model = zero.shard(layer, mesh, stage=3)
        found = train(model, zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1)), data)
        weights = {n: p.detach() for n, p in plain.named_parameters()}
        state = {n: v for n, v in zero.full_state_dict(model).items() if n in weights}
        difference = max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(expected, found, strict=True))
        errors[name] = (difference, relative_error(state, weights))
        assert expected[0] != expected[-1], f"{name} learned nothing: the comparison would be empty"
    return errors


def test_every_layer_type_under_stage_3() -> None:
    for errors in run_ranks(every_layer, 2, 2):
        assert len(errors) == len(LAYERS)
        assert not {name: error for name, error in errors.items() if not max(error) <= 2e-6}
