"""The scripts' flags, their defaults and their choices: whoever changes one here changes it for the users."""

import argparse
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sprc.ablation.grid import AblationConfig
from sprc.config import MODEL_SWITCHES, ModelConfig
from sprc.gates.settings import ReportSettings
from sprc.scoring.settings import ExtractionSettings, StartSettings
from sprc.settings import ROOT, add_flags, flag_parser, given_flags, setting

# A line a flag: script, spellings, default, choices, number of values, "required".
TABLE = Path(__file__).with_name("flags.txt")


class Parsed(Exception):
    """A script has made its parser."""


def parser_of(script: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    def parse(self, *_, **__):
        raise Parsed(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed) as caught:
            importlib.import_module(script).main()
    return caught.value.args[0]


def lines_of(script: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                yield from lines_of(f"{script} {name}", one)
        elif not isinstance(action, argparse._HelpAction):
            spellings = " ".join(action.option_strings) or action.dest
            default = None if action.default == argparse.SUPPRESS else action.default
            choices = None if action.choices is None else ",".join(action.choices)
            default = str(default).replace(str(ROOT), "ROOT")
            required = "required" if action.required and action.option_strings else "-"
            yield " | ".join((script, spellings, default, str(choices), str(action.nargs), required))


def test_every_script_has_the_flags_of_the_table(monkeypatch):
    scripts = sorted(path.stem for path in (ROOT / "src").glob("*.py"))
    lines = [line for script in scripts for line in sorted(lines_of(script, parser_of(script, monkeypatch)))]
    assert lines == TABLE.read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True, kw_only=True)
class Made:
    """One setting of each kind."""

    needed: str = setting()
    number: int | None = setting(None, unset="no number")
    several: tuple[float, ...] = setting((1.0,), nargs="*")
    on: bool = setting(False)
    either: bool = setting(True, negatable=True)
    words: tuple[str, ...] = setting((), positional=True, nargs="*")
    quiet: int = 3  # no setting, no flag


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--needed a", {"needed": "a"}),
        ("--needed a --number 2", {"needed": "a", "number": 2}),
        ("--needed a --number 2 --no-number", {"needed": "a", "number": None}),
        ("--needed a --several 1 2.5", {"needed": "a", "several": [1.0, 2.5]}),
        ("--needed a --several", {"needed": "a", "several": []}),
        ("--needed a --on --no-either", {"needed": "a", "on": True, "either": False}),
        ("--needed a x y", {"needed": "a", "words": ["x", "y"]}),
    ],
)
def test_a_field_s_flag_gives_the_field_s_type_and_only_what_was_given(words, given):
    assert given_flags(flag_parser(None, Made), words.split()) == given


@pytest.mark.parametrize("words", ["", "--needed a --no-on", "--needed a --quiet 4", "--needed a --number x"])
def test_what_no_field_allows_is_refused(words):
    with pytest.raises(SystemExit):
        given_flags(flag_parser(None, Made), words.split())


def test_a_switch_of_the_model_is_a_flag_that_leaves_the_choice_to_the_backbone():
    parser = flag_parser(None)
    add_flags(parser, ModelConfig, may_be_unset=True)
    assert vars(parser.parse_args([])) == dict.fromkeys(MODEL_SWITCHES)
    given = given_flags(parser, ["--no-use-gated-fusion", "--alpha-init", "0.25"])
    assert StartSettings.of_flags(given).switches == {"use_gated_fusion": False, "alpha_init": 0.25}


def test_settings_ignore_flags_that_are_not_theirs():
    flags = {"dataset": "cirr", "feature_cache": Path("c"), "ranks": 2, "freeze_vit": True, "pool": None}
    settings = ExtractionSettings.of_flags(flags)
    assert (settings.dataset, settings.switches) == ("cirr", {"freeze_vit": True})


@pytest.mark.parametrize(("words", "given"), [([], {}), (["a/run"], {"run_folder": Path("a/run")})])
def test_a_word_that_may_be_missing_is_given_only_where_it_is(words, given):
    assert given_flags(flag_parser(None, ReportSettings), words) == given


def test_training_flags_of_an_ablation_may_be_missing():
    words = ["--fusion", "off"]
    assert given_flags(flag_parser(None, AblationConfig), words) == {"fusion": ["off"]}
    words += ["--", "--num-epochs", "3"]
    assert given_flags(flag_parser(None, AblationConfig), words)["training"] == ["--num-epochs", "3"]
