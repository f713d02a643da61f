"""The settings of the search's commands, and their flags. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sprc.errors import InputError
from sprc.scoring.settings import CheckpointSettings, DeviceSettings, RerankSettings, VocabSettings
from sprc.settings import INDEX, ROOT, like, setting, text

ENGINES = ("exact", "faiss", "lancedb")


@dataclass(frozen=True, kw_only=True)
class EngineSettings(RerankSettings, DeviceSettings, VocabSettings):
    """How an index of pictures is searched, and where its models are."""

    model_path: Path | None = setting(None, metavar="FILE", help="default: where it was when indexed")
    engine: str = setting(
        "exact",
        choices=ENGINES,
        help="exact compares the query with every picture; faiss, for very many, with the --candidates "
        "nearest by their mean features alone, and may miss some; so does lancedb, which keeps the means on "
        "disk and not in memory and needs `search.py index --lancedb`; default: %(default)s",
    )
    candidates: int = setting(1000, metavar="N", help="for faiss and lancedb; default: %(default)s")
    rerank_weight: Sequence[float] = like(
        RerankSettings,
        "rerank_weight",
        help="its score's share of the order, the rest is the first stage's; one number; default: 1",
    )

    def check_rerank(self) -> None:
        """The same as of all; and a query takes one weight."""
        super().check_rerank()
        if len(self.rerank_weight) > 1:
            told = " ".join(f"{weight:g}" for weight in self.rerank_weight)
            raise InputError(
                f"--rerank-weight {told}: a query takes one; give that which blip_validate.py finds best"
            )


@dataclass(frozen=True, kw_only=True)
class IndexSettings(CheckpointSettings):
    """Of ``search.py index``."""

    folder: Path = setting(
        positional=True, metavar="FOLDER", help="pictures, at any depth; hidden files are left out"
    )
    index: Path = setting(INDEX, metavar="DIR", help="where the index is; default: %(default)s")
    rebuild: bool = setting(False, help="replace an index of another folder or model")
    lancedb: bool | None = setting(
        None,
        negatable=True,
        help="also keep a table of LanceDB's, for queries with --engine lancedb; default: if there is one",
    )
    num_workers: int | None = like(
        CheckpointSettings, "num_workers", help="processes that read pictures; default: by the cores"
    )


@dataclass(frozen=True, kw_only=True)
class QuerySettings(EngineSettings):
    """Of ``search.py query``."""

    image: str = setting(metavar="PICTURE", help="the reference: a file, or a name in the index")
    history: Sequence[str] = setting(
        (),
        nargs=2,
        metavar=("PICTURE", "TEXT"),
        parse=text,
        help="an earlier round of this search, and again for each, oldest first: the query is the mean of "
        "the rounds' queries; default: none",
    )
    text: str = setting(parse=text, help="what to change, such as 'make it red'")
    top: int = setting(10, metavar="N", help="how many pictures to print; default: %(default)s")
    keep_reference: bool = setting(False, help="let the references, and copies of them, be results too")
    sheet: Path | None = setting(None, metavar="FILE", help="PNG: the reference, the text, the results")
    json: bool = setting(
        False, help="print JSON: image, text, results (rank, score, path; with --rerank also match)"
    )
    index: Path = like(IndexSettings, "index")


@dataclass(frozen=True, kw_only=True)
class AppSettings(EngineSettings):
    """Of ``app.py``."""

    index: Path | None = like(IndexSettings, "index", None, help=f"default: {INDEX}, else that of the demo")
    data_path: Path = setting(
        ROOT / "demo",
        metavar="DIR",
        help="built-in data, or CIRR: its validation queries are offered ready-made where the index holds "
        "its pictures; default: %(default)s",
    )
    models_path: Path = setting(ROOT / "models", metavar="DIR", help="runs; default: %(default)s")
    port: int = setting(8501, help="default: %(default)s")
    address: str = setting(
        "127.0.0.1",
        help="another one lets others search and see the indexed pictures; default: %(default)s",
    )
