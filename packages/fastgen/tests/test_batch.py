"""A plan becomes the tensors that a plain loop over its tokens gives."""

from __future__ import annotations

import torch
from fastgen.batch import ragged_batch
from fastgen.request import Request, SamplingParams, Sequence
from fastgen.step_plan import Scheduled, StepPlan
from hypothesis import given
from hypothesis import strategies as st

_CPU = torch.device("cpu")


def _sequence(number: int, tokens: list[int], blocks: list[int], **options: object) -> Sequence:
    adapter = options.pop("adapter", None)
    params = SamplingParams(**options)  # type: ignore[arg-type]
    request = Request(str(number), tokens, params, adapter=adapter)  # type: ignore[arg-type]
    sequence = request.sequences[0]
    sequence.block_table = blocks
    return sequence


@st.composite
def _plans(draw: st.DrawFn) -> tuple[StepPlan, int]:
    block_size = draw(st.integers(1, 5))
    parts = []
    for number in range(draw(st.integers(0, 6))):
        length = draw(st.integers(1, 20))
        start = draw(st.integers(0, length - 1))
        count = draw(st.integers(1, length - start))
        drafts = tuple(draw(st.lists(st.integers(0, 99), max_size=3))) if start + count == length else ()
        blocks = draw(st.permutations(range(40)))[: -(-(length + len(drafts)) // block_size)]
        sequence = _sequence(
            number,
            draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)),
            list(blocks),
            adapter=draw(st.sampled_from([None, "a", "b"])),
            max_tokens=draw(st.integers(1, 9)),
        )
        parts.append(Scheduled(sequence, start, count, drafts, wants_logits=start + count == length))
    return StepPlan(parts), block_size


@given(_plans())
def test_equals_a_loop(made: tuple[StepPlan, int]) -> None:
    plan, block_size = made
    batch = ragged_batch(plan, block_size, _CPU)
    rows: dict[str, list[int]] = {}
    ids, positions, slots, longest, starts, lengths, wanted = [], [], [], [], [0], [], []
    for part in plan.scheduled:
        tokens = part.sequence.token_ids[part.start : part.start + part.num_tokens] + list(part.drafts)
        for offset, token in enumerate(tokens):
            position = part.start + offset
            if part.sequence.request.adapter is not None:
                rows.setdefault(part.sequence.request.adapter, []).append(len(ids))
            if part.wants_logits and offset >= part.num_tokens - 1:
                wanted.append(len(ids))
            ids.append(token)
            positions.append(position)
            slots.append(
                part.sequence.block_table[position // block_size] * block_size + position % block_size
            )
            longest.append(part.sequence.num_prompt_tokens + part.sequence.request.params.max_tokens)
        starts.append(len(ids))
        lengths.append(part.start + len(tokens))
    assert batch.input_ids_T.tolist() == ids
    assert batch.positions_T.tolist() == positions
    assert batch.slots_T.tolist() == slots
    assert batch.longest_T.tolist() == longest
    assert batch.query_starts_S1.tolist() == starts
    assert batch.context_lens_S.tolist() == lengths
    assert batch.logits_rows_L.tolist() == wanted
    assert sum(batch.logits_counts) == len(wanted)
    assert {name: each.tolist() for name, each in batch.adapter_rows.items()} == rows
    for part, table in zip(plan.scheduled, batch.block_tables_SB.tolist(), strict=True):
        blocks = part.sequence.block_table
        assert table == blocks + [0] * (len(table) - len(blocks))
    int64 = (batch.input_ids_T, batch.positions_T, batch.slots_T, batch.logits_rows_L, batch.longest_T)
    int32 = (batch.query_starts_S1, batch.context_lens_S, batch.block_tables_SB)
    assert {each.dtype for each in int64} == {torch.int64}
    assert {each.dtype for each in int32} == {torch.int32}


def test_logits_of_drafts_and_prompts() -> None:
    prompt = _sequence(0, [1, 2, 3, 4, 5, 6], [0, 1], prompt_logprobs=1)
    decode = _sequence(1, [1, 2, 3], [2, 3])
    chunk = _sequence(2, [1, 2, 3, 4], [4])
    plan = StepPlan(
        [
            Scheduled(decode, 2, 1, (7, 8)),
            Scheduled(prompt, 2, 2, wants_logits=False),
            Scheduled(chunk, 0, 3, wants_logits=False),
        ]
    )
    batch = ragged_batch(plan, 4, _CPU)
    assert batch.logits_counts == (3, 2, 0)
    assert batch.logits_rows_L.tolist() == [0, 1, 2, 3, 4]
    assert batch.input_ids_T.tolist() == [3, 7, 8, 3, 4, 1, 2, 3]
