"""BERT's tokenizer with BLIP-2's extra [DEC] token, over the published vocabulary or the data's own."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import BertTokenizer

from sprc.errors import InputError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_vocabulary(captions: Iterable[str]) -> list[str]:
    """A WordPiece vocabulary of the captions' words and, for unseen words, of their characters.

    Punctuation stands apart, as for BERT. Words come by falling frequency, then alphabetically, so the same
    captions give the same ids.
    """
    split = re.compile(r"\w+|[^\w\s]")
    words = Counter(word for caption in captions for word in split.findall(caption.lower()))
    letters = sorted({letter for word in words for letter in word})
    pieces = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    by_frequency = sorted(words, key=lambda word: (-words[word], word))
    return list(dict.fromkeys([*pieces, *by_frequency]))


def tokenizer_from_vocabulary(vocabulary: list[str]) -> BertTokenizer:
    """BERT's uncased WordPiece over ``vocabulary`` (one entry an id), with [DEC] added at the end."""
    with tempfile.TemporaryDirectory() as folder:
        vocab_file = Path(folder) / "vocab.txt"
        vocab_file.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
        return _with_dec(BertTokenizer(str(vocab_file)))


class CaptionIds(dict):
    """The token ids of a caption, cut to ``max_length`` of them: ``ids[caption]``, worked out once a caption.

    Epochs repeat captions, and tokenizing takes 0.4 ms each, in the process that should be feeding the GPU.
    """

    MOST = 2**18  # FashionIQ's training has 72,000 different ones

    def __init__(self, tokenizer: BertTokenizer, max_length: int) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length

    def __missing__(self, caption: str) -> list[int]:
        ids = self.tokenizer(caption, truncation=True, max_length=self.max_length).input_ids
        if len(self) < self.MOST:
            self[caption] = ids
        return ids


def bert_tokenizer() -> BertTokenizer:
    """`bert-base-uncased`, from the local cache of transformers or, the first time, from the model hub.

    Raises :class:`InputError` when it is neither cached nor reachable.
    """
    try:
        return _with_dec(BertTokenizer.from_pretrained("bert-base-uncased"))
    except (OSError, ValueError) as error:
        raise InputError(
            "the tokenizer bert-base-uncased is not in the local cache and could not be fetched; "
            "run once with network access, or copy ~/.cache/huggingface from a machine that has it"
        ) from error


def _with_dec(tokenizer: BertTokenizer) -> BertTokenizer:
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer
