"""What can happen to a query before a model sees it: its text mistyped, its reference picture blurred.

Each perturbation has levels, from mild to strong, or one without a number. What is drawn at random comes from
a generator of the query's own, :func:`generator_of`: it is the same in any order, on any number of processes.

Captions are cleaned before a model reads them (:func:`sprc.data.captions.process_caption`): lower case,
without ``.!"()*#:;~``. So a change of case, and those marks, do nothing; commas and the like are words to it.
"""

import io
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from sprc.data.transforms import to_eight_bits

GREY = (128, 128, 128)  # of what is cut out, and of the corners that a rotation leaves
# Neighbours on an English keyboard.
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
STOPS = ".!:;"  # marks that the cleaning takes away

Changed = Callable[[Any, random.Random, float], Any]


@dataclass(frozen=True)
class Perturbation:
    """A change of a text or of a picture.

    ``change(query, generator, level)`` takes and returns a raw caption, or an RGB picture of any size, which
    it leaves as it is and whose size the new one has. ``told`` is a level in words. Without a level there is
    one, 0.
    """

    change: Changed
    levels: tuple[float, ...] = (0.0,)
    told: str = ""

    def in_words(self, level: float) -> str:
        """A level for a table; empty where there is but one."""
        return self.told.format(level)


def generator_of(seed: int, name: str, level: float, query: object) -> random.Random:
    """The random numbers of one query's perturbation; ``query`` tells it from all others."""
    return random.Random(f"{seed} {name} {level:g} {query}")


def typos(caption: str, generator: random.Random, count: float) -> str:
    """``count`` letters wrong, as fingers get them: left out, doubled, the key beside, or two changed over.

    No two are neighbours, so that none undoes another; fewer where the caption is too short. A space stays.
    """
    places: list[int] = []
    letters = [place for place, letter in enumerate(caption) if letter.isalpha()]
    for place in generator.sample(letters, len(letters)):
        if len(places) < count and all(abs(place - other) > 2 for other in places):
            places.append(place)
    for place in sorted(places, reverse=True):
        caption = caption[:place] + mistyped(caption[place:], generator)
    return caption


def mistyped(rest: str, generator: random.Random) -> str:
    """``rest`` with its first letter wrong."""
    letter, following = rest[0], rest[1:2]
    ways = [2 * letter + rest[1:]]
    if following.isalpha():
        ways.append(rest[1:])
        if following.lower() != letter.lower():
            ways.append(following + letter + rest[2:])
    if keys := neighbours(letter.lower()):
        key = generator.choice(keys)
        ways.append((key.upper() if letter.isupper() else key) + rest[1:])
    return generator.choice(ways)


def neighbours(letter: str) -> str:
    """The keys left and right of a letter's; none for a letter that the keyboard lacks."""
    for row in ROWS:
        if (place := row.find(letter)) >= 0:
            return row[max(place - 1, 0) : place] + row[place + 1 : place + 2]
    return ""


def swap_words(caption: str, generator: random.Random, count: float) -> str:
    """``count`` times two neighbouring words that differ change places."""
    words = caption.split()
    for _ in range(int(count)):
        places = [i for i in range(len(words) - 1) if words[i].lower() != words[i + 1].lower()]
        if places:
            i = generator.choice(places)
            words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def drop_words(caption: str, generator: random.Random, count: float) -> str:
    """``count`` words are missing; one is always left."""
    words = caption.split()
    kept = sorted(generator.sample(range(len(words)), max(len(words) - int(count), min(len(words), 1))))
    return " ".join(words[i] for i in kept)


def add_mark(caption: str, generator: random.Random, marks: str) -> str:
    """One of ``marks`` after a word, and a full stop at the end."""
    words = caption.split()
    if words:
        words[generator.randrange(len(words))] += generator.choice(marks)
    return f"{' '.join(words)}."


def no_punctuation(caption: str, generator: random.Random, level: float) -> str:
    """Without any of ASCII's marks; a hyphen leaves a space, so that it still parts two words."""
    return caption.replace("-", " ").translate(str.maketrans("", "", string.punctuation))


def blur(picture: Image.Image, generator: random.Random, percent: float) -> Image.Image:
    """A Gaussian blur of a radius of ``percent`` of the shorter side."""
    return picture.filter(ImageFilter.GaussianBlur(percent / 100 * min(picture.size)))


def add_noise(picture: Image.Image, generator: random.Random, deviation: float) -> Image.Image:
    """Gaussian noise on each value of each pixel, of 255, cut off at black and white."""
    values = np.asarray(picture, dtype=np.float32)
    noise = np.random.default_rng(generator.getrandbits(64)).normal(0, deviation, values.shape)
    return Image.fromarray((values + noise).round().clip(0, 255).astype(np.uint8))


def cut_out(picture: Image.Image, generator: random.Random, percent: float) -> Image.Image:
    """A grey rectangle of the picture's proportions over ``percent`` of its area, anywhere in it."""
    size = [max(round(side * (percent / 100) ** 0.5), 1) for side in picture.size]
    place = [generator.randint(0, side - part) for side, part in zip(picture.size, size, strict=True)]
    changed = picture.copy()
    changed.paste(GREY, (*place, *(start + part for start, part in zip(place, size, strict=True))))
    return changed


def compress(picture: Image.Image, generator: random.Random, quality: float) -> Image.Image:
    """Saved as JPEG of a quality of 1 to 95, and read again."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(quality))
    return Image.open(file).convert("RGB")


def shrink(picture: Image.Image, generator: random.Random, times: float) -> Image.Image:
    """Made so many times smaller on a side, and large again."""
    small = [max(round(side / times), 1) for side in picture.size]
    smaller = picture.resize((small[0], small[1]), Image.Resampling.BICUBIC)
    return smaller.resize(picture.size, Image.Resampling.BICUBIC)


def rotate(picture: Image.Image, generator: random.Random, degrees: float) -> Image.Image:
    """Turned about its middle, to either side; what leaves the frame is lost, and the corners are grey."""
    angle = generator.choice((-degrees, degrees))
    return picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=GREY)


# Under the names of sprc.data.TEXT_PERTURBATIONS and PICTURE_PERTURBATIONS.
OF_TEXT = {
    "typos": Perturbation(typos, (1, 2, 4), "wrong letters: {:g}"),
    "swapped-words": Perturbation(swap_words, (1, 3), "swaps: {:g}"),
    "dropped-words": Perturbation(drop_words, (1, 2), "words: {:g}"),
    "lower-case": Perturbation(lambda caption, generator, level: caption.lower()),
    "upper-case": Perturbation(lambda caption, generator, level: caption.upper()),
    "no-punctuation": Perturbation(no_punctuation),
    "stops": Perturbation(lambda caption, generator, level: add_mark(caption, generator, STOPS)),
    "commas": Perturbation(lambda caption, generator, level: add_mark(caption, generator, ",")),
}
OF_PICTURES = {
    "blur": Perturbation(blur, (1, 2, 4), "radius {:g} % of the side"),
    "noise": Perturbation(add_noise, (10, 25, 50), "deviation {:g} of 255"),
    "cut-out": Perturbation(cut_out, (10, 25, 50), "{:g} % of the area"),
    "jpeg": Perturbation(compress, (50, 20, 5), "quality {:g}"),
    "small": Perturbation(shrink, (2, 4, 8), "1/{:g} on a side"),
    "rotated": Perturbation(rotate, (5, 20, 90), "{:g} degrees"),
}


@dataclass(frozen=True)
class ChangedPicture:
    """A preprocessing with a perturbation before it: takes any picture, as ``transform`` does.

    The picture is turned into RGB first, which ``transform`` does last: for one with a palette or with
    transparency that is a difference of its own.
    """

    transform: Callable[[Image.Image], Any]
    perturbation: Perturbation
    level: float

    def __call__(self, picture: Image.Image, generator: random.Random) -> Any:
        """``transform`` of the changed picture."""
        plain = to_eight_bits(picture).convert("RGB")
        return self.transform(self.perturbation.change(plain, generator, self.level))
