"""Recipes: YAML files that name the stages of a training, each with its flags and what it starts from.

    flags: {dataset: CIRR, amp: fp16}          # of all stages
    stages:
      - name: sprc
        flags: {num-epochs: 50, use-gated-fusion: false}
      - name: longer                           # from the best checkpoint of the stage before
        flags: {num-epochs: 5, learning-rate: 1e-6}

A flag is written as on the command line of ``blip_fine_tune_2.py``, without its dashes; true, false and
null stand for ``--flag``, ``--no-flag`` and ``--no-flag``, a list for several values. ``start: NAME`` starts
from another earlier stage, and ``start: null`` from the backbone.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sprc.config import RERANKER
from sprc.errors import InputError
from sprc.settings import given_flags
from sprc.training.settings import training_parser

RECIPE_KEYS, STAGE_KEYS = ("flags", "stages"), ("name", "start", "flags")
# What is one for all stages, or the recipe's own affair.
OF_THE_COMMAND = ("recipe", "resume", "models_path", "timeout")
# A checkpoint does not bring them of itself: a stage that does not say otherwise has them from its start.
FROM_THE_START = ("backbone", "blip_model_name", "vocab", "use_gated_fusion")
BEFORE = object()  # no `start`: the stage before


@dataclass(frozen=True)
class Stage:
    """One training of a recipe."""

    name: str  # and that of its folder
    start: str | None  # the stage from whose best checkpoint it starts; None: from its own flags
    given: dict[str, Any]  # its flags, by name, as :func:`sprc.training.fine_tuning.fine_tune` takes them


class StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, but that a key which is there twice is refused: the last would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of ``node``."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, given: dict[str, Any]) -> list[Stage]:
    """The stages of a recipe, in their order.

    Args:
        path: of the YAML file.
        given: the flags of the command line; they win over the file's, in all stages.

    Raises:
        InputError: the file cannot be read; an unknown key or flag; a value that its flag does not take; a
            name that is there twice; a start that is missing, comes later, or leads round in a circle.
    """
    try:
        contents = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise InputError(f"--recipe {path} cannot be read ({error}); give a YAML file") from error
    where = f"--recipe {path}"
    check_keys(contents, RECIPE_KEYS, where)
    stages = contents.get("stages")
    if not isinstance(stages, list) or not stages:
        raise InputError(f"{where}: stages is no list of at least one stage")
    for number, stage in enumerate(stages, start=1):
        check_keys(stage, STAGE_KEYS, f"{where}: stage {number}")
        name = stage.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise InputError(f"{where}: stage {number}: name {name!r} cannot name a folder; give letters")
    names = [stage["name"] for stage in stages]
    starts = starts_of(stages, names, where)
    shared = read_flags(contents.get("flags"), f"{where}: flags")
    found: dict[str, Stage] = {}
    for stage, name in zip(stages, names, strict=True):
        here = f"{where}: stage {name}"
        own = read_flags(stage.get("flags"), here)
        found[name] = Stage(
            name, starts[name], resolved(own, shared, given, found.get(starts[name] or ""), here)
        )
    return list(found.values())


def check_keys(mapping: Any, known: tuple[str, ...], where: str) -> None:
    """Raise :class:`InputError` unless ``mapping`` is one, with no other keys than ``known``."""
    if not isinstance(mapping, dict):
        raise InputError(f"{where} is no mapping; its keys are {', '.join(known)}")
    if unknown := [str(key) for key in mapping if key not in known]:
        raise InputError(f"{where}: unknown key {', '.join(unknown)}; its keys are {', '.join(known)}")


def starts_of(stages: list[dict[str, Any]], names: list[str], where: str) -> dict[str, str | None]:
    """What each stage starts from, by its name."""
    starts: dict[str, str | None] = {}
    for number, (stage, name) in enumerate(zip(stages, names, strict=True)):
        if name in starts:
            raise InputError(f"{where}: two stages have the name {name}; give each its own")
        start = stage.get("start", BEFORE)
        if start is BEFORE:
            start = names[number - 1] if number else None
        elif start is not None and start not in names:
            raise InputError(
                f"{where}: stage {name} starts from {start!r}, which no stage is called; there are "
                f"{', '.join(names)}"
            )
        starts[name] = start
    for name in names:
        way = [name]
        while (start := starts[way[-1]]) is not None and start not in way:
            way.append(start)
        if start is not None:
            raise InputError(
                f"{where}: {' starts from '.join([*way, start])}: a cycle; let one start elsewhere"
            )
        before = starts[name]
        if before is not None and names.index(before) > names.index(name):
            raise InputError(
                f"{where}: stage {name} starts from {before}, which comes after it; put it first"
            )
    return starts


def read_flags(flags: Any, where: str) -> dict[str, Any]:
    """The flags of a mapping as the command line would give them."""
    if flags is None:
        return {}
    if not isinstance(flags, dict):
        raise InputError(f"{where}: flags is no mapping, such as {{num-epochs: 50}}")
    parser = training_parser(None)

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{where}: {message}")

    parser.error = refuse  # type: ignore[method-assign]
    words: list[str] = []
    for key, value in flags.items():
        flag = f"--{key}".replace("_", "-")
        action = parser._option_string_actions.get(flag)
        if action is None:
            raise InputError(f"{where}: unknown flag {key}; blip_fine_tune_2.py --help lists them")
        if action.dest in OF_THE_COMMAND:
            raise InputError(f"{where}: {key} is not a stage's; give {flag} on the command line")
        if value is False and action.choices is not None and "off" in action.choices:
            value = "off"  # as YAML reads it without quotes
        if value is True:
            words.append(flag)
        elif value is False or value is None:
            words.append(f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    return given_flags(parser, words)


def resolved(
    own: dict[str, Any], shared: dict[str, Any], given: dict[str, Any], start: Stage | None, where: str
) -> dict[str, Any]:
    """All flags of a stage: its own over the recipe's, and over both those of the command line."""
    given = {name: value for name, value in given.items() if name not in OF_THE_COMMAND}
    flags = {**shared, **own, **given}
    if start is not None:
        if "model_path" in own:
            raise InputError(f"{where} starts from {start.name}, and from its model-path; leave one out")
        flags.pop("model_path", None)
        inherited = {name: start.given[name] for name in FROM_THE_START if name in start.given}
        if flags.get("blip_model_name") == RERANKER:
            inherited.pop("use_gated_fusion", None)  # the fusion is the first stage's
        flags = {**inherited, **flags}
    if flags.get("dataset") is None:
        raise InputError(f"{where}: its flags lack dataset; give CIRR or FashionIQ")
    return flags
