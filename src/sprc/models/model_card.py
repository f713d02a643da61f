"""The model card of a saved model: what it is, how it was made, what it scores, and what it cannot do.

All of it is read from the checkpoint and from its run's folder. What neither says is said to be unknown.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from sprc.config import RERANKER
from sprc.data import TRAINED_ON
from sprc.models.hub_folder import LIBRARY, Saved, library_version
from sprc.models.published import published_in
from sprc.run_folder import RunFolder
from sprc.tables import number

TAGS = ["composed-image-retrieval", "image-retrieval", "image-text-retrieval", "blip-2", "sprc"]
TASK = "image-feature-extraction"
PROTOCOLS = {
    "cirr": "validation split (val), all of its images as the gallery, the reference taken out of each "
    "ranking; group_recall is within the image set",
    "fashioniq": "validation split (val), each type in its own gallery ({} protocol), the reference left in",
}
SHOWN = ("seed", "num_epochs", "batch_size", "learning_rate", "amp", "ranks")
UNKNOWN = "unknown: the checkpoint does not say it"

SNIPPET = """\
```python
import sprc

model = sprc.load("{name}")  # this folder, by its path or its name on the hub
query = model.encode_query("reference.jpg", "make it red")
gallery = model.encode_document(["a.jpg", "b.jpg"])
print(model.similarity(query, gallery))  # (1, 2): the larger, the better
```"""
SECOND_STAGE = """\
```sh
python src/blip_validate.py --dataset CIRR --model-path FIRST_STAGE --rerank {name}
```"""
INSTALL = "It needs the package `sprc` ({library}, version {version} or later)."

LIMITS = """\
- It ranks what is in the gallery, and always puts something first: there is no answer "nothing fits", and a
  similarity is no probability.
- It reads one reference and one English text, of at most {tokens} tokens; what is longer is cut. Pictures
  become {size} x {size} pixels, so small things and writing are lost.
- Negation, counting and two changes at once are where models of its kind fail most: of SPRC a study of 2026
  found 9.5 % right at negation and 41.0 % at counting, against 73.0 % where something is changed (recall at
  1, CIRR).
- Recall on one data set says little about another, and a part of such queries can be answered from the text
  or the picture alone.
{bias}
- It is not for telling who somebody is, nor for decisions about people.
- The weights' licence is not stated here: those of the backbone and of the data set apply."""

BIAS = """\
- Its backbone was trained on pictures and texts from the web, and has what bias they have. Nobody has
  looked for it."""
TINY = """\
- Its backbone `tiny` knows made scenes of coloured shapes and the words of their captions, and nothing else:
  no photograph."""


def facts_of(weights: Path, epoch: int | None) -> dict[str, Any]:
    """What the folder of a checkpoint's run says of it: as JSON holds it, empty where it is in none."""
    folder = weights.absolute().parent
    run = RunFolder(folder.parent)
    if folder.name != "saved_models" or not run.hyperparameters.is_file():
        return {}
    facts: dict[str, Any] = {"name": folder.parent.name}
    try:
        facts["command"] = json.loads(run.hyperparameters.read_text(encoding="utf-8")).get("command")
        with run.validation_metrics.open(encoding="utf-8", newline="") as file:
            row = next((row for row in csv.DictReader(file) if row["epoch"] == str(epoch)), None)
        facts["metrics"] = row and {name: number(value) for name, value in row.items() if name != "epoch"}
        stage = folder.parents[1] / "stage.json"
        if stage.is_file():
            told = json.loads(stage.read_text(encoding="utf-8"))
            facts["recipe"] = {"name": stage.parents[1].name, "stage": stage.parent.name, **told}
    except (OSError, ValueError, AttributeError, KeyError):
        pass  # a run may be without metrics, or damaged: what is not read is unknown
    return {name: value for name, value in facts.items() if value is not None}


def protocol_of(told: dict[str, Any]) -> str:
    """What a training's metrics are of, in words."""
    return PROTOCOLS[told["dataset"]].format(told.get("fiq_protocol", "original"))


def data_of(told: dict[str, Any]) -> str:
    """What a model was trained on, as far as a run knows it: the format, and not whose images lay there."""
    name = TRAINED_ON[told["dataset"]]
    if told["backbone"] == "tiny":
        return f"data in {name}'s format (the backbone `tiny` is made for this project's built-in data)"
    return name


def title_of(name: str) -> str:
    """What a model is called: its folder's name, or the last part of its name on the hub."""
    return name.rpartition("/")[2]


def card_metadata(told: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments of ``ModelCardData`` but for the results, see :func:`results_of`."""
    metadata: dict[str, Any] = {
        "language": "en",
        "library_name": "sprc",
        "pipeline_tag": TASK,
        "tags": [*TAGS, *(["re-ranker"] if told["blip_model_name"] == RERANKER else [])],
        "model_name": name,
    }
    if told.get("dataset") in TRAINED_ON:
        metadata["datasets"] = [told["dataset"]]
        metadata["metrics"] = ["recall"]
    return metadata


def results_of(told: dict[str, Any], run: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of an ``EvalResult`` a metric: those of the validation after the checkpoint's epoch."""
    if told.get("dataset") not in TRAINED_ON:
        return []
    common = {
        "task_type": TASK,
        "task_name": "composed image retrieval",
        "dataset_type": told["dataset"],
        "dataset_name": data_of(told),
        "dataset_split": "val",
    }
    return [
        {**common, "metric_type": "recall", "metric_name": metric, "metric_value": round(value, 2)}
        for metric, value in run.get("metrics", {}).items()
        if isinstance(value, float)
    ]


def card_text(saved: Saved, name: str) -> str:
    """The card below its metadata; ``name`` is how the model is loaded, in the snippet."""
    contents, run, weights = saved.contents, saved.run, saved.weights
    told, config = contents["hyperparameters"], contents["model_config"]
    second = told["blip_model_name"] == RERANKER
    fusion = f" (strategy `{config['fusion_strategy']}`)" if config["use_gated_fusion"] else ""
    left_out = contents.get("left_out")
    where = (
        f"left out: loading takes it from the files of the backbone `{told['backbone']}` and checks that it "
        "is the same"
        if left_out
        else "in the file"
    )
    bias = TINY if told["backbone"] == "tiny" else BIAS
    limits = LIMITS.format(tokens=config["max_txt_len"], size=config["image_size"], bias=bias)
    if second:
        limits = f"- It scores nothing alone: it looks again at what its first stage finds.\n{limits}"
    snippet = (SECOND_STAGE if second else SNIPPET).format(name=name)
    install = INSTALL.format(library=LIBRARY, version=library_version())
    sections = {
        title_of(name): f"Composed image retrieval: a reference image and a text that says what to change, "
        f"to the image that is meant. This is {saved.holds}{fusion}, with the backbone `{told['backbone']}`.",
        "Use": f"{install}\n\n{snippet}",
        "Data and training": training_of(told, run, weights),
        "Results": results_text(told, run, weights),
        "Files": f"`model.safetensors` has the parameters, `config.json` the settings, `vocab.txt` the "
        f"words. The vision transformer is {where}. Pictures are prepared with `{told['transform']}`, ratio "
        f"{told['target_ratio']}.",
        "What it cannot do": limits,
    }
    (title, lead), *others = sections.items()
    return "\n\n".join([f"# {title}", lead, *(f"## {head}\n\n{text}" for head, text in others)]) + "\n"


def training_of(told: dict[str, Any], run: dict[str, Any], weights: Path | None) -> str:
    """Data set, command, seed, versions and recipe, as a list; what is unknown is named."""
    published = None if weights is None else published_in(weights)
    if told.get("dataset") not in TRAINED_ON:
        if published is not None:
            return (
                f"Published as `{published.name}`: {published.method}, trained on "
                f"{TRAINED_ON[published.dataset]} by its authors. Command, seed and versions are {UNKNOWN}."
            )
        return f"Data set, command, seed and versions are {UNKNOWN}."
    command = run.get("command")
    digest = told.get("digests", {}).get("data_path", UNKNOWN)
    lines = [
        f"- data set: {data_of(told)}; training split, digest `{digest}`",
        "- command: " + (f"\n\n  ```sh\n  {command}\n  ```\n" if command else UNKNOWN),
        *(f"- {name.replace('_', ' ')}: {told[name]}" for name in SHOWN if name in told),
        f"- versions: torch {told.get('torch', UNKNOWN)}; saved by sprc {library_version()}",
    ]
    if recipe := run.get("recipe"):
        start = f", from the stage `{recipe['start']}`" if recipe.get("start") else ""
        flags = json.dumps(recipe.get("flags", {}), sort_keys=True)
        lines.append(f"- recipe: `{recipe['name']}`, stage `{recipe['stage']}`{start}: `{flags}`")
    else:
        lines.append("- recipe: none, as far as the run says")
    if told.get("first_stage"):
        lines.append(f"- first stage: `{told.get('first_stage_name')}`, digest `{told['first_stage']}`")
    for title, out in told.get("left_out", {}).items():
        lines.append(
            f"- left out of {title}: {out['images']} images without a file, {out['triplets']} triplets"
        )
    if told.get("noise_ratio"):
        lines.append(f"- {told['noise_ratio']:.0%} of the training triplets were made wrong on purpose")
    return "\n".join(lines)


def results_text(told: dict[str, Any], run: dict[str, Any], weights: Path | None) -> str:
    """The metrics with their protocol, as a table."""
    published = None if weights is None else published_in(weights)
    metrics = {name: value for name, value in run.get("metrics", {}).items() if isinstance(value, float)}
    if metrics:
        head = (
            f"In percent, {protocol_of(told)}; by the training's own validation after this epoch, which was "
        )
        head += "chosen by these very figures if `--save-best` was given."
    elif published is not None and published.metrics:
        metrics = published.metrics
        head = f"As its authors published them, not measured here: in percent, {published.protocol}."
    else:
        return f"Recall is {UNKNOWN}."
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in metrics.items())
    return f"{head}\n\n| metric | value |\n|---|---|\n{rows}"
