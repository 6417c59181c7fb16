"""The profile of checkpoints: bytes as the formula says, times of what really ran, a table and a picture."""

from __future__ import annotations

import builtins

import pytest
import torch
import zero_core as zero
from checkpoint_models import LAYERS, WIDTH, Layer, Layers, gradients, same, whatever_their_size

ROWS = 64
INPUT = ROWS * WIDTH * 4


@pytest.fixture
def model() -> Layers:
    torch.manual_seed(2)
    return Layers()


@pytest.mark.parametrize("settings", [{}, {"host": True}, {"contiguous_bytes": 1 << 17}])
def test_bytes_and_times(settings: dict, model: Layers) -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    expected = gradients(model, lambda: model(x), x)
    handle = zero.checkpoint_modules(model, Layer, zero.CheckpointPolicy(**whatever_their_size(settings)))
    before = {name: dict(forward.__dict__) for name, forward in handle.forwards.items()}
    profile = zero.profile_checkpoints(model, lambda: model(x).sum().backward())
    assert [layer.name for layer in profile.layers] == [f"layers.{i}" for i in range(LAYERS)]
    for layer in profile.layers:
        assert layer.kept_bytes == INPUT
        assert layer.saved_bytes == INPUT + 3 * 2 * INPUT, (
            "the input; twice as wide: gelu's, dropout's, down's"
        )
        assert layer.forward_s > 0
        assert layer.recompute_s > 0
    assert profile.total().saved_bytes == 7 * LAYERS * INPUT
    assert before == {name: dict(forward.__dict__) for name, forward in handle.forwards.items()}
    assert same(gradients(model, lambda: model(x), x), expected)
    handle.close()


def test_table_and_picture(model: Layers, tmp_path) -> None:
    x = torch.randn(ROWS, WIDTH)
    with zero.checkpoint_modules(model, Layer):
        profile = zero.profile_checkpoints(model, lambda: model(x).sum().backward())
    head, *lines = profile.table().splitlines()
    assert head.split() == ["layer", "forward", "ms", "recompute", "ms", "kept", "MiB", "without", "MiB"]
    assert [line.split()[0] for line in lines] == ["layers.0", "layers.1", "layers.2", "all"]
    assert len({len(line) for line in [head, *lines]}) == 1
    profile.save_png(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_said(model: Layers, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(zero.ZeroConfigError, match="call checkpoint_modules first"):
        zero.profile_checkpoints(model, lambda: None)
    plain = builtins.__import__

    def without_matplotlib(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(zero.ZeroError, match=r'pip install "zero-core\[plot\]"'):
        zero.CheckpointProfile([zero.LayerCost("a")]).save_png(tmp_path / "none.png")


def test_a_step_that_fails_leaves_the_model_as_it_was(model: Layers) -> None:
    handle = zero.checkpoint_modules(model, Layer)
    runs = []

    def step() -> None:
        runs.append(None)
        if len(runs) > 1:
            raise KeyboardInterrupt

    for allowed in (1, 2):
        runs[:] = [None] * (1 - allowed)
        with pytest.raises(KeyboardInterrupt):
            zero.profile_checkpoints(model, step)
    assert all(module.forward is handle.forwards[f"layers.{i}"] for i, module in enumerate(model.layers))
    handle.close()
