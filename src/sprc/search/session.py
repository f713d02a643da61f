"""What a browser's session holds: the reference and the chain of edits; and what clicks do to them."""

import hashlib
from typing import NamedTuple

import streamlit as st
from PIL import Image
from torch import Tensor

from sprc.data.captions import process_caption
from sprc.errors import InputError
from sprc.search.index import printable
from sprc.search.pictures import as_bytes, on_square, read_picture, thumbnail
from sprc.search.searcher import Searcher
from sprc.search.shown import SMALL, shortened

MOST_BYTES = 10 * 2**20  # of a picture that is sent
MOST_PIXELS = 40 * 10**6
MOST_INDEXED = Image.MAX_IMAGE_PIXELS or MOST_PIXELS  # of a picture of the index
MOST_LETTERS = 500  # of a text
MOST_STEPS = 30  # kept of a chain of edits


class Reference(NamedTuple):
    """The picture that a search starts from."""

    tokens: Tensor  # (1, N, D), on the model's device
    digest: str  # of its file's bytes: the same pictures of the index are no results
    name: str
    small: bytes  # a picture to be shown
    pixels: Tensor  # (3, S, S)


class Step(NamedTuple):
    """A link of the chain: a picture and what was asked of it."""

    reference: Reference
    text: str


def take(searcher: Searcher, name: str) -> None:
    """Make a picture of the index the reference."""
    try:
        data = searcher.index.path_of(name).read_bytes()
        image = read_picture(data, MOST_INDEXED)
    except (InputError, OSError):  # whose words tell of this machine's folders
        shown = shortened(printable(name), 80, end=True)
        st.session_state.problem = f"{shown} is not in the index, or is gone or broken since it was indexed."
        return
    index = searcher.index
    use(searcher, image, index.pictures[index.number[name]].digest, name)


def take_upload(searcher: Searcher, key: str) -> None:
    """Make the picture that was sent the reference; it is kept in memory alone."""
    sent = st.session_state[key]
    if sent is None:
        return
    st.session_state.uploads += 1  # an empty uploader for the next one
    try:
        if sent.size > MOST_BYTES:
            raise InputError(f"the file has {sent.size / 2**20:.0f} MB; the most is {MOST_BYTES // 2**20} MB")
        data = sent.getvalue()
        image = read_picture(data, MOST_PIXELS)
    except InputError as error:
        st.session_state.problem = f"This picture was refused: {error}."
        return
    use(searcher, image, hashlib.blake2b(data, digest_size=16).hexdigest(), "your picture")


def use(searcher: Searcher, image: Image.Image, digest: str, name: str) -> None:
    """Make ``image`` the reference; what was searched before becomes a step of the chain."""
    try:
        pixels = searcher.pixels(image)
    except Exception:  # of almost any kind, out of what Pillow can open and not convert
        st.session_state.problem = "This picture cannot be brought into the form that the model takes."
        return
    state = st.session_state
    text = state.get("text", "")  # Streamlit drops it while its field is not on the page
    if state.reference is not None and process_caption(text):
        state.steps = [*state.steps, Step(state.reference, text)][-MOST_STEPS:]
    small = as_bytes(on_square(thumbnail(image, SMALL), SMALL))
    state.reference = Reference(searcher.encode(pixels), digest, name, small, pixels)
    state.text = ""


def go_back(number: int) -> None:
    """To step ``number`` of the chain; what came after it is dropped."""
    state = st.session_state
    state.reference, state.text = state.steps[number]
    state.steps = state.steps[:number]


def try_sample(searcher: Searcher, name: str, text: str) -> None:
    """Ask a ready query; a new chain starts."""
    st.session_state.reference, st.session_state.steps = None, []
    take(searcher, name)
    st.session_state.text = text


def turn(by: int) -> None:
    """Other pictures to pick from."""
    st.session_state.page += by


def start_state(searcher: Searcher) -> None:
    """What a browser starts with, and with another model: nothing, or the query that its address names."""
    state = st.session_state
    if state.get("identity") == searcher.index.identity:
        return
    state.identity = searcher.index.identity  # another model's tokens are of no use to it
    state.steps, state.reference, state.text = [], None, ""
    state.uploads, state.page, state.problem = 0, 0, None
    state.index, state.found = searcher.index, {}
    if name := st.query_params.get("reference"):
        take(searcher, name)
        state.text = st.query_params.get("text", "")[:MOST_LETTERS]
