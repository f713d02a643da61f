"""How fast the built-in data are made, against writing their files alone."""

import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median

from measure import Row, Settings, ratio_row, side_by_side

from sprc.data.synthetic.cirr import make_cirr
from sprc.data.synthetic.splits import SyntheticConfig


def run(settings: Settings) -> list[Row]:
    """CIRR's format, as `make_demo_data.py` makes it, and its pictures a second."""
    config = SyntheticConfig(train_families=1, val_families=1, test_families=1) if settings.quick else None
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), config)
        root = Path(folder) / "made"
        contents = {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        times = side_by_side(
            {"made": partial(make, Path(folder), config), "written": partial(write, Path(folder), contents)},
            settings,
        )
    pictures = sum(path.suffix == ".png" for path in contents)
    row = ratio_row(
        f"built-in data, {pictures:,} pictures, made / their files written alone: time",
        "",
        times["made"],
        times["written"],
    )
    return [row._replace(detail=f"{row.detail}; {pictures / median(times['made']):,.0f} pictures a second")]


def make(folder: Path, config: SyntheticConfig | None) -> None:
    """Make the data anew, in silence."""
    shutil.rmtree(folder / "made", ignore_errors=True)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        make_cirr(folder / "made", config or SyntheticConfig())


def write(folder: Path, contents: dict[Path, bytes]) -> None:
    """Write the same files."""
    shutil.rmtree(folder / "written", ignore_errors=True)
    for path, content in contents.items():
        file = folder / "written" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
