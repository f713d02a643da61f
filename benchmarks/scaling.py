"""Scaling on paper: what a step computes and moves, and how much of the time several GPUs compute.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --batch 32 --seconds 0.11 --gpus 4 8 --node-link 25
Nothing here is measured but by you: give the step time of your one GPU with --seconds. Without it the time
is the step's operations at --share of a GPU's peak. See scaling.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

PEAK = 989e12  # operations a second: H100 SXM's data sheet, bfloat16, dense
NVLINK = 450.0  # GB/s one way and a GPU: NVLink 4's 900 GB/s are both ways together
FLOAT = 4  # bytes; DistributedDataParallel sends float32 gradients, features are gathered in float32
BACKWARD = 2 / 3  # of a step's time, during which gradients can be sent
WORDS = 16  # tokens a caption, [CLS] and [SEP] among them: CIRR's mean of 11 words and some in pieces


def trained_parameters(fusion: bool) -> int:
    """How many parameters a step exchanges the gradients of, at ViT-g's widths."""
    return sum(p.numel() for p in model_on_paper(fusion).parameters() if p.requires_grad)


def model_on_paper(fusion: bool):
    """The model at true shapes, without memory for its weights."""
    import torch

    from sprc.config import ModelConfig
    from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt

    with torch.device("meta"):
        return Blip2QformerCirAlignPrompt(ModelConfig(use_gated_fusion=fusion), tokenizer=None)


def operations(fusion: bool) -> dict[str, float]:
    """Operations a triplet, counted by torch: of what is trained, forward and backward, and of ViT-g."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = model_on_paper(fusion), 2
    config = model.config
    tokens = torch.empty(2 * batch, config.num_patches**2 + 1, config.vit_width, device="meta")
    words = torch.empty(batch, WORDS, config.hidden_size, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as trained:
        rows = model.embed_tokens(tokens, model.lay_out(words, torch.ones(batch, WORDS, dtype=torch.bool)))
        sum(value.sum() for value in rows.values()).backward()
    pixels = torch.empty(2 * batch, 3, config.image_size, config.image_size, device="meta")
    with FlopCounterMode(display=False) as frozen, torch.no_grad():
        model.visual_encoder(pixels)
    return {
        "trained": trained.get_total_flops() / batch,
        "vision transformer": frozen.get_total_flops() / batch,
    }


def ring_bytes(bytes_: float, ranks: int) -> float:
    """What a rank sends in a ring all-reduce, and receives as well: 2 (R - 1) / R of the whole."""
    return 2 * (ranks - 1) / ranks * bytes_


def step_bytes(parameters: int, ranks: int, batch: int) -> dict[str, float]:
    """Bytes a rank sends in a step.

    Args:
        parameters: that are trained.
        ranks: R.
        batch: triplets a rank.
    """
    own = batch * 32 * 256 * FLOAT  # target features
    return {
        "gradients": ring_bytes(parameters * FLOAT, ranks),
        "features": (ranks - 1) * own,  # all-gather: each part goes once around the ring
        "their gradients": ring_bytes(ranks * own, ranks),
    }


def efficiency(seconds: float, moved: dict[str, float], gigabytes: float) -> tuple[float, float]:
    """The share of a step's time that is computing: with no overlap, and with gradients behind the backward.

    Args:
        seconds: of a rank's step alone.
        moved: from :func:`step_bytes`.
        gigabytes: a second that a rank's data get through the slowest link.
    """
    gradients = moved["gradients"] / (gigabytes * 1e9)
    rest = sum(moved.values()) / (gigabytes * 1e9) - gradients
    hidden = max(gradients - BACKWARD * seconds, 0)
    return seconds / (seconds + gradients + rest), seconds / (seconds + hidden + rest)


def main() -> None:
    """Print what a step moves and the efficiencies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, default=64, help="triplets a GPU; default: %(default)s")
    add("--seconds", type=float, default=None, help="a step on one GPU, as measured; default: assumed")
    add("--share", type=float, default=0.3, help="of the peak, where assumed; default: %(default)s")
    add("--gpus", type=int, nargs="+", default=[8, 64], help="default: 8 64")
    add("--gpus-a-node", type=int, default=8, help="default: %(default)s")
    add(
        "--node-link",
        type=float,
        nargs="+",
        default=[400.0, 50.0, 12.5],
        help="GB/s one way between machines; default: 8 x NDR, 1 x NDR (400 Gb/s), 100 Gb/s Ethernet",
    )
    arguments = parser.parse_args()
    for fusion in (True, False):
        parameters, counted = trained_parameters(fusion), operations(fusion)
        print(f"fusion {'on' if fusion else 'off'}: {parameters:,} trained parameters")
        print("  operations a triplet: " + ", ".join(f"{n} {v / 1e9:.0f} G" for n, v in counted.items()))
        for name, work in (("cached tokens", counted["trained"]), ("pixels", sum(counted.values()))):
            seconds = arguments.seconds or arguments.batch * work / (arguments.share * PEAK)
            source = "given" if arguments.seconds else f"assumed, {arguments.share:.0%} of the peak"
            print(f"  from {name}: {1000 * seconds:.0f} ms a step of {arguments.batch} triplets ({source})")
            for ranks in arguments.gpus:
                moved = step_bytes(parameters, ranks, arguments.batch)
                listed = ", ".join(f"{what} {value / 1e6:.0f} MB" for what, value in moved.items())
                print(f"    {ranks} GPUs, a rank sends {listed}")
                links = [NVLINK] if ranks <= arguments.gpus_a_node else arguments.node_link
                for link in links:
                    low, high = efficiency(seconds, moved, link)
                    print(f"      {link:g} GB/s: {low:.1%} without overlap, {high:.1%} with")


if __name__ == "__main__":
    main()
