"""What someone says who sees one made picture and wants another: the second and later rounds of a dialogue.

The scenes of the built-in data in CIRR's format are drawn again from the arguments in `made_by.json`, so that
a sentence can be made for any two of their pictures.
"""

import random
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

from sprc.data.reading import read_field, read_json
from sprc.data.synthetic.cirr import SHADES, draw_sets, split_name
from sprc.data.synthetic.scenes import Edit, Scene, SceneObject, write_caption
from sprc.data.synthetic.splits import GENERATOR_VERSION, SyntheticConfig, draw_parts
from sprc.errors import InputError

KINDS = {"cell": "move", "color": "color", "shape": "shape", "size": "size"}  # of the edit of an attribute
MOST_CHANGES = 2  # attributes in which two objects may differ and still be taken for one that was changed


def scenes_of(data_path: Path, split: str) -> dict[str, Scene]:
    """The scene of each image of ``split``, "val" or "test1", by the image's name.

    Raises :class:`InputError` if ``data_path`` does not hold the built-in data in CIRR's format, as they are
    made now.
    """
    file = Path(data_path) / "cirr_dataset" / "made_by.json"
    if not file.is_file():
        raise InputError(
            f"{file} is missing: a dialogue needs the built-in data in CIRR's format; "
            "make them with make_demo_data.py and give their folder as --data-path"
        )
    told = read_json(file)
    try:
        if (version := read_field(told, "version", int)) != GENERATOR_VERSION:
            raise InputError(f"'version' is {version}, not {GENERATOR_VERSION}")
        names = [one.name for one in fields(SyntheticConfig)]
        config = SyntheticConfig(**{name: read_field(told, name, int) for name in names})
    except InputError as error:
        raise InputError(f"{file}: {error}; make the data again with make_demo_data.py") from error
    part = next(part for part in draw_parts(config, SHADES) if split_name(part) == split)
    return {name: scene for drawn in draw_sets(part, config) for scene, name in drawn.names.items()}


def edits_toward(seen: Scene, wanted: Scene) -> list[Edit]:
    """The edits of ``seen`` each of which leaves it one edit nearer to ``wanted``, another scene.

    Objects that differ least are taken for the same; what is left over is removed and added. An edit that
    would make a scene that cannot be, with two objects in one cell for one, is left out, if others are left.
    """
    before = [thing for thing in seen.objects if thing not in wanted.objects]
    after = [thing for thing in wanted.objects if thing not in seen.objects]
    found = []
    for old, new in sorted(product(before, after), key=lambda pair: len(changes(*pair))):
        changed = changes(old, new)
        if old in before and new in after and len(changed) <= MOST_CHANGES:
            before.remove(old)
            after.remove(new)
            found += [Edit(KINDS[name], old, replace(old, **{name: getattr(new, name)})) for name in changed]
    found += [Edit("remove", thing, None) for thing in before] + [Edit("add", None, thing) for thing in after]
    possible = [edit for edit in found if edited(seen, edit).is_valid()]
    return possible or found


def changes(old: SceneObject, new: SceneObject) -> list[str]:
    """The attributes in which two objects differ."""
    return [name for name in KINDS if getattr(old, name) != getattr(new, name)]


def edited(scene: Scene, edit: Edit) -> Scene:
    """The scene with its edit made."""
    left = [thing for thing in scene.objects if thing != edit.before]
    return Scene(tuple(sorted([*left, edit.after] if edit.after else left)), scene.shade)


def say(seen: Scene, wanted: Scene, rng: random.Random) -> str:
    """A caption of one of :func:`edits_toward`, as those of the data's own queries are written."""
    return write_caption(rng.choice(edits_toward(seen, wanted)), seen, rng)
