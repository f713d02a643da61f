"""The contrastive losses of a training: InfoNCE, the robust one, and the share that each has."""

from sprc.errors import InputError
from sprc.training.settings import TrainingSettings


def check_contrast(settings: TrainingSettings) -> None:
    """Raise :class:`InputError` for a weight that cannot be, or that has no loss to weigh."""
    weight = settings.complementary_weight
    if weight is None:
        return
    if settings.contrast == "infonce":
        raise InputError(
            f"--complementary-weight {weight}: the loss is InfoNCE alone; add --contrast complementary, or "
            "leave the flag out"
        )
    if not 0 <= weight <= 1:
        raise InputError(f"--complementary-weight {weight} must be a number from 0 to 1")


def loss_weights(settings: TrainingSettings) -> dict[str, float]:
    """The weight of each loss by its name, of settings in which nothing is left to the benchmark.

    Of both contrastive losses the complementary one has the share ``--complementary-weight``, and InfoNCE the
    rest.
    """
    weights = {name: getattr(settings, name) for name in ("loss_itm", "loss_rtc", "loss_align")}
    if (share := settings.complementary_weight) is not None:
        for name, weight in (("loss_itc", 1.0), ("loss_rtc", weights["loss_rtc"])):
            weights |= {name: (1 - share) * weight, f"{name}_complementary": share * weight}
    return weights
