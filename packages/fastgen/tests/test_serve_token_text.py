"""Tokens one by one, as text and bytes, add up to what the tokenizer decodes together."""

from __future__ import annotations

import pytest
from fake_engine import tiny_tokenizer
from fastgen.output import Output, TokenLogprobs
from fastgen.request import SamplingParams
from fastgen.serve.completion_answers import CompletionAnswers
from fastgen.serve.interface import Job
from fastgen.serve.prompts import Asked
from fastgen.serve.schemas import CompletionRequest
from fastgen.serve.stream import Piece
from fastgen.serve.token_text import TokenText
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces are U+2581, unknown characters fall back to bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "c", "\u2581a", "ab"]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [("\u2581", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTE_LEVEL, SENTENCEPIECE = tiny_tokenizer(), sentencepiece_like()


@given(st.text("ab c\u00fc\u6771\U0001f600", max_size=20))
def test_tokens_add_up(text: str) -> None:
    for tokenizer, before in ((BYTE_LEVEL, ""), (SENTENCEPIECE, " ")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        spelled = TokenText(tokenizer)
        assert b"".join(map(spelled.as_bytes, ids)).decode() == (before + text if ids else "")


def test_parts_of_characters_and_special_tokens() -> None:
    spelled = TokenText(SENTENCEPIECE)
    ids = SENTENCEPIECE.encode("a\u00fc", add_special_tokens=False)
    assert [spelled.as_text(each) for each in ids] == [" a", "bytes:\\xc3", "bytes:\\xbc"]
    plain = TokenText(BYTE_LEVEL)
    assert plain.as_text(BYTE_LEVEL.eos_token_id) == "</s>"
    assert plain.as_bytes(10**6) == b""


@pytest.mark.parametrize("begin", [[], ["<s>"]], ids=["", "after a special token"])
def test_offsets_lead_into_the_echoed_text(begin: list[str]) -> None:
    tokenizer = sentencepiece_like()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    prompt_ids = tokenizer.convert_tokens_to_ids([*begin, "\u2581a", "b", "\u2581", "<0xC3>", "<0xBC>"])
    output_ids = tokenizer.convert_tokens_to_ids(["\u2581a", "c", "<s>", "\u2581a"])
    prompt, said = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt_ids, output_ids))
    params = SamplingParams(logprobs=0, prompt_logprobs=0)
    asked = Asked([Job(prompt_ids, params)], "tiny")
    request = CompletionRequest(prompt=prompt_ids, echo=True, logprobs=0)
    answers = CompletionAnswers("x", request, asked, TokenText(tokenizer), [prompt])
    scored = [[TokenLogprobs(each, -1.0) for each in ids] for ids in (prompt_ids, output_ids)]
    output = Output("x", 0, output_ids, said, None, len(prompt_ids), 0, scored[1], scored[0])
    (choice,) = answers.whole([Piece(0, output)]).choices
    assert choice.text == "ab \u00fcac a"
    assert choice.logprobs is not None
    starts = [choice.text[offset:] for offset in choice.logprobs.text_offset]
    special = ["ab \u00fcac a"] * len(begin)
    ends = ["\u00fcac a", "\u00fcac a"]
    assert starts == [
        *special,
        "ab \u00fcac a",
        "b \u00fcac a",
        " \u00fcac a",
        *ends,
        "ac a",
        "c a",
        " a",
        " a",
    ]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
def test_alone_a_tokenizer_would_say_otherwise(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(" a\u00fc", add_special_tokens=False)
    assert "".join(tokenizer.decode([each]) for each in ids) != " a\u00fc"
