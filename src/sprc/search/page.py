"""The page of ``app.py``, drawn anew at every click.

What a browser sends is text, numbers and one picture. A picture of the index is asked for by its name, which
is looked up among the index's names and never made a path; a picture that is sent stays in memory. Names and
texts are shown by ``st.text``, which knows no markup; all other elements get fixed words and numbers alone.
"""

import hashlib
import random
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st
from PIL import Image
from torch import Tensor

from sprc.data.captions import process_caption
from sprc.data.cirr import load_cirr
from sprc.data.images import own_formats
from sprc.errors import InputError
from sprc.map_colors import OPACITY
from sprc.search.index import printable
from sprc.search.pictures import as_bytes, on_square, read_picture, thumbnail
from sprc.search.searcher import Answer, Searcher, SharedSearcher
from sprc.search.shown import (
    SIDE,
    SMALL,
    Map,
    choose_words,
    draw_map,
    edit_maps,
    shortened,
    show_grid,
    show_words,
    small_picture,
)

MOST_BYTES = 10 * 2**20  # of a picture that is sent
MOST_PIXELS = 40 * 10**6
MOST_INDEXED = Image.MAX_IMAGE_PIXELS or MOST_PIXELS  # of a picture of the index
MOST_LETTERS = 500  # of a text
MOST_STEPS = 30  # kept of a chain of edits
ON_PAGE = 12  # pictures to pick from at once
SAMPLES = 6
STYLE = ".stMainBlockContainer { padding-top: 3rem; } .stText { overflow-wrap: anywhere; }"


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


def current_searcher(**settings: Any) -> Searcher:
    """The index as it is now, with its model, for all who look at the page.

    The settings are those of ``Searcher.open``, paths as text. Raises :class:`InputError` as that does.
    """
    return _shared_searcher(**dict(sorted(settings.items()))).current()  # a cache heeds their order


@lru_cache(maxsize=1)
def _shared_searcher(index: str, **settings: Any) -> SharedSearcher:
    return SharedSearcher(Path(index), **settings)


@lru_cache(maxsize=8)
def samples_of(data_path: Path, folder: Path) -> list[tuple[str, str]]:
    """Queries of the validation split whose pictures ``folder`` holds: name in the index, and text."""
    split = load_cirr(data_path, "val")
    found = [(split.image_paths[triplet.reference].resolve(), triplet.caption) for triplet in split.triplets]
    inside = [(str(path.relative_to(folder)), text) for path, text in found if path.is_relative_to(folder)]
    return random.Random(0).sample(inside, min(SAMPLES, len(inside)))


def warm_up(searcher: Searcher, samples: Path | None) -> None:
    """Ask a query and draw its answer, so that the first visit does not wait for what is done but once."""
    try:
        data = searcher.index.path_of(searcher.index.names[0]).read_bytes()
        pixels = searcher.pixels(read_picture(data, MOST_INDEXED))
        found = [] if samples is None else samples_of(samples, searcher.index.folder)
    except (InputError, OSError):  # gone or broken by now: the page says so where it is asked for
        return
    query = searcher.compose(searcher.encode(pixels), "make it red")
    for name in [result.name for result in searcher.best(query, 8)] + [name for name, _ in found]:
        small_picture(searcher.index, name)
    draw_map(pixels, None, OPACITY)


# --- references


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


# --- searching


class Query(NamedTuple):
    """What is asked of the present reference."""

    text: str
    strength: float
    top: int
    again: bool  # by the re-ranker too
    average: bool  # with the queries of the chain


def search(searcher: Searcher, query: Query) -> Answer:
    """The results and the time they took; the last queries are remembered.

    Raises :class:`InputError`, see :meth:`Searcher.answer`.
    """
    state = st.session_state
    if state.index is not searcher.index:
        state.index, state.found = searcher.index, {}
    reference, found = state.reference, state.found
    steps: list[Step] = state.steps if query.average else []
    key = (id(reference), query, *((id(step.reference), step.text) for step in steps))
    if key not in found:
        shown = [reference, *(step.reference for step in steps)]
        others = sorted({number for one in shown for number in searcher.copies(digest=one.digest)})
        earlier = [searcher.compose(step.reference.tokens, step.text, query.strength) for step in steps]
        answer = searcher.answer(
            *(reference.tokens, query.text, query.top, others),
            strength=query.strength,
            again=query.again,
            earlier=earlier,
        )
        while len(found) >= 32:
            found.pop(next(iter(found)))
        # With the objects whose numbers are in the key, so that no other gets their numbers.
        found[key] = answer, shown
    return found[key][0]


# --- the page


def show(samples: str | None = None, **settings: Any) -> None:
    """Draw the page.

    Args:
        samples: a folder with `cirr_dataset/`, whose validation queries are offered ready-made.
        settings: of :func:`current_searcher`.
    """
    st.set_page_config("Search pictures", layout="wide")
    st.html(f"<style>{STYLE}</style>")
    try:
        searcher = current_searcher(**settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        st.error("The index cannot be used. The terminal that started this page says why.")
        return
    start_state(searcher)
    state = st.session_state
    st.subheader("Search pictures with a picture and a sentence")
    # Always there, if empty: an element that comes between others makes the browser draw those anew.
    problem, chain, query, choice = (st.container() for _ in range(4))
    if state.problem:
        with problem, st.container(border=True, key="problem"):
            st.markdown(":red[**That did not work**]")
            st.text(state.problem)
        state.problem = None
    if state.steps:
        with chain:
            show_chain()
    if state.reference is not None:
        with query:
            show_query(searcher)
    with choice:
        show_choice(searcher, samples)
    index, epoch, engine = searcher.index, searcher.retriever.checkpoint.epoch, searcher.engine
    number = "unknown" if epoch is None else epoch
    left_out = f", {len(index.left_out)} files left out" if index.left_out else ""
    fusion, second = "with" if searcher.has_fusion else "without", searcher.second
    again = f" Re-ranker: of the first {second.top}, weight {second.weight:g}." if second else ""
    st.caption(
        f"{len(index.pictures)} pictures{left_out}. Model: epoch {number}, {fusion} fusion. "
        f"Engine: {engine}.{again}"
    )


def show_chain() -> None:
    """The edits so far, each with a way back to it."""
    state = st.session_state
    with st.container(horizontal=True, key="chain"):
        st.button(
            "Back", key="back", icon=":material/arrow_back:", on_click=go_back, args=(len(state.steps) - 1,)
        )
        for number, step in enumerate(state.steps):
            with st.container(horizontal=True, width=250, gap="xsmall", key=f"step-{number}"):
                st.image(step.reference.small, width=64, alt=printable(step.reference.name))
                with st.container(width=170, gap="xsmall"):
                    st.text(shortened(step.text, 60))
                    st.button("Go back here", key=f"step-{number}-go", on_click=go_back, args=(number,))


def show_query(searcher: Searcher) -> None:
    """The reference, the text, what the fusion does, and the results."""
    state = st.session_state
    with st.container(horizontal=True, key="query"):
        picture = st.container(width=SIDE, gap="xsmall")
        controls = st.container(width=420)
    strength, compare, opacity, again, average = 1.0, False, OPACITY, False, False
    shown, words = None, None
    with controls:
        st.text_input(
            "What should change?",
            key="text",
            max_chars=MOST_LETTERS,
            placeholder="for example: make the large star red",
        )
        text = state.text if process_caption(state.text) else ""
        if searcher.has_fusion:
            compare = st.toggle("Compare with the edit left out", key="compare")
            strength = st.slider(
                "Strength of the edit (1: as trained, 0: left out)", 0.0, 2.0, 1.0, 0.1, key="strength"
            )
            opacity = st.slider(
                "Opacity of the map over the reference", 0.0, 1.0, OPACITY, 0.05, key="opacity"
            )
        if searcher.second is not None:
            again = st.toggle("Re-rank the first results", True, key="again")
        if state.steps:
            average = st.toggle(
                "Average with the earlier edits",
                key="average",
                help="What was asked for before still counts: the query is the mean of those of the chain.",
            )
        with st.expander("More"):
            top = st.slider("Results", 4, 40, 8, 4, key="top")
            if text and searcher.has_fusion:
                maps = edit_maps(searcher.retriever.model, state.reference.tokens, text, strength)
                shown = maps[st.selectbox("Map of the edit", list(maps), key="map")]
                words = choose_words(searcher.retriever.model)
    with picture:
        show_reference(shown, opacity)
    if not text:
        st.info("Say what should change: type a sentence and press Enter.")
        return
    with st.container():
        for note in searcher.notes(text):
            st.text(f"Note: {note}.")
        if words is not None:
            model, reference = searcher.retriever.model, state.reference
            show_words(model, reference.tokens, reference.pixels, text, strength, words, opacity)
    if not compare:
        show_results(searcher, Query(text, strength, top, again, average), "on")
        return
    st.caption(
        "Both sides are the same trained weights. Without the edit, the Q-Former reads the reference as it "
        "is: not what a model trained without fusion would find."
    )
    for column, kind, used in zip(st.columns(2), ("on", "off"), (strength, 0.0), strict=True):
        with column:
            st.markdown("**With the edit**" if kind == "on" else "**Without the edit**")
            show_results(searcher, Query(text, used, top, again, average), kind)


def show_reference(shown: Map | None, opacity: float) -> None:
    """The reference, perhaps under a map of the edit."""
    reference = st.session_state.reference
    st.image(draw_map(reference.pixels, shown, opacity), width=SIDE, alt="the reference")
    st.text(shortened(printable(reference.name), 80, end=True))
    if shown is not None:
        st.caption(f"map, dark to bright: {shown.scale[0]:.3g} to {shown.scale[1]:.3g}")


def show_results(searcher: Searcher, query: Query, kind: str) -> None:
    """A grid of the pictures that :func:`search` finds for ``query``, each a button to go on from."""
    try:
        results, *_ = answer = search(searcher, query)
    except InputError as error:  # whose words tell of this machine's folders
        print(f"error: {error}", file=sys.stderr, flush=True)
        st.info(
            "The re-ranker cannot read one of the first pictures: it is gone or broken since it was indexed. "
            "Turn the re-ranker off, or run `search.py index` again."
        )
        return
    if not results:
        st.info("The index holds no other picture than the reference.")
        return
    st.caption(f"{len(results)} best of {len(searcher.index.pictures)} in {answer.time}")

    def below(number: int) -> None:
        st.text(f"{number + 1}: {results[number].scores}")

    names = [result.name for result in results]
    show_grid(searcher.index, names, f"result-{kind}", "Edit this", partial(take, searcher), below)


def show_choice(searcher: Searcher, samples: str | None) -> None:
    """Ways to choose a reference: ready queries, the index, an upload."""
    state = st.session_state
    ready: list[tuple[str, str]] = []
    if samples is not None:
        try:
            found = samples_of(Path(samples), searcher.index.folder)
            ready = [(name, text) for name, text in found if name in searcher.index.number]
        except InputError as error:
            st.text(f"No ready queries: {printable(str(error))}")
    st.markdown("**Choose a picture**" if state.reference is None else "**Choose another picture**")
    titles = ["Ready queries", "From the index", "Upload"]
    tabs = dict(zip(titles if ready else titles[1:], st.tabs(titles if ready else titles[1:]), strict=True))
    if ready:
        with tabs["Ready queries"], st.container(horizontal=True):
            for number, (name, text) in enumerate(ready):
                with st.container(width=SMALL, gap="xsmall", key=f"sample-{number}"):
                    if picture := small_picture(searcher.index, name):
                        st.image(picture, width=SMALL, alt=printable(name))
                    st.text(shortened(text, 100))
                    st.button(
                        "Try it", key=f"sample-{number}-go", on_click=try_sample, args=(searcher, name, text)
                    )
    with tabs["From the index"]:
        show_pictures(searcher)
    with tabs["Upload"]:
        key = f"upload-{state.uploads}"
        st.file_uploader(
            f"A picture of at most {MOST_BYTES // 2**20} MB and {MOST_PIXELS // 10**6} million pixels "
            f"({', '.join(own_formats())}). It is not stored.",
            key=key,
            on_change=take_upload,
            args=(searcher, key),
            max_upload_size=MOST_BYTES // 2**20,
        )


def show_pictures(searcher: Searcher) -> None:
    """The index's pictures, some at a time, perhaps those whose names hold some letters."""
    state = st.session_state
    part = st.text_input("Part of the name", key="part", max_chars=100).lower()
    names = [name for name in searcher.index.names if part in name.lower()] if part else searcher.index.names
    if not names:
        st.info("No picture has such a name.")
        return
    pages = -(-len(names) // ON_PAGE)
    page = state.page % pages
    shown = names[page * ON_PAGE : (page + 1) * ON_PAGE]
    show_grid(
        searcher.index,
        shown,
        "pick",
        "Use this",
        partial(take, searcher),
        lambda number: st.text(shortened(printable(shown[number]), 40, end=True)),
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Previous", key="previous", on_click=turn, args=(-1,), disabled=pages == 1)
        st.button("Next", key="next", on_click=turn, args=(1,), disabled=pages == 1)
        st.caption(f"page {page + 1} of {pages}, {len(names)} pictures")
