"""Prompts of about a wanted number of tokens, made of real conversations.

A draft's acceptance, and the experts that a batch wakes, depend on the text: random tokens would measure
another model. A prompt is one user turn. It ends in a whole question; where that is too short, the texts of
other conversations stand before it, the first of them cut at its beginning. A question that is too long
loses its beginning. System turns are left out, and so are earlier answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from validation.errors import MeasurementError
from validation.throughput_cell import Prompt, messages_of

NEAR = 0.2
"""A question whose own length is this near to the wanted one is taken as it is."""


class PromptMaker:
    """Makes prompts from conversations; same seed and tokenizer, same prompts.

    Args:
        tokenizer: folder with the `tokenizer.json` that lengths are counted by.

    Raises:
        MeasurementError: no conversation has a user's text, or the tokenizer cannot be read.
    """

    def __init__(self, conversations: Sequence[Prompt], tokenizer: Path, *, seed: int = 0) -> None:
        from tokenizers import Tokenizer

        path = tokenizer / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as err:  # the library raises a bare Exception
            raise MeasurementError(
                f"cannot read {path}: {err}", "Give a folder with the model's tokenizer.json."
            ) from None
        turns = [[m["content"] for m in messages_of(c) if m["role"] == "user"] for c in conversations]
        self.texts = [text for text in ("\n".join(one).strip() for one in turns) if text]
        if not self.texts:
            raise MeasurementError("none of the conversations has a user's text")
        self.seed = seed
        self._lengths = [self.count(text) for text in self.texts]

    def count(self, text: str) -> int:
        """Tokens, special ones left out."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def prompts(self, tokens: int, count: int, *place: int) -> list[str]:
        """`count` prompts of about `tokens` tokens, the chat template not counted; others at another
        `place` (a cell and a repeat)."""
        rng = random.Random(f"{self.seed} {tokens} {place}")
        near = [k for k, n in enumerate(self._lengths) if abs(n - tokens) <= NEAR * tokens]
        if len(near) >= count:
            return [self.texts[k] for k in rng.sample(near, count)]
        order: list[int] = []

        def draw() -> int:
            # Without repetition as long as there are conversations.
            if not order:
                order.extend(rng.sample(range(len(self.texts)), len(self.texts)))
            return order.pop()

        return [self._joined(tokens, draw(), rng) for _ in range(count)]

    def _joined(self, tokens: int, last: int, rng: random.Random) -> str:
        parts, length = [self.texts[last]], self._lengths[last]
        while length < tokens:
            one = rng.randrange(len(self.texts))
            parts.insert(0, self.texts[one])
            length += max(1, self._lengths[one])
        return self._end("\n\n".join(parts), tokens)

    def _end(self, text: str, tokens: int) -> str:
        """The last `tokens` tokens of a text."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= tokens:
            return text
        start: int = encoding.offsets[len(encoding.ids) - tokens][0]
        return text[start:].lstrip() or text[-1:]
