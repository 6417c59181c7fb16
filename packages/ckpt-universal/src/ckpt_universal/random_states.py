"""Random numbers, rank by rank: a leaf for state trees.

A rank goes on with the state it saved. Where other ranks load than saved, those that are new get states of their own,
derived from all that were saved: the same each time, and different from rank to rank.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import xxhash

from .tree import PerRank
from .values import pack


def _redeal(saved: tuple[Any, ...], rank: int, world: int) -> Any:
    if rank < len(saved):
        return saved[rank]
    return {"seed": xxhash.xxh3_64_intdigest(pack(list(saved), "random states"), seed=rank) >> 1}


class RandomStates:
    """The states of torch's generators (CPU, and the current device of each accelerator), Python's and NumPy's.

    Example:
        >>> save("checkpoints", {"model": model, "random": RandomStates()}, step=7)  # doctest: +SKIP
    """

    def state_dict(self) -> dict[str, Any]:
        """The states as they are now."""
        version, internal, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - it is there, and users draw from it
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": [version, list(internal), gauss],
            "numpy": [name, np.asarray(keys, "<u4").tobytes(), position, has_gauss, cached],
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        return {"states": PerRank(state, _redeal)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these states."""
        state = state_dict["states"].value
        if state is None:  # this rank saved none
            return
        if "seed" in state:
            seed = int(state["seed"])
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - as above
            return
        torch.set_rng_state(state["torch"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        legacy = (name, np.frombuffer(keys, "<u4"), position, has_gauss, cached)
        np.random.set_state(legacy)  # noqa: NPY002 - as above
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
