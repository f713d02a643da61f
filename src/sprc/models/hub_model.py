"""A model as huggingface_hub's mixin keeps it: saved into a folder, pushed to the hub, read from either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin

from sprc.errors import InputError
from sprc.models.hub import explained
from sprc.models.hub_folder import WEIGHTS, Saved, put_in_place, read_folder, staged, write_parts
from sprc.models.model_card import card_metadata, card_text, results_of, title_of
from sprc.models.model_path import find_model


class HubModel(ModelHubMixin):
    """What is saved of a model, under the mixin's verbs.

    `push_to_hub` and `save_pretrained` are the mixin's own. :func:`save` and :func:`push` call them so that
    what is there stays whole and that errors say what to do.
    """

    def __init__(self, saved: Saved) -> None:
        self.saved = saved

    def _save_pretrained(self, save_directory: Path) -> None:
        write_parts(save_directory, self.saved)

    def generate_model_card(self, *, name: str = "model", **_: Any) -> ModelCard:
        """The card of the model that is loaded as ``name``."""
        saved = self.saved
        told = saved.contents["hyperparameters"]
        results = [EvalResult(**one) for one in results_of(told, saved.run)]
        data = ModelCardData(**card_metadata(told, title_of(name)), eval_results=results or None)
        text = card_text(saved, name)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **_: Any) -> HubModel:
        weights = find_model(model_id, revision)
        if weights.name != WEIGHTS:
            raise InputError(
                f"{model_id} is a checkpoint and no saved model; give what save_pretrained wrote"
            )
        contents = read_folder(weights)
        return cls(Saved(contents, "state", contents["run"], contents["holds"], weights))


def save(saved: Saved, folder: Path) -> Path:
    """Write a model into ``folder``, made if need be, and return the folder.

    What is there is replaced once all of the new is written.

    Raises:
        InputError: the folder cannot be made.
        OSError: a file cannot be written, on a full disk for one; what was there is untouched.
    """
    with staged(folder) as made:
        HubModel(saved).save_pretrained(made, model_card_kwargs={"name": folder.absolute().name})
        put_in_place(Path(made), folder)
    return folder


def push(saved: Saved, name: str, *, revision: str | None = None, private: bool | None = None) -> str:
    """Upload a model to the hub as USER/NAME, made there if need be; the address of its files.

    Raises :class:`InputError` where the hub does not take it.
    """
    with explained(name, revision, "uploaded"):
        return HubModel(saved).push_to_hub(
            name,
            branch=revision,
            private=private,
            commit_message="Upload a model",
            model_card_kwargs={"name": name},
        )
