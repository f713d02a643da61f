"""Search an index of pictures with a picture and a sentence."""

import contextlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sprc.data.captions import process_caption
from sprc.data.reading import require_text
from sprc.errors import InputError
from sprc.models.device import choose_device, place
from sprc.scoring.ranking import block_scores, top_k
from sprc.scoring.scorer import Scorer
from sprc.search.index import PictureIndex, identity_of, open_index, read_description, refuse_other_model
from sprc.search.indexing import search_transform

CANDIDATES = 1000  # that FAISS gives, and the exact score ranks


class Result(NamedTuple):
    """A picture found."""

    name: str
    score: float


@dataclass(frozen=True, eq=False)
class Searcher:
    """An index and its model."""

    index: PictureIndex
    scorer: Scorer
    engine: str = "exact"  # or "faiss"
    candidates: int = CANDIDATES

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        model_path: Path | None = None,
        vocab: Path | None = None,
        device: str | None = None,
        engine: str = "exact",
        candidates: int = CANDIDATES,
    ) -> "Searcher":
        """The index at ``path`` with the model that made it.

        Args:
            path: of the index.
            model_path: where the model is now, if not where it was.
            vocab: where the vocabulary is that it was indexed with, likewise.
            device: by default a GPU, if there is one. The features stay in main memory.
            engine: "exact" compares the query with every picture. "faiss" takes ``candidates`` pictures by
                their mean features first and compares it with those alone, which may miss some.
            candidates: see ``engine``.

        Raises:
            InputError: there is no index, its model is gone, or ``model_path`` holds another.
        """
        require_engine(engine, candidates)
        index = open_index(path)
        _ = index.gallery  # mapped now: another process may replace the index at any time
        told = index.scored_as
        if model_path is None and not Path(told["model_path"]).exists():
            raise InputError(
                f"{told['model_path']}, the model of the index {path}, is gone; give --model-path FILE if it "
                "was moved, or index again with another"
            )
        on = choose_device(device)
        scorer = load_model(
            model_path or Path(told["model_path"]),
            blip_model_name=told["blip_model_name"],
            backbone=told["backbone"],
            vocab=vocab or (Path(told["vocab"]) if told.get("vocab") else None),
            transform=index.identity.transform,
            target_ratio=index.identity.target_ratio,
        )
        given = str(model_path or told["model_path"])
        refuse_other_model(path, read_description(path), identity_of(scorer), given)
        place(scorer.checkpoint.model, on)
        return cls(index, scorer, engine, candidates)

    @property
    def has_fusion(self) -> bool:
        """Whether the model edits the reference."""
        return self.scorer.checkpoint.model.gated_fusion is not None

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, S, S) as the model takes it."""
        return search_transform(self.scorer.transform)(image)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(3, S, S) pixels to image tokens (1, N, D)."""
        model = self.scorer.checkpoint.model
        return model.encode_image(pixels[None].to(model.device))

    def copies(self, *, digest: str | None = None, name: str | None = None) -> list[int]:
        """Gallery indices of the pictures with these bytes, or this name."""
        found = set(self.index.by_digest.get(digest, ()))
        if name in self.index.number:
            number = self.index.number[name]
            found |= {number, *self.index.by_digest[self.index.pictures[number].digest]}
        return sorted(found)

    @torch.no_grad()
    def compose(self, tokens: Tensor, text: str, strength: float = 1.0) -> Tensor:
        """The query (E,) of (1, N, D) image tokens and a text; ``strength`` as in the model's ``compose``."""
        model = self.scorer.checkpoint.model
        return model.compose(tokens, model.tokenize([process_caption(text)]), strength=strength)[0].cpu()

    def best(self, query: Tensor, top: int, leave_out: list[int] | None = None) -> list[Result]:
        """The ``top`` pictures for a query (E,), best first, without the gallery indices ``leave_out``."""
        leave_out = leave_out or []
        wanted = top + len(leave_out)
        if self.engine == "faiss":
            numbers = self._candidates(query, max(wanted, self.candidates))
            scores = block_scores(query[None], self.index.gallery[numbers])
        else:
            numbers = None
            scores = block_scores(query[None], self.index.gallery)
        places = top_k(scores, wanted)[0]
        rows = places if numbers is None else numbers[places]
        values = scores[0, places].tolist()
        found = [
            Result(self.index.names[row], value)
            for row, value in zip(rows.tolist(), values, strict=True)
            if row not in leave_out
        ]
        return found[:top]

    def _candidates(self, query: Tensor, count: int) -> Tensor:
        """Gallery indices, in the gallery's order, of the pictures whose mean features are nearest."""
        _, numbers = self._faiss.search(query[None].numpy(), min(count, len(self.index.pictures)))
        return torch.from_numpy(numbers[0]).sort().values

    @cached_property
    def _faiss(self) -> Any:
        flat = import_faiss().IndexFlatIP(self.index.shape[1])
        for part in self.index.pooled.split(2**14):
            flat.add(part.float().numpy())
        return flat

    def notes(self, text: str) -> list[str]:
        """What of ``text`` the model does not read, in sentences."""
        model = self.scorer.checkpoint.model
        tokenizer, most = model.tokenizer, model.config.max_txt_len
        caption = process_caption(text)
        notes = []
        unknown = [
            word for word in dict.fromkeys(caption.split()) if tokenizer.unk_token in tokenizer.tokenize(word)
        ]
        if unknown:
            notes.append(f"the model does not know: {', '.join(unknown)}")
        if len(tokenizer.encode(caption)) > most or len(text.split()) > len(caption.split()):
            notes.append(f"the text is long: the model reads its first {most - 2} word pieces")
        return notes


def require_engine(engine: str, candidates: int) -> None:
    """Raise :class:`InputError` if there can be no such search."""
    if candidates < 1:
        raise InputError(f"--candidates {candidates}: give a whole number of at least 1")
    if engine == "faiss":
        import_faiss()


def import_faiss() -> Any:
    """The module; where it is missing an :class:`InputError` says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "--engine faiss needs the package faiss-cpu: pip install -e '.[search]', or leave --engine out"
        ) from error
    return faiss


def load_model(path: Path, **settings: Any) -> Scorer:
    """The checkpoint on the CPU; what it holds is told on stderr, so that results are alone on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        return Scorer.load(path, device=torch.device("cpu"), **settings)


def require_search_text(text: str, what: str) -> None:
    """Raise :class:`InputError` if ``text`` holds no word; ``what`` names it."""
    require_text(text, what)
    if not process_caption(text):
        raise InputError(f"{what} {text!r} holds no word; say what to change, such as 'make it red'")


# --- pictures to be looked at


# --- the two commands
