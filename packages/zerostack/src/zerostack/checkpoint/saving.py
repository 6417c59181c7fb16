"""An engine -> a step of ckpt-universal.

In: an engine, where to, and under which tag. Out: the step that all ranks have written, whole or not at all: tensors as
zero-core describes them, `contents.Saved`, and random states.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ckpt_universal as ckpt

from .. import ranks, signs
from ..errors import CheckpointError
from . import contents
from .contents import Saved
from .names import MODEL, OPTIMIZER, of_optimizer, under

if TYPE_CHECKING:
    from ..engine import Engine

log = logging.getLogger(__name__)


def save(
    engine: Engine,
    root: Path,
    tag: str,
    client_state: Mapping[str, Any],
    *,
    point_latest: bool,
    frozen: bool,
) -> Path:
    """Save an engine; see `Engine.save_checkpoint`."""
    tag = _agreed_tag(engine, tag)
    parts = engine.parts
    left = engine.micro_steps % engine.gradient_accumulation_steps()
    if left:
        log.warning(
            "save_checkpoint: the gradients of %d micro-batch(es) since the last update are not saved", left
        )
    described = of_optimizer(signs.described(parts.optimizer)) | contents.described(engine, states=True)
    if not frozen:
        left_out = contents.frozen(engine)
        described = {name: shard for name, shard in described.items() if name not in left_out}
    state = {
        "model": under(MODEL, described),
        "optimizer": under(OPTIMIZER, described),
        "engine": Saved.of(engine, client_state, frozen=frozen).to_tree(first=parts.group.rank() == 0),
        "random": ckpt.RandomStates(),
    }
    policy = ckpt.SavePolicy(point_latest=point_latest)
    path = ckpt.save(root, state, step=engine.global_steps, name=tag, group=parts.group, policy=policy)
    return Path(path)


def _agreed_tag(engine: Engine, tag: str) -> str:
    """The first rank's tag; ranks that name a checkpoint differently may be about to mix two of them."""
    given = ranks.gather_text(tag, engine.parts.group)
    policy = engine.config.checkpoint.tag_validation
    if len(set(given)) == 1 or policy == "Ignore":
        return given[0]
    message = (
        f"save_checkpoint: ranks give different tags: {', '.join(map(repr, given))}; the first rank's is used"
    )
    if policy == "Fail":
        raise CheckpointError(message + ' (checkpoint.tag_validation is "Fail")')
    log.warning(message)
    return given[0]
