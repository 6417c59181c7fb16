"""A decoder's weights, from a checkpoint: for each part the tensors that the family names, cut to what this rank holds.

In: a `Decoder` without weights, a family's table, a `Checkpoint`. What is missing, unexpected or of another shape ends
with a `ModelError` that names the tensor and where it was looked for. Next: `weights`, which is what others call.
"""

from __future__ import annotations

import re
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import ModelError
from .huge_pages import HugePages
from .linear import Linear
from .models.decoder import Decoder
from .models.families import Family
from .models.layers import Embedding
from .models.spec import DecoderSpec
from .models.weight_map import Source, pieces, sources
from .parallel import Shard

_ADAPTED = ("attention.qkv", "attention.o", "mlp.up", "mlp.down", "shared.up", "shared.down")


@runtime_checkable
class Loadable(Protocol):
    """A part of a decoder that has weights."""

    wanted: dict[str, Shard]
    dtype: torch.dtype
    device: torch.device

    def load(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Take what is wanted."""
        ...


def fill(
    decoder: Decoder, family: Family, hf_config: Any, checkpoint: Checkpoint
) -> list[tuple[Linear, tuple[Source, ...]]]:
    """Load every weight of a decoder, also again later from a checkpoint of the same model.

    Returns:
        See `LoadedModel.linears`.

    Raises:
        ModelError: see `load_model`.
    """
    names = _Names(checkpoint, family)
    table = family.table(hf_config)
    linears: list[tuple[Linear, tuple[Source, ...]]] = []
    huge_pages = HugePages()
    for module_name, module in decoder.named_modules():
        if not isinstance(module, Loadable):
            continue
        loaded: dict[str, Tensor] = {}
        for parameter, shard in module.wanted.items():
            try:
                alternatives = sources(table, decoder.spec, module_name, parameter, shard.sections)
            except KeyError as error:
                raise ModelError(
                    f"{hf_config.model_type}: expected no {module_name!r} in this family, got a config that has one"
                ) from error
            parts = names.choose(alternatives)
            loaded[parameter] = names.read(parts, shard, module.dtype, module.device)
            if parameter == "weight" and isinstance(module, Linear) and module_name.endswith(_ADAPTED):
                linears.append((module, parts))
        module.load(loaded.get("weight"), loaded.get("bias"))
        held = isinstance(module, (Linear, Embedding)) and "weight" in loaded
        if held and module.device.type == "cpu":
            _settle(module, checkpoint, huge_pages)
    names.expect_all_used(decoder.spec)
    decoder.finish()
    return linears


def _settle(module: Linear | Embedding, checkpoint: Checkpoint, huge_pages: HugePages) -> None:
    """Have the large tensors of a layer lie in huge pages, if it does not share them with a module of somebody's."""
    for name in ("weight", "scale", "zero"):
        held = getattr(module, name, None)
        if held is not None and not held.is_meta and not checkpoint.holds(held):
            setattr(module, name, huge_pages.place(held))


class _Names:
    """A checkpoint's tensors without the family's prefix, and which of them have been read."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self._checkpoint, self._family = checkpoint, family
        self._shapes = checkpoint.shapes()
        self._full = {self._short(name): name for name in self._shapes}
        self._used: set[str] = set()
        if len(self._full) < len(self._shapes):
            twice = sorted(set(self._shapes) - set(self._full.values()))
            raise ModelError(
                f"{checkpoint.where}: expected each tensor once, got {twice[0]!r} with and without a prefix"
            )

    def _short(self, name: str) -> str:
        for prefix in self._family.prefixes:
            if name.startswith(prefix):
                return name[len(prefix) :]
        return name

    def choose(self, alternatives: list[tuple[Source, ...]]) -> tuple[Source, ...]:
        """The first that the checkpoint has any tensor of; all of its tensors have to be there."""
        found = next(
            (parts for parts in alternatives if any(part.name in self._full for part in parts)),
            alternatives[0],
        )
        for part in found:
            if part.name not in self._full:
                prefix = next(iter(self._family.prefixes), "")
                others = [parts[0].name for parts in alternatives if parts is not found]
                also = f" (or {', '.join(map(repr, others))})" if others else ""
                raise ModelError(
                    f"{self._checkpoint.where}: expected tensor {part.name!r}{also}, with or without {prefix!r} "
                    "before it, got none; the checkpoint is incomplete or its config.json another model's"
                )
        return found

    def read(
        self, parts: tuple[Source, ...], shard: Shard, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The part of a matrix that `shard` says, made of `parts`."""
        for part in parts:
            self._check_shape(part, shard)
            self._used.add(part.name)
        found = pieces(parts, shard.rows)
        if len(found) == 1:
            return self._piece(*found[0], shard).to(device=device, dtype=dtype)
        made = torch.empty(shard.shape, dtype=dtype, device=device)
        first = 0
        for part, rows in found:
            made[first : first + len(rows)] = self._piece(part, rows, shard)
            first += len(rows)
        return made

    def _piece(self, part: Source, rows: range, shard: Shard) -> Tensor:
        index = [slice(rows.start, rows.stop)]
        if shard.cols is not None:
            index.append(slice(shard.cols.start, shard.cols.stop))
        if part.transposed:
            index.reverse()
        if part.expert is not None:
            index.insert(0, slice(part.expert, part.expert + 1))
        piece = self._checkpoint.read(self._full[part.name], tuple(index))
        piece = piece.squeeze(0) if part.expert is not None else piece
        return piece.t() if part.transposed else piece

    def _check_shape(self, part: Source, shard: Shard) -> None:
        expected = (part.size,) if shard.width is None else (part.size, shard.width)
        expected = expected[::-1] if part.transposed else expected
        name = self._full[part.name]
        got = self._shapes[name]
        if part.expert is not None:
            fits = got[1:] == expected and part.expert < got[0]
            expected = (max(part.expert + 1, got[0] if got else 0), *expected)
        else:
            fits = got == expected
        if not fits:
            raise ModelError(
                f"{self._checkpoint.where}: tensor {name!r}: expected shape {list(expected)}, got {list(got)}; "
                "the weights and config.json are of different models"
            )

    def expect_all_used(self, spec: DecoderSpec) -> None:
        """Every tensor has been read, or holds no weights."""
        ignored = [
            *self._family.ignored,
            *([r"^lm_head\.weight$", r"^embed_out\.weight$"] if spec.tied else []),
        ]
        unexpected = [
            self._full[name]
            for name in self._full
            if name not in self._used and not any(re.search(each, name) for each in ignored)
        ]
        if unexpected:
            raise ModelError(
                f"{self._checkpoint.where}: got {len(unexpected)} tensors that this model has no place for, "
                f"the first {unexpected[0]!r}; the weights and config.json are of different models"
            )
