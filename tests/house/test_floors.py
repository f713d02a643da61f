"""The floors of the house: imports go down, no wing imports another, no cycle, and it is not too tall.

CONTRIBUTING.md says what stands where.
"""

import ast
from functools import cache

from helpers.runner import ROOT

SRC = ROOT / "src"
WINGS = ("search", "gates", "ablation", "self_check")
# From the ground up. What is in none of these folders is on the ground, but for what stands over the wings.
FLOORS = ("ground", "data", "models", "scoring", "training", "wings", "front")
FRONT = ("sprc.api", "sprc.lavis_registration")
TALLEST = 10


def module_of(path):
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in (SRC / "sprc").rglob("*.py")}


def floor_of(module):
    folder = module.split(".")[1] if module.count(".") else ""
    if module in FRONT:
        return "front"
    if folder in WINGS:
        return "wings"
    return folder if folder in FLOORS else "ground"


def imports_of(source):
    """The modules of this package that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in deeper}
    return {name for name in found if name in MODULES}


IMPORTS = {module: imports_of(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def test_no_import_runs_up():
    up = [
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if FLOORS.index(floor_of(other)) > FLOORS.index(floor_of(module))
    ]
    assert not up


def test_no_wing_imports_another():
    between = [
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if floor_of(module) == floor_of(other) == "wings" and module.split(".")[1] != other.split(".")[1]
    ]
    assert not between


def test_the_house_has_no_cycle_and_at_most_ten_floors():
    @cache
    def height(module, above=()):
        assert module not in above, f"a cycle: {' -> '.join([*above, module])}"
        return 1 + max((height(other, (*above, module)) for other in IMPORTS[module]), default=0)

    heights = {module: height(module) for module in MODULES}
    assert {module: tall for module, tall in heights.items() if tall > TALLEST} == {}


def test_no_library_function_takes_the_command_line():
    takers = [
        (str(path.relative_to(ROOT)), node.name)
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.annotation is not None and "Namespace" in ast.unparse(argument.annotation)
    ]
    assert not takers


def test_a_file_is_no_longer_than_one_reads():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (*MODULES.values(), *SRC.glob("*.py"))
    }
    assert {file: lines for file, lines in lengths.items() if lines > 460} == {}


def test_the_check_sees_imports_in_functions_and_of_whole_modules():
    source = (
        "def f():\n    from sprc.data import cirr\nimport sprc.config\nfrom sprc.errors import InputError\n"
    )
    assert imports_of(source) == {"sprc.data.cirr", "sprc.config", "sprc.errors"}
