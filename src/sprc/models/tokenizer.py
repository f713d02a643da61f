"""BERT's tokenizer with BLIP-2's extra [DEC] token, over the published vocabulary or a backbone's own.

It is written out here because importing transformers takes longer than a search; a test compares the two.
"""

from __future__ import annotations

import logging
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

from sprc.data.captions import process_caption
from sprc.errors import InputError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DEC = "[DEC]"
LONGEST_WORD = 100  # letters; a longer one is unknown
# First and last letters of the blocks of ideographs, each of which BERT takes for a word.
IDEOGRAPHS = (
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F)),
)

# Of bert-base-uncased.
HUB_NAMES = ("bert-base-uncased", "google-bert/bert-base-uncased")
HUB_SECONDS = 60  # for 230 KB
BERT_ENTRIES = 30522
BERT_SPECIAL_TOKENS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


class _Cleaned(dict):
    """For ``str.translate``: a letter in lower case, spaces for whitespace, nothing for what is no letter."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        kind = unicodedata.category(letter)
        if letter in "\t\n\r" or kind == "Zs":
            cleaned = " "
        elif kind[0] == "C" or letter == "\ufffd":
            cleaned = ""
        elif any(first <= code <= last for first, last in IDEOGRAPHS):
            cleaned = f" {letter} "
        else:
            cleaned = letter.lower()
        self[code] = cleaned
        return cleaned


class _Parted(dict):
    """For ``str.translate``: punctuation between spaces, and nothing for an accent."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        kind = unicodedata.category(letter)
        # Of ASCII the symbols too, such as $ and `.
        symbol = letter.isascii() and not letter.isalnum() and letter != " "
        parted = f" {letter} " if symbol or kind[0] == "P" else "" if kind == "Mn" else letter
        self[code] = parted
        return parted


class WordPiece:
    """BERT's uncased tokenizer: words, and where the vocabulary lacks one its longest pieces.

    Args:
        vocabulary: an entry an id, the special tokens among them. [DEC] is added at the end.

    Raises:
        ValueError: an entry cannot be written in UTF-8.
        TypeError: an entry is no text.
    """

    pad_token, unk_token, cls_token, sep_token, _ = SPECIAL_TOKENS
    bos_token = DEC
    _cleaned, _parted = _Cleaned(), _Parted()

    def __init__(self, vocabulary: Sequence[str]) -> None:
        "\n".join(vocabulary).encode()
        self._ids = {word: number for number, word in enumerate(vocabulary)}
        self.vocab_size = len(self._ids)  # without [DEC]
        self._ids.setdefault(DEC, self.vocab_size)
        self._words = {number: word for word, number in self._ids.items()}
        self._unknown = self._ids[self.unk_token]
        self.pad_token_id = self._ids[self.pad_token]

    def __len__(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        """The id of each entry, [DEC] among them."""
        return dict(self._ids)

    def convert_ids_to_tokens(self, ids: int | list[int]) -> str | list[str]:
        """The entry of an id, or those of several; [UNK] for an id that none has."""
        if isinstance(ids, int):
            return self._words.get(ids, self.unk_token)
        return [self._words.get(number, self.unk_token) for number in ids]

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The id of an entry, or those of several; that of [UNK] for what is none."""
        if isinstance(tokens, str):
            return self._ids.get(tokens, self._unknown)
        return [self._ids.get(token, self._unknown) for token in tokens]

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """The ids of a text between [CLS] and [SEP], at most ``most`` of them all."""
        ids = [self._ids.get(piece, self._unknown) for piece in self.tokenize(text)]
        if most is not None:
            ids = ids[: max(most - 2, 0)]
        return [self._ids[self.cls_token], *ids, self._ids[self.sep_token]]

    def tokenize(self, text: str) -> list[str]:
        """The text's pieces; one that goes on with a word starts with ``##``.

        A special token's name in the text is a word like others: captions come in lower case.
        """
        text = text.translate(self._cleaned)
        if not text.isascii():
            text = unicodedata.normalize("NFD", text)  # an accent becomes a letter of its own
        return [piece for word in text.translate(self._parted).split() for piece in self._pieces(word)]

    def _pieces(self, word: str) -> list[str]:
        """The word in the longest pieces that the vocabulary has, from the left; [UNK] if that fails."""
        pieces: list[str] = []
        start = 0
        while start < len(word) <= LONGEST_WORD:
            before = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if before + word[start:end] in self._ids), None)
            if end is None:
                return [self.unk_token]
            pieces.append(before + word[start:end])
            start = end
        return pieces or [self.unk_token]


class CaptionIds(dict):
    """The token ids of a caption, cut to ``max_length`` of them: ``ids[caption]``, worked out once a caption.

    A caption is cleaned first, see :func:`process_caption`; one that is clean already stays as it is.

    Epochs repeat captions, and tokenizing takes 0.4 ms each, in the process that should be feeding the GPU.
    """

    MOST = 2**18  # FashionIQ's training has 72,000 different ones

    def __init__(self, tokenizer: WordPiece, max_length: int) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length

    def __missing__(self, caption: str) -> list[int]:
        ids = self.tokenizer.encode(process_caption(caption), self.max_length)
        if len(self) < self.MOST:
            self[caption] = ids
        return ids


def bert_tokenizer(vocab: Path | None = None) -> WordPiece:
    """BERT's uncased tokenizer, over the `vocab.txt` of `bert-base-uncased`.

    Args:
        vocab: that file; None takes it from the local cache of transformers or, where that has none, from the
            model hub.

    Raises:
        InputError: it is neither cached nor reachable, or is not that vocabulary.
    """
    return WordPiece(read_bert_vocabulary(_cached_vocabulary() if vocab is None else vocab))


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
    from transformers.utils import cached_file  # here, because it takes a second to import

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
