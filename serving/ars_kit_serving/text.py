"""From tokens to text as it comes: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"

LONGEST = 4
"""Bytes of a character, and so the tokens at most that it may be spread over."""

RUN = 16
"""Tokens without certain text after which those are looked for that no later one can change."""

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """Turns one sequence's tokens into text, a piece at a time.

    Joined, the pieces are what decoding all tokens at once would give, up to the first stop string.
    A token is decoded together with those before it, back to a place where a character ended:
    decoders are free to join neighbours (the method of text-generation-inference and vLLM).

    Args:
        decode: of the tokenizer, special tokens left out.
        stops: strings that end the text and are no part of it.
        before: tokens that it goes on from, and that are no part of it: a decoder may leave out
            the space that a text begins with.

    Attributes:
        stopped: a stop string was found; later tokens are not looked at.
    """

    def __init__(
        self, decode: Decode, stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        self._decode = decode
        self._stops = stops
        whole = before and not decode(before).endswith(BROKEN)
        self._tokens: list[int] = list(before) if whole else []
        self._start = 0  # of what is decoded together
        self._read = len(self._tokens)  # whose text is known for good
        self._held = ""  # known for good, but perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """Take a token; returns the text that is certain from now on, often none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        if len(text) <= len(known) or text.endswith(BROKEN):
            return self._settled(known, text)  # a character's bytes are not all there yet
        self._start, self._read = self._read, len(self._tokens)
        return self._release(text[len(known) :])

    def _settled(self, known: str, text: str) -> str:
        """Return the part of a run without a character's end that no later token can change.

        A model may write bytes that are no text, or nothing but special tokens, for as long as it
        likes. Decoding all of them again with each one more would take the square of their number.
        """
        if (len(self._tokens) - self._read) % RUN:
            return ""
        if text == known:  # special tokens: nothing of them will ever be shown
            del self._tokens[self._read :]
            return ""
        last = len(self._tokens) - LONGEST
        for cut in range(last, last - LONGEST, -1):
            before = self._decode(self._tokens[self._start : cut])
            after = self._decode(self._tokens[cut:])
            if after and before + after == text:  # no character stands across it
                self._start = self._read = cut
                return self._release(before[len(known) :])
        return ""

    def finish(self) -> str:
        """Return what is left at the end: a broken character too, and the mere start of a stop."""
        if self.stopped:
            return ""
        known = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        rest = self._release(text[len(known) :])
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _release(self, text: str) -> str:
        """Return what of the held and the new text cannot be part of a stop string."""
        whole = self._held + text
        found = [place for stop in self._stops if (place := whole.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return whole[: min(found)]
        keep = max((_overlap(whole, stop) for stop in self._stops), default=0)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
