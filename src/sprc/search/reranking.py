"""The second stage of a search: a re-ranker looks again at the pictures that the first stage finds.

The score of both stages and what decides between equal ones are validation's, see
:func:`sprc.scoring.reranking.rank_again`.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from sprc.data.images import Transform, load_image, own_formats
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_rerank import Blip2QformerCirRerank
from sprc.scoring.settings import SCORING_BATCH
from sprc.search.index import PictureIndex, Result, printable

KEPT = 256  # pictures whose tokens are kept: 0.4 GB at ViT-g in float32


class KeptTokens:
    """The vision transformer's tokens of the pictures looked at last, for threads that share them.

    They are on the CPU. What is kept is found by the digest of the picture's file.
    """

    def __init__(self, most: int = KEPT) -> None:
        self.most = most
        self._lock = Lock()
        self._tokens: OrderedDict[str, Tensor] = OrderedDict()

    def of(self, digests: list[str]) -> dict[str, Tensor]:
        """The tokens, (N, D), of those that are kept."""
        with self._lock:
            found = {digest: self._tokens[digest] for digest in digests if digest in self._tokens}
            for digest in found:
                self._tokens.move_to_end(digest)
        return found

    def keep(self, tokens: dict[str, Tensor]) -> None:
        """Keep these, and drop what was not asked for longest."""
        with self._lock:
            self._tokens |= tokens
            while len(self._tokens) > self.most:
                self._tokens.popitem(last=False)


@dataclass(frozen=True, eq=False)
class SecondStage:
    """A re-ranker on its device, and how it is used."""

    model: Blip2QformerCirRerank
    transform: Transform  # from a picture to pixels, as the index's were made
    temp: float  # of the first stage
    top: int  # pictures a query that it looks at
    weight: float  # its score's share of the order
    kept: KeptTokens = field(default_factory=KeptTokens)

    def rank_again(
        self, index: PictureIndex, found: list[Result], prompts: Tensor, text: str
    ) -> list[Result]:
        """``found`` with its first ``top`` pictures in the order of both stages; what is behind them stays.

        Args:
            index: which holds what was found.
            found: of the first stage, best first.
            prompts: of the query, (1, P, C).
            text: of the query.

        Raises:
            InputError: one of the first pictures cannot be read any more.
            FloatingPointError: the re-ranker's scores are not finite.
        """
        number, temp = index.number, self.temp
        looked_at = found[: self.top]
        digests = {result.name: index.pictures[number[result.name]].digest for result in looked_at}
        # Pictures of the same bytes are looked at once, so that their scores are equal.
        scores = self.match(index, {digest: name for name, digest in digests.items()}, prompts, text)

        def place(result: Result) -> tuple[float, int]:
            match = scores[digests[result.name]]
            return -(self.weight * match + (1 - self.weight) * result.score / temp), number[result.name]

        again = [
            result._replace(match=scores[digests[result.name]]) for result in sorted(looked_at, key=place)
        ]
        return again + found[self.top :]

    @torch.no_grad()
    def match(
        self, index: PictureIndex, pictures: dict[str, str], prompts: Tensor, text: str
    ) -> dict[str, float]:
        """The re-ranker's score of each picture, by its digest; ``pictures`` are digests with names."""
        scores: dict[str, float] = {}
        for start in range(0, len(pictures), SCORING_BATCH):
            part = dict(list(pictures.items())[start : start + SCORING_BATCH])
            beside = self.model.beside(prompts.expand(len(part), -1, -1), [text] * len(part))
            found = self.model.match(self.model.encode_image(self.tokens(index, part)), beside).cpu()
            if not found.isfinite().all():
                raise FloatingPointError("the re-ranker's scores are not finite: its weights hold NaN or inf")
            scores |= dict(zip(part, found.tolist(), strict=True))
        return scores

    def tokens(self, index: PictureIndex, pictures: dict[str, str]) -> Tensor:
        """The vision transformer's tokens of the pictures, (B, N, D), on the model's device."""
        kept = self.kept.of(list(pictures))
        missing = [digest for digest in pictures if digest not in kept]
        if missing:
            with ThreadPoolExecutor() as pool:
                pixels = list(pool.map(lambda digest: self.read(index, pictures[digest]), missing))
            tokens = self.model.vit_tokens(torch.stack(pixels).to(self.model.device)).cpu()
            new = {digest: row.clone() for digest, row in zip(missing, tokens, strict=True)}
            self.kept.keep(new)
            kept |= new
        return torch.stack([kept[digest] for digest in pictures]).to(self.model.device)

    def read(self, index: PictureIndex, name: str) -> Tensor:
        """The picture as it was indexed, (3, S, S); :class:`InputError` if it is gone or broken by now."""
        path = index.path_of(name)
        try:
            return load_image(path, self.transform, own_formats())
        except Exception as error:  # of almost any kind, out of what Pillow can open and not convert
            raise InputError(
                f"{printable(path)} cannot be read any more; run `search.py index` again"
            ) from error
