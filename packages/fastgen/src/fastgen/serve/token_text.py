"""A single token as text and bytes, for log-probabilities: exact for spaces and parts of characters.

A tokenizer's `decode` of one token drops a leading space (SentencePiece) and shows half a character as U+FFFD. The
token's own spelling tells: byte-level BPE spells each byte as one of 256 printable characters, SentencePiece a
space as U+2581 and a byte as <0xE2>.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def byte_of_letter() -> dict[str, int]:
    """How byte-level BPE spells bytes: printable ones as themselves, the others as letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenText:
    """Spells a tokenizer's tokens, each once.

    Attributes:
        special: tokens that are no part of a decoded text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._spelled: dict[int, bytes] = {}
        self.special = frozenset(tokenizer.all_special_ids)

    def as_bytes(self, token_id: int) -> bytes:
        """The bytes of the token, also of a special one."""
        if token_id not in self._spelled:
            self._spelled[token_id] = self._spell(token_id)
        return self._spelled[token_id]

    def shown(self, token_id: int, *, first: bool) -> bytes:
        """What of them is in a decoded text: no special token, nor a first one's space where `decode` drops it."""
        raw = self.as_bytes(token_id)
        if token_id in self.special:
            return b""
        drops = first and raw.startswith(b" ") and not self._decode(token_id).startswith(" ")
        return raw[1:] if drops else raw

    def as_text(self, token_id: int) -> str:
        r"""The same as text; part of a character as OpenAI shows it, `bytes:\xe2`."""
        raw = self.as_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _decode(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def _spell(self, token_id: int) -> bytes:
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(raw, str):  # an id beyond the vocabulary: a model's table may be padded
            return b""
        if token_id in self.special:
            return raw.encode()
        if byte := BYTE.fullmatch(raw):
            return bytes([int(byte[1], 16)])
        decoded = self._decode(token_id)
        if SPACE in raw:
            return raw.replace(SPACE, " ").encode()
        letters = byte_of_letter()
        if "\ufffd" in decoded and all(letter in letters for letter in raw):
            return bytes(letters[letter] for letter in raw)
        return decoded.encode()
