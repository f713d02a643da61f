"""Which pictures a query is compared with: all, or those that FAISS or LanceDB find by their means."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sprc.errors import InputError
from sprc.search import lance
from sprc.search.index import PictureIndex


def require_package(engine: str) -> None:
    """Raise :class:`InputError`, with how to get it, if the package of ``engine`` is missing."""
    if engine == "faiss":
        import_faiss()
    if engine == "lancedb":
        lance.import_lancedb()


def import_faiss() -> Any:
    """The module; where it is missing an :class:`InputError` says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "--engine faiss needs the package faiss-cpu: pip install -e '.[search]', or leave --engine out"
        ) from error
    return faiss


def map_features(index: PictureIndex, engine: str) -> None:
    """Map what the engine reads, so that it is there when another process replaces the index.

    Raises :class:`InputError` if it is missing or cut short.
    """
    _ = index.gallery
    if engine != "exact":
        index.read_here_and_there()
    if engine == "faiss":
        _ = index.pooled
    if engine == "lancedb":
        lance.require_table(index)


class Engine:
    """An engine, by its name, on an index."""

    def __init__(self, index: PictureIndex, name: str) -> None:
        self.index, self.name = index, name

    def candidates(self, query: Tensor, count: int) -> Tensor | None:
        """Gallery indices, in the gallery's order, of the ``count`` pictures to compare a query (E,) with.

        None stands for all pictures.
        """
        if self.name == "exact":
            return None
        if self.name == "lancedb":
            return lance.nearest(self.index, self._table, query, count)
        _, numbers = self._faiss.search(query[None].numpy(), min(count, len(self.index.pictures)))
        return torch.from_numpy(numbers[0]).sort().values

    @cached_property
    def _table(self) -> Any:
        return lance.open_table(self.index)

    @cached_property
    def _faiss(self) -> Any:
        flat = import_faiss().IndexFlatIP(self.index.shape[1])
        for part in self.index.pooled.split(2**14):
            flat.add(part.float().numpy())
        return flat
