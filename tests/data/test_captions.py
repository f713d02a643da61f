import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprc.data.captions import process_caption
from sprc.models.tokenizer import CaptionIds

ODD_CAPTIONS = [
    "",
    " ",
    "\n",
    "\t",
    " \n\t ",
    "...",
    '.!"()*#:;~',
    "?,'-_/",
    "Make it RED.",
    "  two   spaces  ",
    "a\tb",
    "a\nb",
    "a\n\nb",
    "\na\n",
    "a \n",
    "a.\n",
    "\ta\t",
    "a. b! c(d)e",
    "same dog 🐕 but 🔴",
    "ÉCOLE İSTANBUL ẞ",
    "non\u00a0breaking\u00a0\u00a0space\u3000\u3000here",
    "x" * 10_000,
    "word " * 10_000,
    "\t".join(["word"] * 10_000),
    ". " * 10_000,
]


def odd_captions():
    draw = random.Random(3)
    alphabet = string.ascii_letters + string.punctuation + " \t\n\r\x0b é🙂" * 3
    return ODD_CAPTIONS + ["".join(draw.choices(alphabet, k=draw.randint(0, 400))) for _ in range(300)]


@pytest.mark.parametrize("max_words", [1, 5, 50])
def test_process_caption_equals_laviss_processor(max_words):
    processors = pytest.importorskip("lavis.processors.blip_processors", exc_type=ImportError)
    theirs = processors.BlipCaptionProcessor(max_words=max_words)
    for text in odd_captions():
        assert process_caption(text, max_words) == theirs(text), repr(text)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Make it RED.", "make it red"),
        ("a. b! c(d)e", "a b c d e"),
        ("keep the dog's collar, please?", "keep the dog's collar, please?"),
        ("  many   blanks\t\n here \n", "many blanks here"),
        ("...", ""),
        ("", ""),
        ("same 🐕", "same 🐕"),
        ("a\tb", "a\tb"),
    ],
)
def test_process_caption_by_example(text, cleaned):
    assert process_caption(text) == cleaned


def test_process_caption_keeps_the_first_fifty_words():
    words = [f"w{number}" for number in range(10_000)]
    assert process_caption(" ".join(words)) == " ".join(words[:50])
    assert process_caption(" ".join(words[:50])) == " ".join(words[:50])


# Letters whose lower case is several, or depends on what follows; every kind of space; half a pair.
ODD = "aB.!#:;~ΣςİıßǅﬃÅ\u0307\u0345 \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000\ud83d\ude00"


@given(text=st.text(st.one_of(st.sampled_from(ODD), st.characters()), max_size=160), words=st.integers(1, 50))
def test_cleaning_twice_is_cleaning_once(text, words):
    cleaned = process_caption(text, words)
    assert process_caption(cleaned, words) == cleaned
    assert process_caption(cleaned) == cleaned


def test_token_ids_are_those_of_the_cleaned_caption(tokenizer):
    for text in ("Make it RED!", "  a   star.\n", "is (yellow) ~ red"):
        expected = tokenizer.encode(process_caption(text), 8)
        assert CaptionIds(tokenizer, 8)[text] == expected
