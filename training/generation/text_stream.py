"""From tokens, one after the other, to text that can be shown at once.

Contract: the pieces joined are the text of all tokens up to the first stop string. A piece never ends inside
a UTF-8 character, and never in what may become a stop string.
"""

from collections.abc import Sequence

from turnout.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what tokenizers write for bytes that are no character, or not yet
# A token's text may depend on the one before it (a space at the start of a text is dropped by some
# tokenizers), and never, in those that we read, on one further back than a character's bytes.
CONTEXT_TOKENS = 8


class TextStream:
    """The text of one continuation, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._shown = tokenizer.decode(self._ids)  # the text of _ids that is told, or held back
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token, and return what is now certain of the text."""
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
        """Return what was held back, at the end of the tokens; not the bytes of an unfinished character."""
        held, self._held = self._held, ""
        return held

    def _release(self, text: str) -> str:
        """Return the text up to a stop string, or up to what may become one, which is held back."""
        # The one that ends first, of these the longest, as if the text had come character by character.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text begin a stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
