"""PURE: the trees of values of all ranks -> one.

Ranks may know different keys (a pipeline stage its own layers); what several know must be equal, but for `PerRank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ConfigError
from .values import PerRankValues, TensorRef, pack

_NOTHING = object()
_PLAIN = (TensorRef, str, bytes, int, bool, type(None))  # where equal values of one type have equal bytes


def merge_values(trees: Sequence[Any]) -> Any:
    """One tree of all ranks' trees, by rank.

    Raises:
        ConfigError: ranks have different values in one place; names it.
    """
    return _merge(list(trees), ())


def _merge(nodes: list[Any], path: tuple[str, ...]) -> Any:
    known = [(rank, node) for rank, node in enumerate(nodes) if node is not _NOTHING]
    first = known[0][1]
    if any(isinstance(node, PerRankValues) for _, node in known):
        for rank, node in known:
            if not isinstance(node, PerRankValues):
                raise ConfigError(
                    f"{'.'.join(path)}: {_short(node)} on rank {rank}, and ckpt_universal.PerRank on another; make it "
                    "PerRank on every rank that has it"
                )
        return PerRankValues(
            tuple(node.values[0] if isinstance(node, PerRankValues) else None for node in nodes)
        )
    if all(isinstance(node, dict) for _, node in known):
        keys = dict.fromkeys(key for _, node in known for key in node)
        return {
            key: _merge(
                [node.get(key, _NOTHING) if isinstance(node, dict) else _NOTHING for node in nodes],
                (*path, str(key)),
            )
            for key in keys
        }
    for kind in (list, tuple):
        if all(type(node) is kind for _, node in known):
            length = max(len(node) for _, node in known)
            for rank, node in known:
                if len(node) < length and not all(_are_records(each) for _, each in known):
                    raise ConfigError(
                        f"{'.'.join(path)}: ranks have lists of different lengths, {len(node)} on rank {rank} and "
                        f"{length} on another; make them equal, or save ckpt_universal.PerRank(value)"
                    )
            inner = [
                [node[at] if node is not _NOTHING and at < len(node) else _NOTHING for node in nodes]
                for at in range(length)
            ]
            return kind(_merge(each, (*path, str(at))) for at, each in enumerate(inner))
    if all(
        node is first or (type(node) in _PLAIN and type(node) is type(first) and node == first)
        for _, node in known
    ):
        return first
    expected = pack(first, "")
    for rank, node in known:
        if pack(node, "") != expected:
            raise ConfigError(
                f"{'.'.join(path)}: ranks have different values: {_short(first)} on rank {known[0][0]}, {_short(node)} "
                f"on rank {rank}; make them equal, or save ckpt_universal.PerRank(value)"
            )
    return first


def _are_records(nodes: Any) -> bool:
    """Whether a list is of tensors and dictionaries, such as groups of parameters: a rank may know the first alone."""
    return all(
        isinstance(node, (TensorRef, dict)) or (isinstance(node, (list, tuple)) and _are_records(node))
        for node in nodes
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
