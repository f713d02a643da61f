"""From encoded splits to ranks."""

from collections.abc import Iterator

from torch import Tensor

from sprc.data.split import Split
from sprc.scoring.encoding import EncodedSplit
from sprc.scoring.ranking import (
    QUERY_BLOCK,
    Ranking,
    ScoreBlocks,
    block_scores,
    rank,
    score_blocks,
)
from sprc.scoring.screening import screened_blocks


def image_score_blocks(encoded: EncodedSplit) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarity of each reference *image alone* to the gallery, in the form of :func:`score_blocks`.

    Late interaction as for a query, averaged over the reference's Q tokens. A reference of several queries is
    scored once.
    """
    references, of_query = encoded.references.unique(return_inverse=True)
    tokens_each = encoded.gallery.shape[1]
    at_once = max(QUERY_BLOCK // tokens_each, 1)
    for start in range(0, len(references), at_once):
        tokens = encoded.gallery[references[start : start + at_once].to(encoded.gallery.device)]
        scores = block_scores(tokens.flatten(0, 1).float(), encoded.gallery)
        scores = scores.unflatten(0, tokens.shape[:2]).mean(dim=1)
        numbers = ((of_query >= start) & (of_query < start + at_once)).nonzero()[:, 0]
        for part in numbers.split(QUERY_BLOCK):
            yield part, scores[of_query[part] - start]


def rank_split(
    split: Split, encoded: EncodedSplit, blocks: ScoreBlocks | None = None, *, k: int | None = None
) -> Ranking:
    """Rank a split's queries as its benchmark does: CIRR's without the reference and in sets as well.

    ``blocks`` are the composed queries' similarities by default; ``k`` goes to :func:`rank`.
    """
    if blocks is None:
        blocks = blocks_to_rank(encoded, encoded.composed, only_ranks=k is None)
    return rank(
        blocks,
        targets=encoded.targets,
        references=None if split.ranks_reference else encoded.references,
        members=encoded.members if encoded.members.shape[1] else None,
        also_targets=encoded.also_targets,
        k=k,
    )


def blocks_to_rank(encoded: EncodedSplit, queries: Tensor, *, only_ranks: bool) -> ScoreBlocks:
    """The queries' similarities: exact around the target where nothing but the ranks of one is asked for."""
    gallery, targets = encoded.gallery, encoded.targets
    if targets is None or encoded.also_targets is not None or not only_ranks or gallery.device.type != "cpu":
        return score_blocks(queries, gallery)
    return screened_blocks(queries, gallery, targets)


def rank_modalities(split: Split, encoded: EncodedSplit) -> dict[str, Ranking]:
    """The rankings by the composed query, by the text alone and by the image alone.

    A benchmark where either half does as well as the whole does not test composition.
    """
    blocks = {
        "reference and text": blocks_to_rank(encoded, encoded.composed, only_ranks=True),
        "text only": blocks_to_rank(encoded, encoded.text_only, only_ranks=True),
        "image only": image_score_blocks(encoded),
    }
    return {name: rank_split(split, encoded, b) for name, b in blocks.items()}
