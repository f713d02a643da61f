"""SPRC with gated fusion: composed image retrieval on CIRR and FashionIQ.

model = sprc.load("models/clip_finetuned_on_.../")        # or a checkpoint, a saved model, a name of the hub
query = model.encode_query("shoe.jpg", "make it red")      # (1, E)
gallery = model.encode_document(["a.jpg", "b.jpg"])        # (G, Q, E)
scores = model.similarity(query, gallery)                  # (1, G)
sprc.Searcher.open("picture_index").search("shoe.jpg", "make it red", top=10)
"""

from __future__ import annotations

import importlib
from typing import Any

# Where a name is. Its module is imported when it is first asked for: torch takes seconds.
_HOMES = {
    "InputError": "sprc.errors",
    "Retriever": "sprc.scoring.retriever",
    "Searcher": "sprc.search.searcher",
    "list_pretrained": "sprc.models.published",
    "load": "sprc.scoring.retriever",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return __all__
