"""Decode tokens one by one into pieces of text that can be shown immediately.

Contract: the pieces joined are the text of all tokens up to the first stop string. A piece never ends inside
a UTF-8 character, nor inside a possible beginning of a stop string.
"""

from collections.abc import Sequence

from turnout.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # tokenizers decode invalid or incomplete UTF-8 to it
# A token's text may depend on the tokens before it: some tokenizers drop a space at the start of a text, and
# a character may be split over several tokens. No tokenizer that we read looks back further than that.
CONTEXT_TOKENS = 8


class TextStream:
    """The text of one continuation, decoded token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        # The part of the text of _ids that was returned or held back.
        self._shown = tokenizer.decode(self._ids)
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token, and return the text that is now certain."""
        assert not self.is_stopped, "the text has ended"
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        complete = text.rstrip(REPLACEMENT)
        if len(complete) <= len(self._shown):
            return ""
        new, self._shown = complete[len(self._shown) :], complete
        if complete == text and len(self._ids) > 4 * CONTEXT_TOKENS:
            self._ids = self._ids[-CONTEXT_TOKENS:]
            self._shown = self._tokenizer.decode(self._ids)
        return self._release(self._held + new)

    def finish(self) -> str:
        """Return the text held back, after the last token. Bytes of an unfinished character are dropped."""
        held, self._held = self._held, ""
        return held

    def _release(self, text: str) -> str:
        """Return the text up to a stop string; hold back an end that may be the beginning of one."""
        # The stop string that ends first wins, and of these the longest, as if characters came one by one.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
