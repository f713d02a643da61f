"""What a start imports, and what it leaves alone."""

import gc
import re
import subprocess
import sys

import pytest
from helpers.runner import ENVIRONMENT, ROOT

from sprc.start_up import no_collection

OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

# Both run in one process, and what it has imported is printed; then whether the page, where Streamlit is
# installed, imports more of matplotlib than its colors.
CODE = """
import runpy, sys
for command in {commands!r}:
    sys.argv = command
    sys.path.insert(0, {folder!r})
    runpy.run_path(command[0], run_name="__main__")
print(sorted({slow!r} & set(sys.modules)))
try:
    import sprc.search.page
except ModuleNotFoundError as error:
    assert error.name == "streamlit"
print("matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.slow
def test_a_query_a_training_and_the_page_import_no_more_than_they_need(
    data, picture_index, pictures, tmp_path
):
    query = ["search.py", "query", "--index", picture_index, "--text", "make it red", "--device", "cpu"]
    query += ["--image", pictures / "a" / "dev-0-0-img0.png"]
    training = ["blip_fine_tune_2.py", "--dataset", "CIRR", "--backbone", "tiny", "--data-path", data]
    training += ["--models-path", tmp_path, "--num-epochs", 1, "--batch-size", 64, "--num-workers", 0]
    folder = ROOT / "src"
    commands = [[str(folder / script), *map(str, flags)] for script, *flags in (query, training)]
    slow = {"matplotlib", "pandas", "transformers", "tokenizers", "huggingface_hub", "torchvision"}
    slow |= {"tensorboard", "wandb", "mlflow", "torch._dynamo", "sympy"}
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(commands=commands, folder=str(folder), slow=slow)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["[]", "False"]
    assert "epoch 0: R@1" in result.stdout


def test_a_check_of_data_imports_no_torch(data):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); "
        f"sys.argv = ['check_dataset.py', '--dataset', 'CIRR', '--data-path', {str(data)!r}]; "
        "import check_dataset; check_dataset.main(); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.splitlines()[-2:] == ["problems: 0", "False"], result.stderr


def test_garbage_is_collected_again_after_the_imports():
    seen = []

    def fail():
        with no_collection():
            seen.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(("module", "frozen"), [("triton", False), ("torch", True)])
def test_what_was_imported_is_collected_at_the_end_where_triton_looks_for_it(module, frozen):
    code = (
        "import atexit, gc, sys\n"
        "from sprc.start_up import no_collection\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"  # the last to be called
        "with no_collection():\n    import json\n"
        f"sys.modules[{module!r}] = json\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{frozen}\n"


@pytest.mark.parametrize(
    ("own", "spins"), [({}, 2000), ({"OMP_WAIT_POLICY": "ACTIVE"}, 3e10), ({"GOMP_SPINCOUNT": "7"}, 7)]
)
def test_threads_of_a_script_soon_sleep_while_they_wait_unless_the_user_says_otherwise(own, spins, tmp_path):
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in OPENMP}
    query = ["query", "--index", tmp_path / "none", "--image", tmp_path / "none.png", "--text", "red"]
    result = subprocess.run(
        [sys.executable, ROOT / "src" / "search.py", *query],
        env={**environment, **own, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    # GNU's OpenMP says it when torch loads it. Without a value of ours it would be 300000.
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
    assert found, result.stderr
    assert int(found[1]) == spins


def test_every_script_is_run_by_what_sets_that():
    for script in [*(ROOT / "src").glob("*.py"), ROOT / "test_gated_fusion.py"]:
        assert "run_script(" in script.read_text(), script.name
