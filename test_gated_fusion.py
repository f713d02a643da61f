"""Is this code in order, and this machine?

python test_gated_fusion.py                 sanity check of the gated fusion, in seconds (also under pytest)
python test_gated_fusion.py --device cuda   self check of this machine's GPU, with all that training needs:
                                            random weights of true shapes, nothing fetched
python test_gated_fusion.py --device cpu    the same on the CPU, with smaller shapes
"""

import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from sprc.errors import run_script
from sprc.self_check.settings import SelfCheckSettings
from sprc.settings import flag_parser, given_flags


def self_check() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    given = given_flags(flag_parser(__doc__, SelfCheckSettings))
    os.environ["TQDM_DISABLE"] = "1"  # tqdm looks when it is imported
    from sprc.self_check import run

    if given.pop("list", False):
        run.list_checks()
        return
    sys.exit(run.self_check(**given))


if __name__ == "__main__" and len(sys.argv) > 1:
    run_script(self_check)
    sys.exit()

import torch

from sprc.models.factory import create_model, model_class
from sprc.models.gated_fusion import FUSION_STRATEGIES, GatedFusionModule

CAPTIONS = [
    "make the small red circle blue",
    "remove the square",
    "add a green triangle below the large star",
]
B, N, M, D, DT = 3, 10, 7, 24, 16


def inputs(text_width: int = DT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image tokens (B, N, D), word embeddings (B, M, Dt), and a mask with padding."""
    torch.manual_seed(0)
    mask = torch.ones(B, M, dtype=torch.long)
    mask[1, 3:] = 0
    return torch.randn(B, N, D), torch.randn(B, M, text_width), mask


def tiny_model(**switches) -> torch.nn.Module:
    """The whole `tiny` model, seeded."""
    torch.manual_seed(0)
    return create_model(model_class("blip2_cir_align_prompt"), "tiny", **switches)


def batch(model: torch.nn.Module) -> dict:
    """Three triplets of noise."""
    size = model.config.image_size
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, B, 3, size, size, generator=generator)
    return {"image": images[0], "target": images[1], "text_input": CAPTIONS}


def has_gradient(parameter: torch.Tensor) -> bool:
    """Whether any entry of the gradient differs from zero."""
    return parameter.grad is not None and bool(parameter.grad.any())


def test_parameter_count_at_768():
    """2,955,265 parameters at D = Dt = 768."""
    count = sum(p.numel() for p in GatedFusionModule(768, 768).parameters())
    assert count == 2_955_265, count


def test_shapes():
    """Fused is (B, N, D) in every strategy; gate and delta have a row for all tokens, or one for each."""
    for name, strategy in FUSION_STRATEGIES.items():
        output = strategy(D, DT)(*inputs())
        assert output.fused.shape == (B, N, D), name
        for part in (output.gate, output.delta):
            assert part is None or (part.shape[::2] == (B, D) and 1 <= part.shape[1] <= N), name


def test_gate_and_delta_stay_in_their_ranges():
    """Gate in (0, 1), delta in (-1, 1)."""
    _, gate, delta, _ = GatedFusionModule(D, DT)(*inputs())
    assert gate.min() > 0, gate.min()
    assert gate.max() < 1, gate.max()
    assert delta.abs().max() < 1, delta.abs().max()


def test_every_parameter_gets_a_gradient():
    """No parameter of any strategy is idle."""
    for name, strategy in FUSION_STRATEGIES.items():
        module = strategy(D, DT, start="random")
        module(*inputs()).fused.square().sum().backward()
        for parameter_name, parameter in module.named_parameters():
            assert has_gradient(parameter), f"{name}: {parameter_name}"


def test_the_written_formula():
    """fused = I + alpha * sigmoid(MLP_g([I ; t])) * tanh(MLP_d(t)), t the mean without padding."""
    image, words, mask = inputs()
    module = GatedFusionModule(D, DT).eval()
    means = [words[b, : mask[b].sum()].mean(dim=0) for b in range(B)]
    t = module.text_proj(torch.stack(means))[:, None].expand(-1, N, -1)  # one row a token, as written
    gate = torch.sigmoid(module.gate_mlp(torch.cat([image, t], dim=2)))
    delta = torch.tanh(module.delta_mlp(t))
    torch.testing.assert_close(module(image, words, mask).fused, image + module.alpha * gate * delta)


def test_fusion_off_is_plain_sprc():
    """Off: no fusion parameter, the same other weights, and the losses of a fusion that changes nothing.

    In float64, since on and off order their products differently: what is left is rounding, 1e-16 each.
    """
    off, still = tiny_model(use_gated_fusion=False), tiny_model(fusion_start="identity")
    assert not [name for name, _ in off.named_parameters() if "fusion" in name]
    for name, parameter in off.state_dict().items():
        assert torch.equal(parameter, still.state_dict()[name]), name
    samples = {name: x.double() if name != "text_input" else x for name, x in batch(off).items()}
    losses, still_losses = off.double().eval()(samples), still.double().eval()(samples)
    for name, loss in losses.items():
        torch.testing.assert_close(still_losses[name], loss, rtol=1e-10, atol=1e-10, msg=name)


def test_the_whole_tiny_model_forward_and_backward():
    """Three finite losses; a gradient in every fusion parameter; a query reaches `inference`."""
    model = tiny_model()
    samples = batch(model)
    losses = model(samples)
    assert set(losses) == {"loss_itc", "loss_rtc", "loss_align"}
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    for name, parameter in model.gated_fusion.named_parameters():
        assert has_gradient(parameter), name
    target_feats, _ = model.eval().extract_target_features(samples["target"])
    _, reference_embeds = model.extract_target_features(samples["image"])
    assert model.inference(reference_embeds, target_feats, CAPTIONS).shape == (B, B)


def main() -> int:
    """Run every check above; 1 if one fails."""
    start, failures = time.perf_counter(), 0
    checks = {name: check for name, check in globals().items() if name.startswith("test_")}
    for name, check in checks.items():
        try:
            check()
            print(f"ok    {name.removeprefix('test_').replace('_', ' ')}: {check.__doc__.splitlines()[0]}")
        except Exception:
            failures += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}")
    print(f"{len(checks) - failures} passed, {failures} failed in {time.perf_counter() - start:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
