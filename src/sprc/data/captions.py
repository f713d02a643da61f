"""Clean a modification text for the tokenizer, as LAVIS's `blip_caption` eval processor does."""

from __future__ import annotations

import re

_TO_SPACE = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_WHITESPACE_RUN = re.compile(r"\s\s+")


def process_caption(text: str, max_words: int = 50) -> str:
    """Return ``text`` in lower case, without ``.!"()*#:;~``, cut to its first ``max_words`` words.

    A run of whitespace becomes one space and words are what spaces part, so a single tab or newline
    between two words stays: LAVIS's processor does the same, and published checkpoints saw its output.
    Half a surrogate pair is dropped: BERT's own cleaning does so, and no other tokenizer takes it.
    """
    text = text.encode("utf-8", "ignore").decode()
    text = _WHITESPACE_RUN.sub(" ", text.lower().translate(_TO_SPACE))
    words = text.rstrip("\n").strip(" ").split(" ")
    return " ".join(words[:max_words])
