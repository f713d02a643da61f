"""Search an index of pictures with a picture and a sentence."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sprc.data.captions import process_caption
from sprc.data.images import load_image, own_formats, prepare_image
from sprc.data.reading import require_words
from sprc.data.transforms import upright_first
from sprc.errors import InputError
from sprc.files import file_digest
from sprc.models.checkpoint import load_checkpoint
from sprc.models.device import choose_device, place
from sprc.models.reranker import load_reranker
from sprc.scoring.ranking import block_scores, top_k
from sprc.scoring.retriever import Retriever
from sprc.search import lance
from sprc.search.index import (
    PictureIndex,
    Result,
    identity_of,
    open_index,
    printable,
    refuse_other_model,
)
from sprc.search.reranking import SecondStage
from sprc.search.settings import ENGINES, EngineSettings, QuerySettings


class Answer(NamedTuple):
    """What a search found, and how long its stages took."""

    results: list[Result]  # best first
    seconds: float  # of the first stage
    again: int = 0  # pictures that a re-ranker looked at
    again_seconds: float = 0.0  # and how long it did

    @property
    def time(self) -> str:
        """How long it took, to be shown."""
        first = f"{1000 * self.seconds:.0f} ms"
        again = f"; re-ranked {self.again} in {1000 * self.again_seconds:.0f} ms"
        return first + again if self.again else first


@dataclass(frozen=True, eq=False)
class Searcher:
    """An index and its model, and perhaps a re-ranker."""

    index: PictureIndex
    retriever: Retriever
    engine: str = EngineSettings.engine
    candidates: int = EngineSettings.candidates
    second: SecondStage | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model_path: str | Path | None = None,
        vocab: str | Path | None = None,
        device: str | torch.device | None = None,
        engine: str = EngineSettings.engine,
        candidates: int = EngineSettings.candidates,
        rerank: str | Path | None = None,
        rerank_top: int | None = None,
        rerank_weight: float | None = None,
        rerank_any: bool = False,
    ) -> Searcher:
        """The index at ``path``, which `search.py index` made, with its model.

        Args:
            path: of the index.
            model_path: where the model is now, if not where it was.
            vocab: where the vocabulary is that it was indexed with, likewise.
            device: by default a GPU, if there is one. The features stay in main memory.
            engine: "exact" compares the query with every picture. "faiss" takes ``candidates`` pictures by
                their mean features first and compares it with those alone, which may miss some. "lancedb"
                does the same with a table on disk, which `search.py index --lancedb` makes.
            candidates: see ``engine``.
            rerank: the checkpoint of a re-ranker, which looks again at what comes first.
            rerank_top: pictures a query that it looks at, by default 50. A search for fewer looks at as many
                and returns the best of them; one for more has the others behind them as they are.
            rerank_weight: its score's share of the order, by default 1; the rest is the first stage's.
            rerank_any: take a re-ranker of another model than the index's.

        Raises:
            InputError: there is no index, its model is gone, or ``model_path`` holds another; the re-ranker
                cannot be loaded, is of another model, or has nothing to do with what is said of it.
        """
        settings = EngineSettings(
            model_path=None if model_path is None else Path(model_path),
            vocab=None if vocab is None else Path(vocab),
            device=None if device is None else str(device),
            engine=engine,
            candidates=candidates,
            rerank=None if rerank is None else Path(rerank),
            rerank_top=rerank_top,
            rerank_weight=() if rerank_weight is None else (rerank_weight,),
            rerank_any=rerank_any,
        )
        check_settings(settings)
        return cls.of(open_index(Path(path)), settings)

    @classmethod
    def of(cls, index: PictureIndex, settings: EngineSettings) -> Searcher:
        """The same of an index that is open. Its features are mapped now: it may be replaced at any time."""
        map_features(index, settings.engine)
        told, model_path = index.scored_as, settings.model_path
        if model_path is None and not Path(told["model_path"]).exists():
            raise InputError(
                f"{told['model_path']}, the model of the index {index.path}, is gone; give --model-path FILE "
                "if it was moved, or index again with another"
            )
        on = choose_device(settings.device)
        retriever = load_model(
            model_path or Path(told["model_path"]),
            blip_model_name=told["blip_model_name"],
            backbone=told["backbone"],
            vocab=settings.vocab or (Path(told["vocab"]) if told.get("vocab") else None),
            transform=index.identity.transform,
            target_ratio=index.identity.target_ratio,
        )
        identity = identity_of(retriever.model, retriever.transform_name, retriever.target_ratio)
        given = str(model_path or told["model_path"])
        refuse_other_model(index.path, index.identity, told["model_path"], identity, given)
        place(retriever.model, on)
        second = load_second_stage(settings, retriever)
        return cls(index, retriever, settings.engine, settings.candidates, second)

    def with_index(self, index: PictureIndex) -> Searcher:
        """The same models with another index that the first has made."""
        map_features(index, self.engine)
        return replace(self, index=index)

    @property
    def has_fusion(self) -> bool:
        """Whether the model edits the reference."""
        return self.retriever.model.gated_fusion is not None

    def search(
        self,
        image: str | Path | Image.Image,
        text: str,
        *,
        top: int = QuerySettings.top,
        keep_reference: bool = False,
        strength: float = 1.0,
    ) -> list[Result]:
        """The best pictures of the index for a reference and a text, best first.

        Args:
            image: the reference: a file, the name of a picture of the index, or a PIL image.
            text: what to change, such as "make it red".
            top: how many pictures.
            keep_reference: let the reference, and copies of it, be results too. A PIL image's copies cannot
                be known, and may be results always.
            strength: of the fusion's edit, as in the model's ``compose``.

        Raises:
            InputError: there is no such picture, it cannot be read, or the text holds no word; or a re-ranker
                cannot read one of the first pictures any more.
        """
        return self.ask(image, text, top=top, keep_reference=keep_reference, strength=strength).results

    def ask(
        self,
        image: str | Path | Image.Image,
        text: str,
        *,
        top: int = QuerySettings.top,
        keep_reference: bool = False,
        strength: float = 1.0,
    ) -> Answer:
        """:meth:`search` with the time that it took."""
        start = time.perf_counter()
        require_words(text, "the text")
        if top < 1:
            raise InputError(f"top {top}: give a whole number of at least 1")
        leave_out = []
        if isinstance(image, Image.Image):
            pixels = prepare_image(image, upright_first(self.retriever.transform), "the picture")
        else:
            path, name = find_reference(self.index, str(image), "the picture")
            pixels = load_image(path, upright_first(self.retriever.transform), own_formats())
            if not keep_reference:
                leave_out = self.copies(digest=file_digest(path), name=name)
        tokens = self.encode(pixels)
        read = time.perf_counter() - start
        answer = self.answer(tokens, text, top, leave_out, strength=strength)
        return answer._replace(seconds=read + answer.seconds)

    def answer(
        self,
        tokens: Tensor,
        text: str,
        top: int,
        leave_out: list[int] | None = None,
        *,
        strength: float = 1.0,
        again: bool = True,
    ) -> Answer:
        """The ``top`` pictures for (1, N, D) image tokens and a text, by both stages where there are two.

        As many as the second stage looks at are found at least, and the best of them returned. What
        it does not look at stands behind as the first stage has it.

        Args:
            tokens: of the reference, from :meth:`encode`.
            text: what to change.
            top: how many pictures.
            leave_out: gallery indices.
            strength: of the fusion's edit.
            again: use the second stage, if there is one.

        Raises:
            InputError: the second stage cannot read one of the first pictures any more.
        """
        start = time.perf_counter()
        prompts, query = self._prompts_and_query(tokens, text, strength)
        second = self.second if again else None
        results = self.best(query, top if second is None else max(top, second.top), leave_out)
        seconds = time.perf_counter() - start
        if second is None:
            return Answer(results, seconds)
        # Rounded as validation keeps them.
        results = second.rank_again(self.index, results, prompts.half(), text)
        looked_at = min(second.top, len(results))
        return Answer(results[:top], seconds, looked_at, time.perf_counter() - start - seconds)

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, S, S) as the model takes it."""
        return upright_first(self.retriever.transform)(image)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(3, S, S) pixels to image tokens (1, N, D)."""
        model = self.retriever.model
        return model.encode_image(pixels[None].to(model.device))

    def copies(self, *, digest: str | None = None, name: str | None = None) -> list[int]:
        """Gallery indices of the pictures with these bytes, or this name."""
        found = set(self.index.by_digest.get(digest, ())) if digest is not None else set()
        if name is not None and name in self.index.number:
            number = self.index.number[name]
            found |= {number, *self.index.by_digest[self.index.pictures[number].digest]}
        return sorted(found)

    def compose(self, tokens: Tensor, text: str, strength: float = 1.0) -> Tensor:
        """The query (E,) of (1, N, D) image tokens and a text; ``strength`` as in the model's ``compose``."""
        return self._prompts_and_query(tokens, text, strength)[1]

    @torch.no_grad()
    def _prompts_and_query(self, tokens: Tensor, text: str, strength: float) -> tuple[Tensor, Tensor]:
        """The sentence prompts (1, P, C) on the model's device, and the query (E,)."""
        model = self.retriever.model
        words = model.tokenize([text])
        prompts = model.prompts_of(tokens, words, strength)
        return prompts, model.query_of(prompts, words)[0].cpu()

    def best(self, query: Tensor, top: int, leave_out: list[int] | None = None) -> list[Result]:
        """The ``top`` pictures for a query (E,), best first, without the gallery indices ``leave_out``."""
        leave_out = leave_out or []
        wanted = top + len(leave_out)
        numbers = self._candidates(query, max(wanted, self.candidates))
        gallery = self.index.gallery if numbers is None else self.index.gallery[numbers]
        scores = block_scores(query[None], gallery)
        places = top_k(scores, wanted)[0]
        rows = places if numbers is None else numbers[places]
        names = self.index.names
        found = [
            Result(names[row], self.index.folder / names[row], value)
            for row, value in zip(rows.tolist(), scores[0, places].tolist(), strict=True)
            if row not in leave_out
        ]
        return found[:top]

    def _candidates(self, query: Tensor, count: int) -> Tensor | None:
        """Gallery indices, in the gallery's order, of the pictures whose mean features are nearest.

        None stands for all pictures.
        """
        if self.engine == "exact":
            return None
        if self.engine == "lancedb":
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

    def notes(self, text: str) -> list[str]:
        """What of ``text`` the model does not read, in sentences."""
        tokenizer, most = self.retriever.model.tokenizer, self.retriever.model.config.max_txt_len
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


class SharedSearcher:
    """The searcher of an index as it is now, for threads that share it.

    The settings are those of :meth:`Searcher.open`. Models are loaded anew only if the index has another.
    """

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path, self.settings = path, settings
        self._lock = Lock()
        self._opened: tuple[int, Searcher] | None = None  # with when its index changed, in nanoseconds

    def current(self) -> Searcher:
        """Raises :class:`InputError`, see :meth:`Searcher.open`."""
        try:
            changed = (self.path / "pictures.json").stat().st_mtime_ns
        except OSError:
            changed = 0  # opening it says what is wrong
        with self._lock:
            if self._opened is None or self._opened[0] != changed:
                searcher = self._with_models_as_before()
                if searcher is None:
                    self._opened = None  # the old models go before the new ones come
                    searcher = Searcher.open(self.path, **self.settings)
                self._opened = changed, searcher
            return self._opened[1]

    def _with_models_as_before(self) -> Searcher | None:
        if self._opened is None:
            return None
        before, index = self._opened[1], open_index(self.path)
        return before.with_index(index) if before.index.identity == index.identity else None


def find_reference(index: PictureIndex, given: str, what: str) -> tuple[Path, str | None]:
    """The file of a reference, and its name in the index if it is one of its pictures.

    ``given`` is a file, or else the name of a picture of the index. Raises :class:`InputError` if it is
    neither, and calls it ``what``.
    """
    path = Path(given)
    if not path.is_file():
        if path.is_dir():
            raise InputError(f"{what} {given} is a folder; give a picture")
        if given not in index.number:
            raise InputError(
                f"{what} {given} is neither a file nor a picture of the index {index.path}; "
                f"its pictures have names such as {printable(index.names[0])}"
            )
        path = index.path_of(given)
    resolved = path.resolve()
    if resolved.is_relative_to(index.folder):
        return path, str(resolved.relative_to(index.folder))
    return path, None


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


def check_settings(settings: EngineSettings) -> None:
    """Raise :class:`InputError` if there can be no such search."""
    settings.check_rerank()
    if settings.engine not in ENGINES:
        raise InputError(f"--engine {settings.engine!r} is unknown; choose from {', '.join(ENGINES)}")
    if settings.candidates < 1:
        raise InputError(f"--candidates {settings.candidates}: give a whole number of at least 1")
    if settings.engine == "faiss":
        import_faiss()
    if settings.engine == "lancedb":
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


def load_second_stage(settings: EngineSettings, first: Retriever) -> SecondStage | None:
    """The re-ranker that ``settings`` name, on the first stage's device, if they name one.

    Raises :class:`InputError`, see :func:`sprc.models.reranker.load_reranker`.
    """
    if settings.rerank is None:
        return None
    model = load_reranker(settings.rerank, first.model, any_first_stage=settings.rerank_any)
    place(model, first.device)
    (weight,) = settings.weights
    transform, top = upright_first(first.transform), settings.top_again
    return SecondStage(model, transform, first.model.temp.item(), top, weight)


def load_model(
    path: Path,
    *,
    blip_model_name: str | None,
    backbone: str | None,
    vocab: Path | None,
    transform: str | None,
    target_ratio: float | None,
) -> Retriever:
    """A checkpoint's model on the CPU; what is told of it goes to stderr, as stdout is the results' alone.

    What is None is the checkpoint's own. Raises :class:`InputError`, see :func:`load_checkpoint`.
    """
    with contextlib.redirect_stdout(sys.stderr):
        checkpoint = load_checkpoint(path, model_name=blip_model_name, backbone=backbone, vocab=vocab)
        for line in checkpoint.told():
            print(line, flush=True)
        return Retriever.of(checkpoint, transform=transform, target_ratio=target_ratio)
