"""BERT's tokenizer with BLIP-2's extra [DEC] token, over the published vocabulary or the data's own."""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from threading import Thread

from transformers import BertTokenizer
from transformers.utils import cached_file

from sprc.errors import InputError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# Of bert-base-uncased.
HUB_NAMES = ("bert-base-uncased", "google-bert/bert-base-uncased")
HUB_SECONDS = 60  # for 230 KB
BERT_ENTRIES = 30522
BERT_SPECIAL_TOKENS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


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


def bert_tokenizer(vocab: Path | None = None) -> BertTokenizer:
    """BERT's uncased tokenizer, over the `vocab.txt` of `bert-base-uncased`.

    Args:
        vocab: that file; None takes it from the local cache of transformers or, where that has none, from the
            model hub.

    Raises:
        InputError: it is neither cached nor reachable, or is not that vocabulary.
    """
    return tokenizer_from_vocabulary(read_bert_vocabulary(_cached_vocabulary() if vocab is None else vocab))


def read_bert_vocabulary(path: Path) -> list[str]:
    """The entries of `bert-base-uncased`'s `vocab.txt`; :class:`InputError` for any other file."""
    again = "give --vocab FILE with the vocab.txt of bert-base-uncased"
    try:
        entries = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise InputError(f"the vocabulary {path} cannot be read ({error.strerror}); {again}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the vocabulary {path} is no text in UTF-8; {again}") from error
    problem = None
    if len(entries) != BERT_ENTRIES:
        problem = f"has {len(entries):,} lines and not {BERT_ENTRIES:,}"
    elif wrong := [word for word, number in BERT_SPECIAL_TOKENS.items() if entries[number] != word]:
        problem = f"does not have {wrong[0]} on line {BERT_SPECIAL_TOKENS[wrong[0]] + 1}"
    elif len(set(entries)) != BERT_ENTRIES:
        (word, count), *_ = Counter(entries).most_common(1)
        problem = f"has {word!r} {count} times"
    if problem:
        raise InputError(f"the vocabulary {path} {problem}; {again}")
    return entries


def _cached_vocabulary() -> Path:
    """`vocab.txt` from the local cache, which answers at once, else from the model hub."""
    for name in HUB_NAMES:
        if found := _find(name, local_files_only=True):
            return Path(found)
    # The hub's own client tries for minutes where nothing answers.
    fetched: list[str | None] = []
    fetching = Thread(target=lambda: fetched.append(_find(HUB_NAMES[0], local_files_only=False)), daemon=True)
    fetching.start()
    fetching.join(HUB_SECONDS)
    path = fetched[0] if fetched else None
    if not path:
        raise InputError(
            "the vocabulary of bert-base-uncased is not in the local cache and could not be fetched; run "
            "once with network access, copy ~/.cache/huggingface from a machine that has it, or give "
            "--vocab FILE (its vocab.txt)"
        )
    return Path(path)


def _find(name: str, *, local_files_only: bool) -> str | None:
    logger = logging.getLogger("huggingface_hub")  # it tells of each of its tries
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cached_file(name, "vocab.txt", local_files_only=local_files_only)
    except Exception:  # of many kinds: not cached, not reachable, not allowed
        return None
    finally:
        logger.setLevel(level)


def _with_dec(tokenizer: BertTokenizer) -> BertTokenizer:
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer
