"""Tokens one by one, as text and bytes, add up to what the tokenizer decodes together."""

from __future__ import annotations

import pytest
from fake_engine import sentencepiece_like, tiny_tokenizer
from fastgen.output import Output, TokenLogprobs
from fastgen.request import SamplingParams
from fastgen.serve.completion_answers import CompletionAnswers
from fastgen.serve.interface import Job
from fastgen.serve.prompts import Asked
from fastgen.serve.schemas import CompletionRequest
from fastgen.serve.stream import Piece
from fastgen.serve.token_text import TokenText
from fastgen.text import continued, decoder_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

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
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    said = continued(decoder_of(tokenizer), prompt_ids, output_ids)
    params = SamplingParams(logprobs=0, prompt_logprobs=0)
    asked = Asked([Job(prompt_ids, params)], "tiny")
    request = CompletionRequest(prompt=prompt_ids, echo=True, logprobs=0)
    answers = CompletionAnswers("x", request, asked, TokenText(tokenizer), [prompt])
    scored = [[TokenLogprobs(each, -1.0) for each in ids] for ids in (prompt_ids, output_ids)]
    output = Output("x", 0, output_ids, said, None, len(prompt_ids), 0, scored[1], scored[0])
    (choice,) = answers.whole([Piece(0, output)]).choices
    assert choice.text == "ab \u00fc ac a"
    assert choice.logprobs is not None
    starts = [choice.text[offset:] for offset in choice.logprobs.text_offset]
    special = ["ab \u00fc ac a"] * len(begin)
    ends = ["\u00fc ac a", "\u00fc ac a"]
    assert starts == [
        *special,
        "ab \u00fc ac a",
        "b \u00fc ac a",
        " \u00fc ac a",
        *ends,
        " ac a",
        "c a",
        " a",
        " a",
    ]


def test_offsets_of_an_answer_alone() -> None:
    """After a prompt without text the first word begins a text, and has no space."""
    tokenizer = sentencepiece_like()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    output_ids = tokenizer.convert_tokens_to_ids(["\u2581a", "c"])
    for words in (["<s>"], ["<s>", "b"]):
        prompt_ids = tokenizer.convert_tokens_to_ids(words)
        asked = Asked([Job(prompt_ids, SamplingParams(logprobs=0))], "tiny")
        request = CompletionRequest(prompt=prompt_ids, logprobs=0)
        answers = CompletionAnswers("x", request, asked, TokenText(tokenizer))
        said = continued(decoder_of(tokenizer), prompt_ids, output_ids)
        scored = [TokenLogprobs(each, -1.0) for each in output_ids]
        output = Output("x", 0, output_ids, said, None, len(prompt_ids), 0, scored)
        (choice,) = answers.whole([Piece(0, output)]).choices
        assert choice.logprobs is not None
        assert (choice.text, choice.logprobs.text_offset) == (
            (" ac", [0, 2]) if "b" in words else ("ac", [0, 1])
        )


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
def test_alone_a_tokenizer_would_say_otherwise(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(" a\u00fc", add_special_tokens=False)
    assert "".join(tokenizer.decode([each]) for each in ids) != " a\u00fc"
