"""Logits -> tokens: penalties, filters, and a choice that depends on the request's seed and position alone.

In: float32 logits, and for each row what decides beside them. Out: a token for each row, and log-probabilities where
they are asked for.

Note [Choices without state]
A token is the inverse of the distribution's cumulative sum at one uniform number, which is a hash of the request's
seed, the sequence's index and the position. So, from the same logits, it is the same whatever else is in the batch,
after a preemption, and when it is chosen ahead: a guess is right where it equals the token that would have been chosen
anyway.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .output import TokenLogprobs
from .request import SamplingParams
from .seen import Seen

_MOST_DRAWN = 1 << 23
"""Logits that tokens are drawn from at once."""


class Row(NamedTuple):
    """What decides a token beside its logits.

    Attributes:
        params: of the request.
        seed: of the request, whether given or drawn.
        place: of the sequence in its request.
        position: tokens of output before this one.
        banned: tokens that may not come, such as the end before `min_tokens`.
        allowed: `[vocab]`, what a grammar lets come; None: anything.
        seen: tokens before this one; looked at for penalties alone, which ask for it.
    """

    params: SamplingParams
    seed: int
    place: int
    position: int
    banned: tuple[int, ...] = ()
    allowed: npt.NDArray[np.bool_] | None = None
    seen: Seen | None = None


def choose(logits_LV: Tensor, rows: Sequence[Row]) -> list[int]:
    """One token for each row.

    Args:
        logits_LV: float32; not changed.
        rows: as many.
    """
    if not rows:
        return []
    logits_LV = steered(logits_LV, rows)
    drawn = [at for at, row in enumerate(rows) if row.params.temperature > 0.0]
    if len(drawn) == len(rows):
        return _draw(logits_LV, rows)
    tokens = greatest(logits_LV)
    if drawn:
        chosen = torch.tensor(drawn, device=logits_LV.device)
        for at, token in zip(drawn, _draw(logits_LV[chosen], [rows[at] for at in drawn]), strict=True):
            tokens[at] = token
    return tokens


def greatest(logits_LV: Tensor) -> list[int]:
    """The most likely token of each row."""
    on_host = logits_LV.device.type == "cpu"  # where numpy's argmax takes a twentieth of torch's time
    found: list[int] = (logits_LV.numpy() if on_host else logits_LV).argmax(-1).tolist()
    return found


def logprobs_of(logits_V: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """How likely a token was, by the model's own logits, and the `count` most likely ones."""
    logprobs_V = logits_V.log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = logprobs_V.topk(min(count, logprobs_V.numel()))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), top)


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1), the same for the same three numbers; see Note [Choices without state]."""
    packed = struct.pack("<QQQ", seed % (1 << 64), index, position)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") / 2.0**64


def steered(logits_LV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits (or their log-softmax) after biases, penalties and bans; the same tensor where no row has any."""
    found = logits_LV
    for at, row in enumerate(rows):
        bias = row.params.logit_bias
        if not (bias or row.params.has_penalties or row.banned or row.allowed is not None):
            continue
        if found is logits_LV:
            found = logits_LV.clone()
        if bias:
            found[at, list(bias)] += torch.tensor(list(bias.values()), device=found.device)
        if row.params.has_penalties:
            _penalise(found[at], row)
        if row.banned:
            found[at, list(row.banned)] = -torch.inf
        if row.allowed is not None:
            allowed = torch.from_numpy(row.allowed).to(found.device)
            found[at].masked_fill_(~allowed, -torch.inf)
    return found


def _penalise(logits_V: Tensor, row: Row) -> None:
    params, device = row.params, logits_V.device
    assert row.seen is not None
    seen = torch.from_numpy(row.seen.ids).to(device)
    if params.repetition_penalty != 1.0:  # Keskar et al. 2019, section 4.1, signs as everybody has them
        values = logits_V[seen]
        factor = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / factor, values * factor)
    if params.presence_penalty or params.frequency_penalty:
        times = torch.from_numpy(row.seen.times).to(device)
        said = times > 0
        logits_V[seen[said]] -= params.presence_penalty + params.frequency_penalty * times[said]


def _draw(logits_RV: Tensor, rows: Sequence[Row]) -> list[int]:
    """Some rows at a time, for it takes several tensors of float64 as large."""
    most = max(1, _MOST_DRAWN // logits_RV.shape[1])
    begins = range(0, len(rows), most)
    return [token for at in begins for token in _draw_some(logits_RV[at : at + most], rows[at : at + most])]


def _draw_some(logits_RV: Tensor, rows: Sequence[Row]) -> list[int]:
    device = logits_RV.device

    temperatures = torch.tensor([max(row.params.temperature, 1e-20) for row in rows], device=device)
    # Their differences to the greatest: however low the temperature, that one stays finite.
    logits_RV = (logits_RV - logits_RV.amax(1, keepdim=True)) / temperatures.unsqueeze(1)
    logits_RV = _filtered(logits_RV, [row.params for row in rows])
    # In float64: the sum over a large vocabulary would lose the rare tokens.
    cumulative_RV = logits_RV.double().softmax(-1).cumsum(-1)
    at = torch.tensor(
        [uniform(row.seed, row.place, row.position) for row in rows], dtype=torch.float64, device=device
    )
    found_R = torch.searchsorted(cumulative_RV, (at * cumulative_RV[:, -1]).unsqueeze(1), right=True).squeeze(
        1
    )
    found: list[int] = found_R.clamp_max_(logits_RV.shape[1] - 1).tolist()
    return found


def _filtered(logits_RV: Tensor, params: list[SamplingParams]) -> Tensor:
    """What top_k, top_p and min_p leave; the others at minus infinity."""
    vocab = logits_RV.shape[1]
    for at, each in enumerate(params):
        if 0 < each.top_k < vocab:
            least = logits_RV[at].topk(each.top_k).values[-1]
            logits_RV[at].masked_fill_(logits_RV[at] < least, -torch.inf)
        if each.min_p > 0.0:
            # probability >= min_p * the greatest, in logarithms
            least = logits_RV[at].max() + float(np.log(each.min_p))
            logits_RV[at].masked_fill_(logits_RV[at] < least, -torch.inf)
        if each.top_p < 1.0:
            probs, order = logits_RV[at].double().softmax(-1).sort(descending=True, stable=True)
            before = probs.cumsum(-1) - probs
            logits_RV[at, order[before >= each.top_p]] = -torch.inf
    return logits_RV
