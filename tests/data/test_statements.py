"""The captions of negation, counting and two edits, read by a parser of its own and tried on every scene."""

import json
import re
from collections import Counter
from functools import partial
from typing import NamedTuple

import pytest
from test_descriptions import picture_rememberer
from test_synthetic import (
    CELL,
    CELLS,
    COLORS,
    PHRASE,
    RELATIONS,
    SHAPES,
    SIZES,
    Thing,
    apply_caption,
    changed_cells,
    edit_kind,
    named_cell,
)

from sprc.data.edits import KINDS
from sprc.data.synthetic import splits
from sprc.data.synthetic.cirr import make_cirr
from sprc.data.synthetic.splits import SyntheticConfig

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
NUMBER = "|".join(NUMBERS)
LOOK = rf"(?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(SHAPES)}|object)"
VALUE = "|".join((*COLORS, *SHAPES, *SIZES))
SPLITS = {"train": 40, "val": 14, "test1": 28}

Scene = dict[tuple[int, int], Thing]


class Query(NamedTuple):
    split: str
    kind: str
    caption: str
    reference: Scene
    target: Scene
    near: list[Scene]  # the scenes of the family that are one edit from the reference


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Query]:
    """The queries of the sizes by default, but for fewer of train; nothing is drawn."""
    out, saved = tmp_path_factory.mktemp("made"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "picture_maker", partial(picture_rememberer, saved))
        make_cirr(out, SyntheticConfig(train_families=SPLITS["train"]))
    scenes, families = {}, {}
    for file, scene in saved.items():
        name = file.removesuffix(".png")
        scenes[name] = {thing.cell: Thing(thing.color, thing.shape, thing.size) for thing in scene.objects}
        families.setdefault(name.rsplit("-", 2)[0], []).append(scenes[name])
    queries = []
    for split in SPLITS:
        root = out / "cirr_dataset"
        edits = json.loads((root / f"edits.{split}.json").read_text())
        for entry in json.loads((root / "cirr" / "captions" / f"cap.rc2.{split}.json").read_text()):
            edit, reference = edits[str(entry["pairid"])], scenes[entry["reference"]]
            family = families[entry["reference"].rsplit("-", 2)[0]]
            assert len(family) == 36
            near = [scene for scene in family if edit_kind(reference, scene)]
            target = scenes[edit["target"]]
            queries.append(Query(split, edit["kind"], entry["caption"], reference, target, near))
    return queries


def of_kind(made: list[Query], kind: str) -> list[Query]:
    return [query for query in made if query.kind == kind]


def count(look: str, scene: Scene) -> int:
    return sum(all(word in (*thing, "object") for word in look.split()) for thing in scene.values())


def says_how_many(caption: str, reference: Scene, scene: Scene) -> bool:
    (match,) = re.finditer(rf"({NUMBER}) ({LOOK})(es|s)?\b", caption)
    number, look = NUMBERS[match[1]], match[2]
    assert (match[3] or "") == ("" if number == 1 else "es" if look.endswith("s") else "s")
    frame = f"{caption[: match.start()]}#{caption[match.end() :]}"
    if former := re.fullmatch(rf"# instead of ({NUMBER})|not ({NUMBER}) but #", frame):
        assert count(look, reference) == NUMBERS[former[1] or former[2]]
    elif "only" in frame:
        assert frame in ("only #", "keep only #", f"only # {'is' if number == 1 else 'are'} left")
        assert count(look, reference) > number
    else:
        frames = ("#", "there should be #", "exactly #", "# in all", "make it #", "same scene but with #")
        assert frame in frames
    return count(look, scene) == number


def says_what_is_no_more(caption: str, reference: Scene, scene: Scene) -> bool:
    nothing = "no|there is no|there should be no|not a single|the scene no longer has a"
    if match := re.fullmatch(
        rf"(?:{nothing}|same scene but without any) ({LOOK})(?: left| is left| any more)?", caption
    ):
        return count(match[1], scene) == 0
    if match := re.fullmatch(rf"(?:{nothing}) ({LOOK})(?: any more)? but a ({VALUE})( one)?", caption):
        new = f"{match[2]} {match[1].split()[-1]}" if match[3] else match[2]
        return count(match[1], scene) == 0 and count(new, scene) > 0
    if match := re.fullmatch(
        rf"({PHRASE}) (?:is not|is no longer|should not be) in the ({CELL})(?: any more)? but (.*)", caption
    ):
        assert named_cell(re.fullmatch(PHRASE, match[1]), reference) == CELLS[match.groups()[-2]]
        return scene == apply_caption(f"put {match[1]} {match.groups()[-1]}", "move", reference)
    match = re.fullmatch(
        rf"({PHRASE}) (?:is not|is no longer|should not be) (a )?({VALUE})(?: any more)? but (a )?({VALUE})",
        caption,
    )
    *_, article, old, other_article, new = match.groups()
    assert bool(article) == bool(other_article) == (new in SHAPES)
    place = named_cell(re.fullmatch(PHRASE, match[1]), reference)
    assert old in reference[place]
    changed = Thing(*(new if value == old else value for value in reference[place]))
    return scene == {**reference, place: changed}


@pytest.mark.parametrize(("kind", "says"), [("negation", says_what_is_no_more), ("counting", says_how_many)])
def test_of_all_scenes_one_edit_away_the_statement_is_true_of_the_target_alone(made, kind, says):
    for query in of_kind(made, kind):
        assert not says(query.caption, query.reference, query.reference), query.caption
        meant = [scene for scene in query.near if says(query.caption, query.reference, scene)]
        assert meant == [query.target], query.caption


def clause_kind(clause: str) -> str:
    """The kind of edit that a clause asks for, by its first words and its form."""
    thing = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    place = rf"(?:in the|(?:directly )?(?:{'|'.join(RELATIONS)}) the) [a-z ]+"
    forms = {
        "add": rf"(?:(?:add|put|draw|there is) {thing}|{thing}is ){place}",
        "remove": rf"(?:remove|take away|delete|get rid of) {PHRASE}|{PHRASE} is (?:gone|missing)",
        "move": rf"(?:move|shift|put|place) the .*|{PHRASE} is {place}|{PHRASE} has moved [a-z ]+",
        "color": rf"(?:make|paint|turn|change the color of) {PHRASE} (?:to )?({'|'.join(COLORS)})",
        "shape": rf"(?:make|turn|change the shape of|replace) {PHRASE} (?:to a|into a|a|with a) "
        rf"({'|'.join(SHAPES)})(?: of the same color and size)?",
        "size": rf"(?:make|change the size of|resize) {PHRASE} (?:to )?"
        rf"({'|'.join(SIZES)}|smaller|larger|bigger)|(?:shrink|enlarge) {PHRASE}",
    }
    for kind, values in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
        forms[kind] += rf"|{PHRASE} (?:is|has become) (?:a )?({'|'.join(values)})"
    (kind,) = (kind for kind, form in forms.items() if re.fullmatch(form, clause))
    return kind


def apply_clause(clause: str, scene: Scene) -> Scene:
    kind = clause_kind(clause)
    if kind == "remove":
        clause = re.sub("^(.*) is (gone|missing)$", r"remove \1", clause)
    if kind == "add":
        clause = re.sub("^(a .*?) is ", r"add \1 ", clause)
    return apply_caption(clause, kind, scene)


def clauses(caption: str) -> list[str]:
    """The two clauses; ``caption`` has one place alone where both sides are some."""
    found = []
    for joint in re.finditer(r" and also | while you | while | and ", caption):
        sides = [caption[: joint.start()].removeprefix("same scene but "), caption[joint.end() :]]
        try:
            for side in sides:
                clause_kind(side)
        except ValueError:
            continue
        found.append(sides)
    assert len(found) == 1, caption
    return found[0]


def test_two_edits_give_the_target_at_once_and_one_after_the_other(made):
    kinds = Counter()
    for query in of_kind(made, "two"):
        parts = clauses(query.caption)
        kinds[frozenset(map(clause_kind, parts))] += 1
        at_once = dict(query.reference)
        for part in parts:
            alone = apply_clause(part, query.reference)
            assert alone in query.near
            for cell in changed_cells(query.reference, alone):
                at_once.pop(cell, None)
                if cell in alone:
                    at_once[cell] = alone[cell]
        assert at_once == query.target, query.caption
        for first, second in (parts, parts[::-1]):
            assert apply_clause(second, apply_clause(first, query.reference)) == query.target, query.caption
        assert edit_kind(query.reference, query.target) is None
    assert len(kinds) >= 12


def test_each_kind_has_queries_enough_and_each_form_of_it_occurs(made):
    sizes = {split: Counter(query.kind for query in made if query.split == split) for split in SPLITS}
    assert {split: sum(found.values()) for split, found in sizes.items()} == {
        "train": 2400,
        "val": 504,
        "test1": 1008,
    }
    assert min(sizes["test1"][kind] for kind in KINDS) >= 85
    assert min(found[kind] for found in sizes.values() for kind in KINDS) >= 35
    counted = [query.caption for query in of_kind(made, "counting")]
    assert {number for number in NUMBERS if any(number in caption.split() for caption in counted)} >= {
        "one",
        "two",
        "three",
        "four",
        "five",
    }
    negated = of_kind(made, "negation")
    edits = Counter(edit_kind(query.reference, query.target) for query in negated)
    assert edits.keys() == {"color", "shape", "size", "remove", "move"}
    assert min(edits.values()) >= 0.1 * len(negated)
    assert sum("no" in query.caption.split() or "single" in query.caption for query in negated) > 100
    edits = Counter(edit_kind(query.reference, query.target) for query in of_kind(made, "counting"))
    assert edits.keys() == {"color", "shape", "size", "add", "remove"}


def test_captions_of_two_edits_are_not_cut(made):
    """The models read 32 tokens, of which the marks at both ends are two."""
    lengths = [len(query.caption.split()) for query in of_kind(made, "two")]
    assert 20 < max(lengths) <= 30
