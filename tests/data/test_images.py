"""Pillow's strictness while several threads read images."""

import warnings
from threading import Event, Thread

import pytest
from PIL import Image, ImageFile

from sprc.data.images import strict_pillow


def is_strict():
    try:
        with warnings.catch_warnings():
            warnings.warn("large", Image.DecompressionBombWarning, stacklevel=1)
    except Image.DecompressionBombWarning:
        return not ImageFile.LOAD_TRUNCATED_IMAGES
    return False


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_threads_that_leave_in_the_order_they_came_leave_pillow_as_it_was(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters = list(warnings.filters)
    entered, leave = Event(), Event()

    def first():
        with strict_pillow():
            entered.set()
            assert leave.wait(10)

    thread = Thread(target=first)
    thread.start()
    assert entered.wait(10)
    with strict_pillow():
        leave.set()
        thread.join()
        assert is_strict()  # for the thread that is still inside
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert warnings.filters == filters
    assert not is_strict()


def test_an_error_inside_leaves_pillow_as_it_was(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    seen = []

    def fail():
        seen.append(is_strict())
        raise OSError("cut short")

    for _ in range(2):
        with pytest.raises(OSError, match="cut short"), strict_pillow():
            fail()
        assert seen.pop()
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True
