"""A setting is declared once, as a field of a dataclass; its flag is made from the field.

    @dataclass(frozen=True, kw_only=True)
    class DeviceSettings:
        device: str | None = setting(None, help="cpu, cuda, ...")

    settings = DeviceSettings(**given_flags(flag_parser(__doc__, DeviceSettings)))

The field's name, type and default are the flag's, and a field without a default is a flag that must be given.
A `bool` is a flag without a value, a sequence one with several. Imports nothing slow, so that `--help` is
quick.
"""

from __future__ import annotations

import argparse
import os
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent.parent
# Where data and models are by default: the checkout, or for an installed package the working directory.
ROOT = SOURCE.parent if (SOURCE / "blip_fine_tune_2.py").is_file() else Path()
INDEX = ROOT / "picture_index"  # of `search.py index`


def setting(
    default: Any = MISSING,
    *,
    help: str | None = None,
    choices: Collection[str] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    parse: Callable[[str], Any] | None = None,
    nargs: str | int | None = None,
    positional: bool = False,
    negatable: bool = False,
    unset: str | None = None,
    group: str | None = None,
) -> Any:
    """A field of a dataclass that is a setting, and all that its flag says.

    Args:
        default: also the flag's; without one the flag must be given.
        help: `%(default)s` in it is the default.
        choices: the values that are taken.
        metavar: what stands for the value in the help, or for each of several.
        parse: from the word on the command line to the value; by default the field's type.
        nargs: of a sequence, "+" (the default), "*", or how many values each time.
        positional: a word without a flag; ``nargs`` may be "?" then.
        negatable: of a `bool`, so that --no-NAME turns it off.
        unset: the help of a further flag, --no-NAME, that sets None.
        group: title of the flag's group in the help.
    """
    told = {name: value for name, value in locals().items() if name != "default"}
    return field(default=default, metadata={"flag": told})


def like(declared: type, name: str, default: Any = ..., **changes: Any) -> Any:
    """A field as ``declared`` has it under ``name``, with another default or other words for its flag."""
    (found,) = (one for one in fields(declared) if one.name == name)
    told = {**found.metadata["flag"], **changes}
    return setting(found.default if default is ... else default, **told)


def settings_of(declared: type) -> list[Field[Any]]:
    """The fields of a dataclass that are settings."""
    return [one for one in fields(declared) if "flag" in one.metadata]


def flag_parser(description: str | None, *declared: type) -> argparse.ArgumentParser:
    """A parser of the flags of dataclasses; ``description`` stands over them as it is."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for one in declared:
        add_flags(parser, one)
    return parser


def add_flags(
    parser: argparse.ArgumentParser,
    declared: type,
    names: Collection[str] | None = None,
    *,
    may_be_unset: bool = False,
) -> None:
    """Add the flags of a dataclass to a parser.

    Args:
        parser: it gets the groups, too.
        declared: the dataclass.
        names: of the settings; None takes all of them.
        may_be_unset: a flag that is not given is None, which leaves the choice to something else.
    """
    groups: dict[str | None, argparse._ActionsContainer] = {one.title: one for one in parser._action_groups}
    groups[None] = parser
    hints = typing.get_type_hints(declared)
    for one in settings_of(declared):
        if names is None or one.name in names:
            title = one.metadata["flag"]["group"]
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            default = None if may_be_unset else one.default
            for words, details in flags_of(one, hints[one.name], default, negatable=may_be_unset):
                groups[title].add_argument(*words, **details)


def flags_of(
    one: Field[Any], hint: Any, default: Any, *, negatable: bool
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The names of a field's flag, and what argparse is told of it; and so for its --no-NAME."""
    told = one.metadata["flag"]
    kind = without_none(hint)
    dashed = one.name.replace("_", "-")
    details: dict[str, Any] = {"default": default, "help": told["help"]}
    if default is MISSING:
        details |= {"default": None, "required": True}
    if kind is bool:
        switches = told["negatable"] or negatable
        details["action"] = argparse.BooleanOptionalAction if switches else "store_true"
    else:
        if isinstance(typing.get_origin(kind), type) and issubclass(typing.get_origin(kind), Sequence):
            details |= {"nargs": "+", "action": More}
            kind = typing.get_args(kind)[0]
        details |= {name: told[name] for name in ("choices", "metavar", "nargs") if told[name] is not None}
        if (parse := told["parse"] or without_none(kind)) is not str:
            details["type"] = parse
    if told["positional"]:
        details.pop("action", None)
        details |= {"default": argparse.SUPPRESS}  # else argparse takes a word that is missing for given
        details["type"] = unless_missing(details.get("type", str))
        details.pop("required", None)
        yield [one.name], details
        return
    yield [f"--{dashed}"], details | {"dest": one.name}
    if told["unset"] is not None:
        yield (
            [f"--no-{dashed}"],
            {"dest": one.name, "action": "store_const", "const": None, "help": told["unset"]},
        )


class More(argparse.Action):
    """A flag with several values that is given again adds to them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Called by argparse where it meets the flag."""
        earlier = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*earlier, *values] if isinstance(earlier, list) else values)


def unless_missing(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse``, but for what argparse has in place of a missing word: its default goes through it."""

    def parse_given(word: str) -> Any:
        return word if word is argparse.SUPPRESS else parse(word)

    parse_given.__name__ = parse.__name__  # argparse names it where a word does not fit
    return parse_given


def without_none(hint: Any) -> Any:
    """The type in ``X | None``; any other as it is."""
    if typing.get_origin(hint) in (typing.Union, getattr(types, "UnionType", None)):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def given_flags(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> dict[str, Any]:
    """The flags on the command line and no others, by name: what is not given the dataclass knows."""
    absent = object()  # what argparse finds set already it does not set to the default
    nothing = {action.dest: absent for action in parser._actions if action.dest != "help"}
    found = vars(parser.parse_args(words, argparse.Namespace(**nothing)))
    return {name: value for name, value in found.items() if value is not absent}


def text(value: str) -> str:
    """The type of a flag that takes words; they come as bytes where the system's encoding lacks a letter."""
    try:
        value.encode()
    except UnicodeEncodeError:
        with suppress(UnicodeError):
            return os.fsencode(value).decode()
    return value
