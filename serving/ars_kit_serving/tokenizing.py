"""A served model's tokenizer: prompts and chats to tokens, tokens to text and bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from tokenizers.normalizers import NFC, NFD, NFKC, NFKD
from transformers import GenerationConfig

from ars_kit.models import load_base_config
from ars_kit.tokenizer import load_pretrained

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""The chat template of a model whose tokenizer has none: one line a message."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class PromptError(Exception):
    """What was sent cannot be turned into a prompt; says why.

    Args:
        words: what is wrong.
        long: it is too long for the model.
    """

    def __init__(self, words: str, *, long: bool = False) -> None:
        super().__init__(words)
        self.long = long


def _alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(others)}


class ServedTokenizer:
    """A tokenizer as a server needs it; safe to use from several threads.

    Args:
        path: a verified checkpoint.

    Raises:
        DataError: it holds no fast tokenizer, or one without an end of text.
        ConfigError: it has no ``generation_config.json``, and its ``config.json`` cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._own = load_pretrained(str(path))
        self._core = self._own.backend_tokenizer
        self._core.no_truncation()
        self._core.no_padding()
        self._template = self._own.chat_template
        self._added = {i: str(t) for i, t in self._own.added_tokens_decoder.items()}
        self._special = {i for i, t in self._own.added_tokens_decoder.items() if t.special}
        self._byte_level = "ByteLevel" in repr(self._core.decoder)
        self._bytes = _alphabet()
        self._longest = self._longest_token()
        self.size = max(self._own.get_vocab().values()) + 1
        self.ends = self._end_tokens(path)
        self.token_bytes: Callable[[int], bytes] = lru_cache(maxsize=1 << 16)(self._bytes_of)

    def _end_tokens(self, path: Path) -> Collection[int]:
        """Return the tokenizer's end of text, and those that transformers ends the model's at."""
        named: Any = None
        if (path / "generation_config.json").is_file():
            named = GenerationConfig.from_pretrained(str(path)).eos_token_id
        elif (path / "config.json").is_file():
            config = load_base_config(str(path.absolute()))
            named = GenerationConfig.from_model_config(config).eos_token_id
        ends = named if isinstance(named, list) else [] if named is None else [named]
        known = {int(end) for end in ends if 0 <= end < self.size}  # a default may be any number
        return frozenset({int(self._own.eos_token_id), *known})

    def _longest_token(self) -> int:
        """Return the characters that a token stands for at most; 0 where that is not known.

        A byte-level piece has a character for each byte. An added token may take any number of
        spaces beside it, and so may what normalizes; but of Unicode's own forms none makes one
        character of more than four (https://www.unicode.org/reports/tr15/).
        """
        normalizer = self._core.normalizer
        composed = 4 if isinstance(normalizer, NFC | NFD | NFKC | NFKD) else 1
        strips = any(t.lstrip or t.rstrip for t in self._own.added_tokens_decoder.values())
        if not self._byte_level or (normalizer is not None and composed == 1) or strips:
            return 0
        return composed * max(map(len, self._own.get_vocab()))

    @cached_property
    def for_grammars(self) -> LLTokenizer:
        """The same tokenizer as llguidance has it; made when first asked for.

        Raises:
            ValueError: llguidance cannot read it.
        """
        return from_tokenizer(self._own, n_vocab=self.size, eos_token=sorted(self.ends))

    def prompt(self, text: str, most: int | None = None) -> list[int]:
        """Return a text's tokens; an empty one becomes the token that texts begin with.

        Args:
            text: whole.
            most: tokens it may have; one that must have more is not even cut into them.

        Raises:
            PromptError: it is no Unicode text, or far too long.
        """
        return self._encode(text, most, special=True) or [self._first()]

    def chat(self, messages: Sequence[Mapping[str, Any]], most: int | None = None) -> list[int]:
        """Return a conversation's tokens, up to where the answer begins.

        Args:
            messages: from the first to the last.
            most: as for :meth:`prompt`.

        Raises:
            PromptError: the template refuses it, in the template's words; or it is far too long.
        """
        try:
            text = self._own.apply_chat_template(
                [dict(message) for message in messages],
                # Of several by name transformers takes its default itself.
                chat_template=None if self._template else DEFAULT_TEMPLATE,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from error
        # A template of the tokenizer's own writes the special tokens itself.
        return self._encode(text, most, special=not self._template) or [self._first()]

    def _encode(self, text: str, most: int | None, *, special: bool) -> list[int]:
        if most is not None and self._longest and len(text) > most * self._longest:
            raise PromptError(
                f"this model's maximum context length is {most} tokens; a text of {len(text)} "
                "characters has more",
                long=True,
            )
        try:
            found: list[int] = self._core.encode(text, add_special_tokens=special).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError("the text holds half a surrogate pair, which is no text") from error
        return found

    def _first(self) -> int:
        own = self._own
        return int(own.bos_token_id if own.bos_token_id is not None else own.eos_token_id)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out."""
        text: str = self._core.decode(list(tokens), skip_special_tokens=True)
        return text

    def token_text(self, token: int) -> str:
        """Return one token for people: its text, a broken character as such."""
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def shown_bytes(self, token: int) -> bytes:
        """Return what of a token is text: nothing of a special one."""
        return b"" if token in self._special else self.token_bytes(token)

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece: str | None = self._core.id_to_token(token)
        if piece is None:  # a vocabulary that was padded beyond the tokenizer's
            return b""
        if self._byte_level and all(c in self._bytes for c in piece):
            return bytes(self._bytes[c] for c in piece)
        byte = _BYTE.fullmatch(piece)
        if byte:
            return bytes([int(byte.group(1), 16)])
        return piece.replace("\u2581", " ").encode()  # SentencePiece's space
