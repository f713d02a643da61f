"""What `import sprc.lavis_registration` reaches runs in SPRC's own environment: Python 3.9, torch 2.0.

ruff reads these files as Python 3.9's (pyproject.toml) and finds syntax errors; here is what it cannot see.
`make test-checkout` runs them there.
"""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
TESTS = ["tests/helpers/sprc_calls.py", "tests/helpers/sprc_pixels.py"]


def file_of(module):
    path = SRC.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return None


def reached():
    """The files of this project that the import runs, of whatever depth, as paths below the root."""
    found, waiting = set(), ["sprc.lavis_registration"]
    while waiting:
        module = waiting.pop()
        file = file_of(module)
        if file is None or file in found:
            continue
        found.add(file)
        waiting.append(module.rpartition(".")[0] or "sprc")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(str(file.relative_to(ROOT)) for file in found)


def test_ruff_reads_exactly_the_reached_files_as_python_3_9():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["per-file-target-version"]
    assert set(patterns.values()) == {"py39"}
    chosen = {str(file.relative_to(ROOT)) for pattern in patterns for file in ROOT.glob(pattern)}
    assert chosen == {*reached(), *TESTS}


# Calls with a keyword that came later: zip's with 3.10, dataclass's with 3.10, hub's with torch 2.1.
LATER_KEYWORDS = {
    "zip": {"strict"},
    "dataclass": {"kw_only", "slots"},
    "load_state_dict_from_url": {"weights_only"},
    "load_state_dict": {"assign"},
}
# Names that came later than Python 3.9 and torch 2.0.
LATER_NAMES = {
    "tomllib",
    "pairwise",
    "batched",
    "UTC",
    "StrEnum",
    "Self",
    "TypeAlias",
    "ParamSpec",
    "ExceptionGroup",
    "torch.amp.GradScaler",
    "torch.compiler",
    "torch.get_default_device",
    "torch.nn.RMSNorm",
    "torch.nn.attention",
    "torch.accelerator",
}


def problems(source):
    tree = ast.parse(source)
    annotations = {
        id(part)
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
        if getattr(node, field, None) is not None
        for part in ast.walk(getattr(node, field))
    }
    if annotations and "from __future__ import annotations" not in source:
        yield "annotations are evaluated: from __future__ import annotations is missing"
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            for keyword in LATER_KEYWORDS.get(name, set()) & {keyword.arg for keyword in node.keywords}:
                yield f"line {node.lineno}: {name}({keyword}=...)"
        if isinstance(node, (ast.Name, ast.Attribute)):
            text = ast.unparse(node)
            if text in LATER_NAMES or text.rpartition(".")[2] in LATER_NAMES:
                yield f"line {node.lineno}: {text}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            yield from (f"line {node.lineno}: import of {name}" for name in names & LATER_NAMES)
        # Types joined by | are values here, and Python 3.9 has no such operator for them.
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = [ast.unparse(side).split("[")[0] for side in (node.left, node.right)]
            if any(side in ("None", "int", "float", "str", "Tensor", "nn.Module") for side in sides):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        is_check = isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass")
        if is_check and isinstance(node.args[1], ast.BinOp):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("file", [*reached(), *TESTS])
def test_a_reached_file_uses_nothing_newer(file):
    assert not list(problems((ROOT / file).read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: int): ...",
        "pairs = zip(a, b, strict=True)",
        "@dataclass(frozen=True, kw_only=True)\nclass A: ...",
        "ok = isinstance(x, int | float)",
        "Keys = list[Tensor | None]",
        "s = torch.amp.GradScaler('cpu')",
        "torch.hub.load_state_dict_from_url(url, weights_only=True)",
        "import tomllib",
        "from itertools import pairwise",
    ],
)
def test_the_check_sees_what_is_newer(source):
    assert list(problems(source))
