"""What single tokens look like: the bytes that they stand for, for answers that report tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from runtime.server.detokenizer import ByteLevelVocabulary, decoder_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Bytes and text of every token of a tokenizer, looked up once each; special tokens are written out.

    The text of a token is its bytes read as UTF-8. Bytes that are no text by themselves, as of a token that is a part
    of a character, are written as escapes, ``\\xf0\\x9f``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        kinds = decoder_kinds(tokenizer)
        self._byte_level = ByteLevelVocabulary(tokenizer, frozenset()) if kinds == ["ByteLevel"] else None
        self._has_byte_tokens = "ByteFallback" in kinds
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds in the middle of a text; none for an id that has no token."""
        if self._byte_level is not None:
            return self._byte_level.token_bytes(token_id)
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def text_of(self, token_id: int, prefix: str = "") -> str:
        """A token's text; ``prefix`` is put before escapes."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in data)

    def _look_up(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens([token_id])[0]
        if token is None:
            return b""
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        # At the start of a text, decoders strip spaces; what the second of two tokens adds is whole.
        once, twice = self._decode([token_id]), self._decode([token_id, token_id])
        return (twice[len(once) :] if twice.startswith(once) else once).encode()

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
