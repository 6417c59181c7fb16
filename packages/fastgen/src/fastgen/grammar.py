"""Structured output: which tokens a JSON schema or a regular expression lets come next; by llguidance.

In: a request's schema, and the tokens chosen. Out: a mask over the vocabulary for `sampler`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
import numpy.typing as npt

from .errors import RequestError
from .request import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_JSON: Any = {"whitespace_pattern": r"[\x20\n]{0,4}"}
"""Between parts of JSON: a weak model could else go on with white space until its tokens are used up."""
_MOST_KEPT = 32
"""Grammars that are compiled once for all who ask for them."""


class GrammarFactory:
    """Makes the grammars of one tokenizer; may be called in any thread.

    A large schema takes some tenths of a second to compile: kept, so that it can be done beside a step, and once.

    Args:
        tokenizer: the model's, a fast one.
        vocab_size: of the model's logits.
        eos_ids: tokens that end a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer: Any = tokenizer
        self._vocab_size = vocab_size
        self._num_tokens = max(vocab_size, len(tokenizer))
        self._eos_ids = eos_ids
        self._known: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[tuple[str | None, str | None], Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, params: SamplingParams) -> Grammar | None:
        """The grammar of a request; None where it has none.

        Raises:
            RequestError: the schema or expression is none, or the tokenizer is not known to the library.
        """
        if params.json_schema is None and params.regex is None:
            return None
        key = params.json_schema, params.regex
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key].fork()
        made = self._compile(params)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return made.fork()

    def is_made(self, params: SamplingParams) -> bool:
        """Whether `make` has nothing to compile."""
        with self._lock:
            nothing = params.json_schema is None and params.regex is None
            return nothing or (params.json_schema, params.regex) in self._kept

    def _compile(self, params: SamplingParams) -> Grammar:
        name = "json_schema" if params.json_schema is not None else "regex"
        try:
            source = (
                llguidance.LLMatcher.grammar_from_json_schema(params.json_schema, defaults=_JSON)
                if params.json_schema is not None
                else llguidance.LLMatcher.grammar_from_regex(params.regex or "")
            )
            matcher = llguidance.LLMatcher(self._shared(), source)
        except (ValueError, TypeError) as error:
            raise RequestError(f"{name}: {str(error).strip().splitlines()[0]}") from error
        if matcher.is_error():
            raise RequestError(f"{name}: {matcher.get_error().strip().splitlines()[0]}")
        return Grammar(matcher, self._vocab_size, self._num_tokens)

    def _shared(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._known is None:
                eos = list(self._eos_ids) or None
                self._known = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._num_tokens, eos_token=eos
                )
            return self._known


class Grammar:
    """Where one sequence is in its grammar.

    Args:
        matcher: of the tokenizer's tokens.
        vocab_size: tokens of the model.
        num_tokens: that the matcher knows; a tokenizer may have more than the model.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, num_tokens: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_tokens = num_tokens

    def allowed(self) -> npt.NDArray[np.bool_]:
        """`[vocab]`: what may come next."""
        words = -(-self._num_tokens // 32)
        mask = np.zeros((1, words), dtype=np.int32)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._vocab_size]
        return bits.astype(np.bool_)

    def advance(self, token_id: int) -> bool:
        """A token has been chosen; True: the text is complete, or the grammar has `failed`."""
        self._matcher.consume_token(token_id)
        return bool(self._matcher.is_stopped())

    @property
    def failed(self) -> bool:
        """It became too complex for its library, which says then that it is complete."""
        return bool(self._matcher.is_error())

    def fork(self) -> Grammar:
        """Another that goes on from here."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size, self._num_tokens)
