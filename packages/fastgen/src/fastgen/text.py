"""Tokens -> text as it can be shown: whole characters, and nothing that may yet turn out to be a stop.

In: token ids of one sequence, as they are chosen. Out: text to be added. A tokenizer's decode of one token alone loses
spaces and parts of characters, so a few tokens before it are decoded along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"
_MOST_HELD = 16
"""Tokens that are waited for to become text, or each would be decoded with all before it."""
_MOST_ALONG = 8
"""Tokens shown before that are decoded along with a new one: a second decode is needed only where they begin anew."""


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Token ids to text, without special tokens: what `tokenizer.decode` does, without what it does for other input.

    Spaces stay where they are: what `clean_up_tokenization_spaces` does would change text that has been shown.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    is_plain = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    )
    if is_plain:
        plain = tokenizer.backend_tokenizer.decode
        return lambda ids: str(plain(ids, skip_special_tokens=True))
    return lambda ids: str(
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def continued(decode: Callable[[list[int]], str], before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens that come after others: some tokenizers drop the space of a text's first word."""
    along, text = _along(decode, before)
    return decode([*along, *ids])[len(text) :]


def _along(decode: Callable[[list[int]], str], before: Sequence[int]) -> tuple[list[int], str]:
    """The last tokens of a text, to be decoded along with what follows, and what they are by themselves."""
    along = list(before[-_MOST_ALONG:])
    text = decode(along) if along else ""
    # Where they end with part of a character, nothing says what the rest of it adds.
    return ([], "") if text.endswith(_BROKEN) else (along, text)


class TextStream:
    """The text of one sequence.

    Args:
        tokenizer: the model's.
        stops: texts at which it ends.
        before: token ids of the text that it continues, if any: a first word then keeps its space.

    Attributes:
        stopped: a stop has come; what follows it is not shown, nor is the stop.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._decode_ids = decoder_of(tokenizer)
        self._stops = tuple(map(_Stop, stops))
        self._matched = [0] * len(self._stops)  # characters of each stop at the end of the text
        self._ids, self._before = _along(self._decode_ids, before)  # text of those from `_begin` to `_shown`
        self._begin = 0  # of the tokens that are decoded along
        self._shown = len(self._ids)  # tokens whose text has been given out, or is held back
        self._held = ""
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add a token; what can be shown now.

        Args:
            token_id: the next one.
            may_stop: look for stops in its text; what came before one that may not is not looked at again.
        """
        self._ids.append(token_id)
        now = self._decode(self._ids[self._begin :])
        stop = len(self._ids)
        # Part of a character, or a token without text.
        if now.endswith(_BROKEN) or len(now) <= len(self._before):
            if stop - self._shown < _MOST_HELD:
                return ""
            stop = self._last_boundary(now)
            now = self._decode(self._ids[self._begin : stop])
        new = now[len(self._before) :]
        first, self._shown, self._before = self._shown, stop, now
        if stop - self._begin > _MOST_ALONG:
            self._begin, self._before = first, self._decode(self._ids[first:stop])
        return self._through_stops(new) if may_stop else self._release() + new

    def finish(self) -> str:
        """The rest, when the sequence has ended for another reason than a stop."""
        if self.stopped:
            return ""
        now = self._decode(self._ids[self._begin :]) if self._shown < len(self._ids) else self._before
        rest = self._through_stops(now[len(self._before) :])
        self._begin = self._shown = len(self._ids)
        self._before = ""
        if self.stopped:
            return rest
        return rest + self._release()

    def fork(self) -> TextStream:
        """Another that goes on from here."""
        child = TextStream(self._tokenizer)
        child._stops, child._matched = self._stops, list(self._matched)
        child._ids = list(self._ids)
        child._begin, child._shown, child._before = self._begin, self._shown, self._before
        child._held = self._held
        child.stopped = self.stopped
        return child

    def _last_boundary(self, text: str) -> int:
        """Before so many tokens no character is cut, though the last one may lack bytes yet."""
        for stop in range(len(self._ids) - 3, len(self._ids)):
            if self._decode(self._ids[self._begin : stop]) + self._decode(self._ids[stop:]) == text:
                return stop
        return len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self._decode_ids(ids) if ids else ""

    def _release(self) -> str:
        """What was held back, since it may have begun a stop."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _through_stops(self, text: str) -> str:
        if not self._stops:
            return text
        begin, text = len(self._held), self._held + text
        found = []
        for number, stop in enumerate(self._stops):
            self._matched[number], end = stop.advance(self._matched[number], text, begin)
            if end is not None:
                found.append(end - len(stop.text))
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        shown = len(text) - max(self._matched)
        self._held = text[shown:]
        return text[:shown]


class _Stop:
    """A text that is looked for while it comes, each character once.

    Source: Knuth, Morris, Pratt 1977. What still matches after a character that does not is known for beginnings of
    every length that has come; the table grows with them, for it is seldom needed whole.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        # For each length: that of the longest beginning at the end of such a beginning.
        self._shorter = [0, 0]

    def advance(self, matched: int, text: str, begin: int) -> tuple[int, int | None]:
        """Read `text` from `begin` on, where so many characters match: how many do then, or where the stop ends."""
        if not matched and text.find(self.text[0], begin) < 0:
            return 0, None
        for at in range(begin, len(text)):
            matched = self._after(matched, text[at])
            if matched == len(self.text):
                return matched, at + 1
            if matched == len(self._shorter):
                self._shorter.append(self._after(self._shorter[-1], self.text[matched - 1]))
        return matched, None

    def _after(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)
