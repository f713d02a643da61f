"""What the documents name is there (files, modules, flags, ...), and the translation is in step."""

import importlib.util
import re

import pytest
from helpers.documents import (
    DOCUMENTS,
    anchors,
    commands,
    flags_of,
    lines_of_code,
    links,
    read,
    required_flags,
    spans,
    split_code,
)
from helpers.runner import ROOT

import sprc

# Flags of pip, docker, torchrun and Slurm.
OTHERS = {
    *("--gpus", "--shm-size", "--ipc", "--nv", "--nproc-per-node"),
    *("--gpus-per-node", "--gpus-per-task", "--signal"),
}
SCRIPTS = sorted(
    [f"src/{path.name}" for path in (ROOT / "src").glob("*.py")]
    + ["test_gated_fusion.py", "benchmarks/run.py", "benchmarks/scaling.py", "benchmarks/startup.py"]
    + ["benchmarks/gallery.py", "benchmarks/quality.py"]
)


def wrong_flags(script, arguments):
    """The flags of a command that its script does not have, and those that it must have and lacks."""
    ours, handed_on = arguments, []
    if "--" in arguments:
        place = arguments.index("--")
        ours, handed_on = arguments[:place], arguments[place + 1 :]
    subcommand = ours[:1] if script == "src/search.py" and ours[:1] != ["--help"] else []
    quoted = [word for word in ours if " " in word]  # run_ablation.py's: further flags of the training
    given = {word for word in ours if word.startswith("--")} - {*quoted}
    wrong = given - flags_of(script, *subcommand)
    quoted_flags = {part for word in quoted for part in word.split() if part.startswith("--")}
    if "--help" not in given and "..." not in ours:
        wrong |= required_flags(script, *subcommand) - given
    if handed_on:  # run_ablation.py hands them to the training
        wrong |= wrong_flags("src/blip_fine_tune_2.py", handed_on)
        wrong |= quoted_flags - flags_of("src/blip_fine_tune_2.py")
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_command_has_its_script_s_flags(document):
    found = {
        (script, flag)
        for script, arguments in commands(read(document))
        if any(word.startswith("--") for word in arguments)
        for flag in wrong_flags(script, arguments)
    }
    assert not found


def test_every_flag_that_the_prose_names_is_some_script_s():
    known = {flag for script in SCRIPTS for flag in flags_of(script)} | OTHERS
    known |= flags_of("src/search.py", "index") | flags_of("src/search.py", "query")
    named = {
        (document, flag)
        for document in DOCUMENTS
        for span in spans(split_code(read(document))[1])
        for flag in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span)
    }
    assert {(document, flag) for document, flag in named if flag not in known} == set()
    assert ("docs/training.md", "--checkpoint-every") in named


def test_every_target_of_make_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        word
        for document in DOCUMENTS
        for line in lines_of_code(read(document))
        for word in re.findall(r"^make ([a-z][a-z-]*)", line)
    }
    assert {"demo", "test", "ablation"} <= named <= targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    lost = []
    for target in links(read(document)):
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            lost.append(target)
    assert not lost


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document):
    named = set(re.findall(r"(?<![\w/.])((?:src|tests|docs|benchmarks|configs)/[\w./-]*\w)", read(document)))
    named |= {f"src/{name}" for name in re.findall(r"(?<![\w/.])(sprc/[\w/]+\.py)", read(document))}
    named.discard("src/lavis")  # SPRC's own
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_of_the_package_is_there(document):
    code = "\n".join(lines_of_code(read(document)))
    names = set(re.findall(r"\bsprc\.(\w+)", code)) - {"json"}  # weights.sprc.json
    if not hasattr(sprc, "load"):
        names -= {"load", "Searcher"}
    missing = {n for n in names if not hasattr(sprc, n) and not importlib.util.find_spec(f"sprc.{n}")}
    assert not missing


def test_the_architecture_lists_every_module_once():
    listed = re.findall(r"^    (sprc/[\w/]+\.py) +\S", read("docs/architecture.md"), flags=re.MULTILINE)
    files = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/sprc").rglob("*.py")}
    rooms = {file for file in files if not file.endswith("__init__.py")}
    assert {*listed} ^ {*rooms, "sprc/__init__.py"} == set()
    assert len(listed) == len({*listed})


def test_the_architecture_lists_every_script():
    listed = re.findall(r"^    (src/\w+\.py) +\S", read("docs/architecture.md"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(f"src/{path.name}" for path in (ROOT / "src").glob("*.py"))


def test_the_translation_has_the_original_s_sections_tables_and_code():
    english, chinese = (split_code(read(f"GATED_FUSION{end}.md")) for end in ("", ".zh"))
    for pattern in (r"^#+ ", r"^\|"):
        counts = [len(re.findall(pattern, prose, flags=re.MULTILINE)) for _, prose in (english, chinese)]
        assert counts[0] == counts[1]
    assert {*spans(english[1])} ^ {*spans(chinese[1])} == set()


def test_the_results_of_the_readme_are_those_of_their_document():
    rows = re.findall(r"^\| .* ± .*", read("README.md"), flags=re.MULTILINE)
    assert rows
    results = read("docs/results.md").splitlines()
    assert [row for row in rows if not any(line.startswith(row) for line in results)] == []
