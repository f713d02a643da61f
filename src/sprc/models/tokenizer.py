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
