"""From encoded splits to ranks and recall."""

from collections.abc import Iterator

from torch import Tensor

from sprc.data.cirr import CirrSplit
from sprc.scoring.encoding import EncodedSplit, Split
from sprc.scoring.ranking import (
    QUERY_BLOCK,
    Ranking,
    ScoreBlocks,
    block_scores,
    cirr_metrics,
    fashioniq_metrics,
    rank,
    score_blocks,
)


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


def rank_split(split: Split, encoded: EncodedSplit, blocks: ScoreBlocks | None = None, **k: int) -> Ranking:
    """Rank a split's queries as its benchmark does: CIRR's without the reference and in sets as well.

    ``blocks`` are the composed queries' similarities by default; ``k`` goes to :func:`rank`.
    """
    blocks = score_blocks(encoded.composed, encoded.gallery) if blocks is None else blocks
    if isinstance(split, CirrSplit):
        sets = {"references": encoded.references, "members": encoded.members}
    else:
        sets = {"references": None, "members": None}
    return rank(blocks, targets=encoded.targets, **sets, **k)


def metrics(splits: list[Split], rankings: list[Ranking]) -> dict[str, float]:
    """The benchmark's metrics, in percent.

    Args:
        splits: CIRR's one split, or FashionIQ's one split a type.
        rankings: of the same splits.
    """
    if isinstance(splits[0], CirrSplit):
        return cirr_metrics(rankings[0].ranks, rankings[0].set_ranks)
    return fashioniq_metrics(
        {split.dress_type: ranking.ranks for split, ranking in zip(splits, rankings, strict=True)}
    )


def modality_table(split: CirrSplit, encoded: EncodedSplit) -> dict[str, dict[str, float]]:
    """CIRR's metrics of the composed query, the text alone and the image alone.

    A benchmark where either half does as well as the whole does not test composition.
    """
    blocks = {
        "reference and text": score_blocks(encoded.composed, encoded.gallery),
        "text only": score_blocks(encoded.text_only, encoded.gallery),
        "image only": image_score_blocks(encoded),
    }
    return {name: metrics([split], [rank_split(split, encoded, b)]) for name, b in blocks.items()}
