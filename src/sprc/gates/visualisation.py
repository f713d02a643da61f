"""From a checkpoint to sheets and a page of gate maps, and to the numbers (``visualize_gates.py``)."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from sprc.data.captions import process_caption
from sprc.data.edits import read_edits
from sprc.data.images import check_images
from sprc.data.missing import left_out_columns, left_out_text, tell_left_out
from sprc.data.reading import quote, require_text
from sprc.data.split import Split, Triplet
from sprc.errors import InputError
from sprc.files import write_csv
from sprc.gates.localisation import as_text, localise, require_squares
from sprc.gates.maps import draw_sheet, draw_word_sheet, picture_of, view_queries
from sprc.gates.page import write_page
from sprc.gates.probe import probe
from sprc.gates.settings import GateSettings
from sprc.models.device import start_device
from sprc.models.fusion_maps import why_no_word_maps
from sprc.models.model_path import folder_beside, with_files
from sprc.scoring.benchmarks import benchmark_class
from sprc.scoring.scorer import Scorer

ROWS = 8  # queries on a sheet

NOTE = (
    "Gate: the mean over channels for each patch. Change: the mean of |fused - image|; the image tokens are "
    "layer-normalised, so 1 is about their own spread. Each is drawn on the scale from 0 to 1 and on one "
    "from its own least value to its largest, which makes small differences look large: read its numbers. "
    "A map says where tokens are edited, not where the model looks."
)
NOTE_ON_WORDS = (
    "Without a word: the mean of |fused - fused by the caption without it|. Reads (cross alone): the change, "
    "shared out by the attention of each patch to the words; with [CLS] and [SEP] these sum to the change. "
    "Maps of words in one row have one scale, from 0."
)


def run_visualisation(settings: GateSettings) -> None:
    """Draw the chosen queries, or references under several captions.

    With ``localisation`` also measure where the edits are, with ``probe`` what recall owes to them.
    Raises :class:`InputError` before any long work.
    """
    device = start_device(settings.device)
    given = settings.model_path
    settings = with_files(settings)
    split = load_split(settings)
    if settings.missing_images == "skip":
        tell_left_out([split])
    benchmark = benchmark_class(settings.dataset)
    edits = None
    if settings.localisation:
        file = benchmark.edits_file(settings.data_path, split.name, split.dress_type)
        if not file.exists():
            raise InputError(
                f"{file} is missing: --localisation needs to know where the edits are, which only the "
                "built-in data tell; make them with make_demo_data.py and give their folder as --data-path"
            )
        edits = read_edits(file, split)
    groups = choose(split, settings)
    if settings.probe and any(triplet.target is None for triplet in split.triplets):
        raise InputError(f"--probe: the split {split.name} keeps its targets secret; give --split val")
    scorer = Scorer.from_settings(settings, device)
    if scorer.checkpoint.model.gated_fusion is None:
        raise InputError(
            f"{settings.model_path} holds plain SPRC: without fusion there is no gate and no change to "
            "draw; give a checkpoint with fusion (plain SPRC goes to --off-model-path, with --localisation)"
        )
    if settings.per_word and (why := why_no_word_maps(scorer.checkpoint.model)):
        raise InputError(f"--per-word: {settings.model_path}: {why}; leave the flag out")
    off = load_off(settings, device)
    check_images(split.image_paths, split.image_paths)
    if edits is not None:
        require_squares(split)
    out = settings.out or folder_beside(given, settings.model_path) / "gate_maps"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot write there ({error}); choose another folder") from error
    if groups:
        side_by_side = settings.same_image is not None
        draw(split, groups, scorer, out, side_by_side=side_by_side, per_word=settings.per_word)
    if edits is not None:
        rows = []
        for label, one in (("fused", scorer), ("off", off)):
            if one is not None:
                batch_size, model = one.settings["batch_size"], one.checkpoint.model
                rows += localise(model, label, split, edits, one.transform, batch_size, settings.seed)
        rows = [{**row, **left_out_columns([split])} for row in rows]
        write_csv(out / "localisation.csv", rows)
        print(as_text(rows))
        print(f"wrote {out / 'localisation.csv'}")
    if settings.probe:
        rows = [{**row, **left_out_columns([split])} for row in probe(scorer, benchmark, split)]
        write_csv(out / "probe.csv", rows)
        shown = [name for name in rows[0] if "recall" in name or name.startswith(("mean(", "map_"))]
        print(
            pd.DataFrame(rows).set_index("edit")[shown].to_string(float_format=lambda value: f"{value:.1f}")
        )
        print(f"wrote {out / 'probe.csv'}")


def load_split(settings: GateSettings) -> Split:
    """The split that the flags name; FashionIQ's is of one type."""
    benchmark = benchmark_class(settings.dataset)
    return benchmark.read(
        settings.data_path,
        settings.split,
        part=settings.fiq_type,
        protocol=benchmark.protocol_of(settings),
        missing_images=settings.missing_images,
        with_targets=settings.probe,
    )


def load_off(settings: GateSettings, device: torch.device) -> Scorer | None:
    """The plain SPRC model of ``--off-model-path``; None where there is no such flag."""
    if settings.off_model_path is None:
        return None
    scorer = Scorer.from_settings(replace(settings, model_path=settings.off_model_path), device)
    if scorer.checkpoint.model.gated_fusion is not None:
        raise InputError(
            f"--off-model-path {settings.off_model_path} holds a fusion; give a checkpoint of plain SPRC, "
            "trained with --no-use-gated-fusion"
        )
    return scorer


def choose(split: Split, settings: GateSettings) -> list[list[Triplet]]:
    """The triplets to draw, those of one group side by side: one each, or with ``same_image`` an image's.

    Raises :class:`InputError` for flags that do not go together, an unknown pair or reference, and
    references that have one caption only.
    """
    if settings.queries < 0:
        raise InputError(f"--queries {settings.queries}: give a whole number of at least 0")
    if settings.queries == 0 and not (settings.localisation or settings.probe):
        raise InputError("--queries 0 draws nothing; give at least 1, or add --localisation or --probe")
    if settings.queries == 0 and settings.per_word:
        raise InputError("--queries 0 draws nothing, and --per-word draws; give --queries at least 1")
    if settings.off_model_path is not None and not settings.localisation:
        raise InputError(f"--off-model-path {settings.off_model_path}: only --localisation uses it; add it")
    if settings.captions is not None and len(settings.same_image or ()) != 1:
        raise InputError("--captions needs one image to go with: add --same-image NAME")
    if settings.same_image is not None:
        if settings.pairs is not None:
            raise InputError("--pairs and --same-image do not go together; give one of them")
        return choose_same_image(split, settings)
    if settings.pairs is None:
        return [[split.triplets[i]] for i in draw_numbers(len(split.triplets), settings)]
    by_id = {triplet.pair_id: triplet for triplet in split.triplets}
    if unknown := [pair for pair in settings.pairs if pair not in by_id]:
        raise InputError(
            f"--pairs {unknown[0]}: the split {split.name} has no such pair; its ids run from "
            f"{min(by_id)} to {max(by_id)}"
        )
    return [[by_id[pair]] for pair in dict.fromkeys(settings.pairs)]


def choose_same_image(split: Split, settings: GateSettings) -> list[list[Triplet]]:
    """The triplets of each reference named, or of random ones that have several; or one with new captions."""
    names = list(dict.fromkeys(settings.same_image or ()))
    if unknown := [name for name in names if name not in split.image_paths]:
        raise InputError(
            f"--same-image {quote(unknown[0])}: the split {split.name} has no such image; "
            "take a name from its split file"
        )
    if settings.captions is not None:
        for caption in settings.captions:
            require_text(caption, "--captions")
            if not process_caption(caption):
                raise InputError(f"--captions {quote(caption)} holds no word; give a modification text")
        return [[Triplet(i, names[0], None, caption) for i, caption in enumerate(settings.captions)]]
    counts = Counter(triplet.reference for triplet in split.triplets)
    several = [name for name, count in counts.items() if count > 1]
    if few := [name for name in names if name not in several]:
        raise InputError(
            f"--same-image {quote(few[0])}: the split {split.name} has {counts[few[0]]} captions for it; "
            "add captions of your own with --captions"
        )
    if not several:
        raise InputError(
            f"--same-image: no reference of the split {split.name} has several captions; "
            "name an image and add --captions"
        )
    names = names or [several[i] for i in draw_numbers(len(several), settings)]
    triplets_of: dict[str, list[Triplet]] = {name: [] for name in names}
    for triplet in split.triplets:
        if triplet.reference in triplets_of:
            triplets_of[triplet.reference].append(triplet)
    return list(triplets_of.values())


def draw_numbers(count: int, settings: GateSettings) -> list[int]:
    """``--queries`` different numbers below ``count``, or all of them, in an order drawn by ``--seed``."""
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randperm(count, generator=generator)[: settings.queries].tolist()


def draw(
    split: Split,
    groups: list[list[Triplet]],
    scorer: Scorer,
    out: Path,
    *,
    side_by_side: bool,
    per_word: bool,
) -> None:
    """Write the PNG sheets and the HTML page of ``groups`` into ``out``.

    Sheets are `sheet_001.png` and so on with a row a query, or ``side_by_side`` `same_image_001.png` with a
    column a caption; with ``per_word`` `sheet_words_001.png` or `same_image_words_001.png` beside each. The
    page is `gate_maps.html` or `same_image.html`.
    """
    checkpoint = scorer.checkpoint
    model = checkpoint.model
    chosen = replace(split, triplets=[triplet for group in groups for triplet in group])
    (encoded,) = scorer.encode([chosen])
    rows = list(range(len(chosen.triplets)))
    batch_size = scorer.settings["batch_size"]
    views = iter(view_queries(model, chosen, encoded, rows, scorer.transform, batch_size, per_word=per_word))
    grouped = [[next(views) for _ in group] for group in groups]
    picture = picture_of(split, scorer.transform)

    # A sheet holds queries of several images, or captions of one.
    lists = grouped if side_by_side else [[view for group in grouped for view in group]]
    sheets = [views[i : i + ROWS] for views in lists for i in range(0, len(views), ROWS)]
    stem = "same_image" if side_by_side else "sheet"
    for number, sheet in enumerate(tqdm(sheets, desc="sheets", unit="sheet"), start=1):
        draw_sheet(out / f"{stem}_{number:03d}.png", sheet, picture, down=side_by_side)
        if per_word:
            draw_word_sheet(out / f"{stem}_words_{number:03d}.png", sheet, picture)
    more = f" to {len(sheets):03d}" if len(sheets) > 1 else ""
    for kind in (stem, f"{stem}_words") if per_word else (stem,):
        print(f"wrote {out / f'{kind}_001.png'}{more}")
    page = out / ("same_image.html" if side_by_side else "gate_maps.html")
    config = model.config
    title = (
        f"Gate maps: {config.fusion_strategy} fusion, epoch {checkpoint.epoch}, "
        f"{len(rows)} queries of the split {split.name}{left_out_text([split])}"
    )
    note = f"{NOTE} {NOTE_ON_WORDS}" if per_word else NOTE
    write_page(page, title, note, tqdm(grouped, desc="page", unit="group"), picture)
    print(f"wrote {page}")
