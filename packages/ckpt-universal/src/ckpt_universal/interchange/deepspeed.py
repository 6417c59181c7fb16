"""DeepSpeed's checkpoint directories: stages 0 to 3, and universal ones; read only.

Parameters are called `model.NAME`, what the optimizer keeps `optimizer.NAME.KEY` (`master` is the fp32 copy where the
parameters have another dtype). Nothing of DeepSpeed is needed, and nothing is unpickled but tensors and containers.
Source: what DeepSpeed's documentation and its scripts beside a checkpoint say of the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..boxes import Box, flat_range
from ..errors import CheckpointError, CorruptError
from .source import Described, reading
from .unpickle import Inert, load_tensors

_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")

_OWN = frozenset(
    {
        "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
        "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
        "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "num_experts",
        "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    }
)  # fmt: skip
"""DeepSpeed's own entries of a file of model states; others are the client's."""


@dataclass(frozen=True)
class _Flat:
    """A tensor as ranges of flat tensors: for each, where it begins in the logical tensor."""

    described: Described
    pieces: Sequence[tuple[int, torch.Tensor]]


class DeepSpeedSource:
    """A directory that DeepSpeed's `save_checkpoint`, or its conversion to a universal checkpoint, wrote."""

    def __init__(self, path: Path) -> None:
        with reading(path / "latest"):
            root = _step_folder(path)
        self.path = str(root)
        self.left_out: list[str] = []
        self._flat: dict[str, _Flat] = {}
        models = _by_rank(root, _MODEL)
        if not models:
            raise CheckpointError(
                f"{root}: no files '*mp_rank_00_model_states.pt'; is it a folder of DeepSpeed?"
            )
        states = [_entries(file) for file in models]
        with reading(models[0]):
            self._module = self._tensors_of(models[0], states[0]["module"] or {})
            self.values: Any = {"deepspeed": _facts(states[0])}
            self._take_client_state(states[0])
        optims = [_entries(file, "optimizer_state_dict") for file in _by_rank(root, _OPTIM)]
        with reading(root):
            self._take_optimizer(root / "zero", states, optims)
            self._take_loss_scale(root / "zero" / "optimizer_state.pt", states[0], optims)
        with reading(models[0]):
            self._take_module(states[0], released=bool(optims) and "fp32_flat_groups" in optims[0])
        self.tensors: Mapping[str, Described] = {name: flat.described for name, flat in self._flat.items()}

    def _take_module(self, state: Mapping[str, Any], *, released: bool) -> None:
        """What else the module has: buffers, parameters that nobody trains, and names that share another's.

        Args:
            state: of the first rank.
            released: at stage 3, parameters stand there without elements; their values are elsewhere.
        """
        sharing, buffers = state.get("shared_params") or {}, set(state.get("buffer_names") or ())
        for name, tensor in self._module.items():
            if f"model.{name}" in self._flat:
                continue
            source = self._flat.get(f"model.{sharing.get(name)}")
            if source is not None:
                self._flat[f"model.{name}"] = source
            elif tensor.numel() or not released or name in buffers:
                self._flat[f"model.{name}"] = _whole(tensor)
            else:
                self.left_out.append(
                    f"{name!r} of the module: it has no elements, and shares no parameter that has"
                )

    def _tensors_of(self, file: Path, module: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, value in module.items():
            if isinstance(value, torch.Tensor):
                found[name] = value
            else:
                self.left_out.append(
                    f"{file}: {name!r} of the module is no tensor, but of type {type(value).__name__}"
                )
        return found

    def _take_client_state(self, state: Mapping[str, Any]) -> None:
        """What the training script put beside DeepSpeed's own entries."""
        found = {name: value for name, value in state.items() if name not in _OWN}
        for name in [name for name, value in found.items() if not _is_plain({name: value})]:
            kind = type(found.pop(name)).__name__
            self.left_out.append(
                f"{name!r} of the client's state: a {kind}, which is no number, text or container of them"
            )
        self.values["deepspeed"]["client_state"] = found

    def _take_loss_scale(
        self, universal: Path, state: Mapping[str, Any], optims: Sequence[Mapping[str, Any]]
    ) -> None:
        """The scale that an adapting scaler has come to; without ZeRO it is a number, else in an object."""
        kept = optims[0] if optims else state.get("optimizer") or {}
        if universal.is_file():
            kept = _entries(universal)
        if not kept.get("dynamic_loss_scale"):
            return
        scaler = kept.get("loss_scaler")
        scale: Any = scaler.state.get("cur_scale") if isinstance(scaler, Inert) else kept.get("cur_scale")
        if type(scale) in (int, float):
            self.values["deepspeed"]["cur_scale"] = float(scale)
        else:
            self.left_out.append("the loss scale: it is not where DeepSpeed keeps it")

    def _take_optimizer(
        self, universal: Path, states: Sequence[Mapping[str, Any]], optims: Sequence[Mapping[str, Any]]
    ) -> None:
        if universal.is_dir():
            self._take_universal(universal, states)
        elif optims and "fp32_flat_groups" in optims[0]:
            self._take_stage3(states, optims)
        elif optims:
            self._take_stage12(states[0], optims)
        elif states[0].get("optimizer") is not None:
            self.left_out.append("the optimizer's state: at stage 0 it has no parameters' names")

    def read(self, name: str, box: Box) -> torch.Tensor:
        """See `Source`."""
        with reading(self.path):
            return self._read(self._flat[name], box)

    def _read(self, flat: _Flat, box: Box) -> torch.Tensor:
        span = flat_range(flat.described.shape, box)
        if span is None:
            ranges = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
            whole = self._range(flat, 0, math.prod(flat.described.shape))
            return whole.view(flat.described.shape)[ranges].clone()
        return self._range(flat, *span).view(box.sizes)

    def _range(self, flat: _Flat, start: int, stop: int) -> torch.Tensor:
        values = torch.empty(stop - start, dtype=flat.described.dtype)
        filled = 0
        for begins, piece in flat.pieces:
            low, high = max(start, begins), min(stop, begins + piece.numel())
            if low < high:
                values[low - start : high - start].copy_(piece[low - begins : high - begins])
                filled += high - low
        if filled != stop - start:
            raise CorruptError(f"{self.path}: {stop - start - filled} elements of a tensor are in no file")
        return values

    # -- what each kind of directory holds ------------------------------------------------------------------------

    def _take_stage12(self, state: Mapping[str, Any], optims: Sequence[Mapping[str, Any]]) -> None:
        """All parameters of a group one after another, cut into equal parts, one a rank."""
        for number, shapes in enumerate(state["param_shapes"]):
            for paddings in optims[0].get("param_alignment_paddings", [])[number : number + 1]:
                if any(paddings):
                    raise CheckpointError(
                        f"{self.path}: parameters were padded for alignment, which is not read here"
                    )
            kept = [optim["base_optimizer_state"]["state"].get(number, {}) for optim in optims]
            flats = {"master": [optim["single_partition_of_fp32_groups"][number] for optim in optims]}
            for key, value in kept[0].items():
                if isinstance(value, torch.Tensor) and value.dim():
                    flats[key] = [each[key] for each in kept]
            length = max(part.numel() for part in flats["master"])
            at = 0
            for name, shape in shapes.items():
                numel = math.prod(shape)
                for key, parts in flats.items():
                    pieces = [(rank * length - at, part) for rank, part in enumerate(parts)]
                    self._add(name, key, shape, _clipped(pieces, numel))
                at += numel
            self._note_steps(kept[0], shapes)

    def _take_stage3(self, states: Sequence[Mapping[str, Any]], optims: Sequence[Mapping[str, Any]]) -> None:
        """Each parameter cut into equal parts, one a rank; a rank's parts of all parameters one after another."""
        world = len(optims)
        kept = [optim["optimizer_state_dict"]["state"] for optim in optims]
        flats = {"master": [list(optim["fp32_flat_groups"]) for optim in optims]}
        keys = [
            k for k, v in next(iter(kept[0].values()), {}).items() if isinstance(v, torch.Tensor) and v.dim()
        ]
        for key in keys:
            flats[key] = [[each[key] for _, each in sorted(state.items())] for state in kept]
        at = 0
        for shapes in states[0]["param_shapes"]:
            for name, shape in shapes.items():
                numel = math.prod(shape)
                part = -(-numel // world)
                for key, ranks in flats.items():
                    pieces = [
                        (rank * part + begins, piece)
                        for rank, groups in enumerate(ranks)
                        for begins, piece in _slice(groups, at, at + part)
                    ]
                    self._add(name, key, shape, _clipped(pieces, numel))
                at += part
            self._note_steps(next(iter(kept[0].values()), {}), shapes)
        self._take_frozen(states)

    def _take_frozen(self, states: Sequence[Mapping[str, Any]]) -> None:
        """At stage 3, each frozen parameter cut into equal parts, one a rank."""
        world = len(states)
        for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
            fragments = [state["frozen_param_fragments"][name].reshape(-1) for state in states]
            part = -(-math.prod(shape) // world)
            pieces = _clipped([(rank * part, each) for rank, each in enumerate(fragments)], math.prod(shape))
            self._flat[f"model.{name}"] = _Flat(Described(tuple(shape), fragments[0].dtype), pieces)

    def _take_universal(self, folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
        """A folder a parameter, a file for each thing kept of it, flat where stage 3 wrote it."""
        shapes = {
            name: tuple(shape)
            for group in states[0].get("param_shapes") or []
            for name, shape in group.items()
        }
        if len(states) > 1:
            self._take_frozen(states)
        for part in sorted(folder.iterdir()):
            for file in sorted(part.glob("*.pt")) if part.is_dir() else []:
                content = load_tensors(file)
                tensor = content.get("param") if isinstance(content, dict) else content
                if not isinstance(tensor, torch.Tensor):
                    self.left_out.append(f"{file}: holds no tensor")
                elif file.stem == "step" or not tensor.dim():
                    self._scalars(part.name)[file.stem] = float(tensor)
                else:
                    key = "master" if file.stem == "fp32" else file.stem
                    shape = shapes.get(part.name, tuple(tensor.shape))
                    if math.prod(shape) != tensor.numel():
                        raise CorruptError(f"{file}: {tensor.numel()} elements, expected shape {shape}")
                    self._add(part.name, key, shape, [(0, tensor.reshape(-1))])

    def _add(
        self, name: str, key: str, shape: Sequence[int], pieces: Sequence[tuple[int, torch.Tensor]]
    ) -> None:
        """What is kept of a parameter; a master is the parameter itself where the two have one dtype."""
        kept = _Flat(Described(tuple(shape), pieces[0][1].dtype if pieces else torch.float32), pieces)
        if key != "master":
            self._flat[f"optimizer.{name}.{key}"] = kept
            return
        own = self._module.get(name)
        dtype = kept.described.dtype if own is None else own.dtype
        if own is not None and tuple(own.shape) == tuple(shape):
            self._flat[f"model.{name}"] = _whole(own)
        else:  # stage 3 keeps no other copy
            self._flat[f"model.{name}"] = _Flat(Described(tuple(shape), dtype), pieces)
        if dtype != kept.described.dtype:
            self._flat[f"optimizer.{name}.master"] = kept

    def _note_steps(self, kept: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
        for key, value in kept.items():
            if not isinstance(value, torch.Tensor) or not value.dim():
                for name in shapes:
                    self._scalars(name)[key] = float(value)

    def _scalars(self, name: str) -> dict[str, float]:
        scalars: dict[str, float] = self.values["deepspeed"].setdefault("scalars", {}).setdefault(name, {})
        return scalars


def _entries(file: Path, key: str | None = None) -> Mapping[str, Any]:
    """The dictionary that a file holds, or the one under a key of it."""
    found = load_tensors(file)
    with reading(file):
        if key is not None:
            found = found[key]
        if not isinstance(found, dict):
            raise TypeError(f"expected a dictionary, got a {type(found).__name__}")
    return found


def _step_folder(path: Path) -> Path:
    latest = path / "latest"
    if latest.is_file() and not any(path.glob("*_states.pt")):
        name = latest.read_text().strip()
        if Path(name).name != name:
            raise CorruptError(f"{latest}: {name!r} is no name of a folder beside it")
        return path / name
    return path


def _by_rank(root: Path, pattern: re.Pattern[str]) -> list[Path]:
    found: list[tuple[int, Path]] = []
    for file in root.glob("*.pt"):
        match = pattern.fullmatch(file.name)
        if match and int(match.group(2)):
            raise CheckpointError(
                f"{file}: of a model-parallel run; only those with one tensor- and pipeline-parallel rank are read"
            )
        if match:
            found.append((int(match.group(1) or 0), file))
    found.sort()
    if [rank for rank, _ in found] != list(range(len(found))):
        raise CorruptError(f"{root}: files of ranks {[rank for rank, _ in found]}; some are missing")
    return [file for _, file in found]


def _slice(groups: Sequence[torch.Tensor], start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Elements of flat tensors one after another, as parts of these: nothing is read from the disk for it."""
    at = 0
    for group in groups:
        low, high = max(start, at), min(stop, at + group.numel())
        if low < high:
            yield low - start, group.reshape(-1)[low - at : high - at]
        at += group.numel()


def _clipped(pieces: Sequence[tuple[int, torch.Tensor]], numel: int) -> list[tuple[int, torch.Tensor]]:
    """The parts of pieces that lie within a tensor of `numel` elements; the rest is padding, or of others."""
    found = []
    for begins, piece in pieces:
        low, high = max(begins, 0), min(begins + piece.numel(), numel)
        if low < high:
            found.append((low, piece.reshape(-1)[low - begins : high - begins]))
    return found


def _whole(tensor: torch.Tensor) -> _Flat:
    return _Flat(Described(tuple(tensor.shape), tensor.dtype), [(0, tensor.reshape(-1))])


def _facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and plain containers beside tensors, under DeepSpeed's names."""
    known = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "lr_scheduler", "ds_version")
    return {key: state[key] for key in known if state.get(key) is not None and _is_plain(state[key])}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) in (str, int) and _is_plain(each) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)
