"""What the documents hold: their code, the commands in it, links, and paths that they name."""

import re
import shlex
import textwrap
from functools import cache

from helpers.runner import ROOT, run

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("", "docs", "benchmarks", "models", "cirr_dataset", "fashionIQ_dataset")
    for path in (ROOT / folder).glob("*.md")
)
SCRIPT = re.compile(r"^(?:src|benchmarks)/\w+\.py$|^test_gated_fusion\.py$")


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def split_code(text):
    """The code blocks of a document, fenced or indented, and its prose without them."""
    blocks, prose, block, fenced = [], [], [], False
    after_blank = True

    def end():
        if block:
            blocks.append("\n".join(block).rstrip())
            block.clear()

    for line in text.splitlines():
        indented = line.startswith("    ") and (after_blank or bool(block))
        if line.lstrip().startswith("```"):
            end()
            fenced = not fenced
        elif fenced or indented:
            block.append(line)
        elif block and not line.strip():
            block.append("")
        else:
            end()
            prose.append(line)
        after_blank = not line.strip()
    end()
    return [textwrap.dedent(block) for block in blocks], "\n".join(prose)


def spans(prose):
    """What stands between backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def lines_of_code(text):
    """Each line of code, continued ones joined, without its comment; and each span of code in the prose."""
    blocks, prose = split_code(text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines] + spans(prose)


def commands(text):
    """The scripts that a document or a part of it runs: (script, arguments), as a shell hands them over."""
    found = []
    for line in lines_of_code(text):
        try:
            words = shlex.split(line)
        except ValueError:  # a piece of a sentence
            continue
        for number, word in enumerate(words):
            if SCRIPT.match(word):
                found.append((word, words[number + 1 :]))
                break
    return found


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


@cache
def help_of(script, *subcommand):
    stdout, _ = run(f"../{script}", *subcommand, "--help")
    return stdout


def flags_of(script, *subcommand):
    """The flags that a script's --help names."""
    return set(FLAG.findall(help_of(script, *subcommand)))


def required_flags(script, *subcommand):
    """Those that its usage has without brackets."""
    usage = help_of(script, *subcommand).partition("\n\n")[0]
    while re.search(r"\[[^][]*\]", usage):
        usage = re.sub(r"\[[^][]*\]", "", usage)
    return set(FLAG.findall(usage))


def sections(text):
    """The parts of a document by the heading over them."""
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def anchors(text):
    """The places in a document that a link can name, as GitHub makes them of its headings."""
    _, prose = split_code(text)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    """The targets of a document's links to files of this project."""
    _, prose = split_code(text)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in targets if not target.startswith(("http://", "https://"))]
