"""Each fusion strategy against its formula on expanded tensors, in float64; and what a start promises."""

import math

import pytest
import torch
from helpers import plain_model as plain
from helpers.small_models import randomise, small_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sprc import config
from sprc.config import ModelConfig
from sprc.errors import InputError
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt, fusion_diagnostics
from sprc.models.gated_fusion import FUSION_STRATEGIES, fusion_class

pytestmark = pytest.mark.numeric

BATCH, TOKENS, LENGTH, WIDTH = 3, 5, 7, 6
BOTTLENECK, CHOSEN = 4, 2  # W and k, where a strategy has them
RANDOM = {"start": "random"}
# Every strategy that plain_model.fuse states.
POOLED = ["gated", "additive", "weighted", "film", "tirg", "gmu"]
BY_TOKEN = ["cross", "select"]
STRATEGIES = POOLED + BY_TOKEN
WITH_DELTA = ["gated", "additive", "weighted"]


def build(strategy: str, text_width: int = WIDTH, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"width": BOTTLENECK, "top_k": CHOSEN, **options}
    return FUSION_STRATEGIES[strategy](WIDTH, text_width, **options)


def random_inputs(
    text_width: int = WIDTH, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype, generator=generator)
    text = torch.randn(BATCH, LENGTH, text_width, dtype=dtype, generator=generator)
    mask = torch.tensor([[1] * n + [0] * (LENGTH - n) for n in (2, LENGTH, 4)])
    return image, text, mask


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("pool", ["masked", "all"])
@pytest.mark.parametrize("text_width", [WIDTH, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_equals_its_formula(strategy: str, text_width: int, pool: str, training: bool) -> None:
    module = build(strategy, text_width, dropout=0.0, pool=pool).double().train(training)
    randomise(module)
    image, text, mask = random_inputs(text_width)
    image, text = image.requires_grad_(), text.requires_grad_()
    ours = module(image, text, mask)

    names = [name for name, _ in module.named_parameters()]
    weights = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
    other_image, other_text = (x.detach().clone().requires_grad_() for x in (image, text))
    expected = plain.fuse(weights, strategy, other_image, other_text, mask, pool, CHOSEN)

    def close(mine: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)

    close(ours.fused, expected.fused)
    if strategy in WITH_DELTA:
        assert ours.delta.shape == (BATCH, 1, WIDTH)
        close(ours.delta.expand(-1, TOKENS, -1), expected.delta)
    elif strategy == "cross":
        close(ours.delta, expected.delta)
    elif strategy == "select":  # of the chosen tokens, the heaviest first
        heaviest = expected.weights.sort(dim=1, descending=True).indices[:, :CHOSEN]
        close(ours.delta, expected.delta.take_along_dim(heaviest, dim=1))
    else:
        assert ours.delta is None
    if expected.gate is None:
        assert ours.gate is None
    else:
        assert strategy != "select" or ours.gate.shape == (BATCH, 1, WIDTH)
        close(ours.gate.expand_as(image), expected.gate)
    if expected.weights is None:
        assert ours.weights is None
    else:
        close(ours.weights, expected.weights)

    upstream = torch.randn(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad((ours.fused * upstream).sum(), [image, text, *module.parameters()])
    theirs = torch.autograd.grad(
        (expected.fused * upstream).sum(), [other_image, other_text, *weights.values()]
    )
    for name, a, b in zip(["image", "text", *names], mine, theirs, strict=True):
        assert a.abs().sum() > 0, name
        close(a, b)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_has_no_say_in_the_masked_mean(strategy: str) -> None:
    image, text, mask = random_inputs()
    longer = torch.cat([text, torch.full((BATCH, 3, WIDTH), 1e3, dtype=text.dtype)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(BATCH, 3, dtype=mask.dtype)], dim=1)
    masked = build(strategy, **RANDOM).double().eval()
    torch.testing.assert_close(
        masked(image, text, mask).fused, masked(image, longer, longer_mask).fused, rtol=1e-12, atol=1e-12
    )
    over_all = build(strategy, pool="all", **RANDOM).double().eval()
    same = torch.allclose(over_all(image, text, mask).fused, over_all(image, longer, longer_mask).fused)
    assert same == (strategy in BY_TOKEN)  # which take no mean


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("gated", 2_955_265),
        ("additive", 1_182_721),
        ("weighted", 2_955_264),
        ("film", 2 * (768 * 768 + 768)),
        ("tirg", 2 * (2_955_264 - 1_182_720) + 2),  # two networks of the gate's shape, w_g and w_r
        ("gmu", 4 * 768 * 768),
        ("cross", 3_281_921),
        ("select", 3_936_769),
    ],
)
def test_parameter_count_at_768(strategy: str, expected: int) -> None:
    module = FUSION_STRATEGIES[strategy](768, 768)
    assert sum(p.numel() for p in module.parameters()) == expected
    if strategy == "gated":
        norms = [m for m in module.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert expected - sum(p.numel() for norm in norms for p in norm.parameters()) == 2_952_193


@pytest.mark.parametrize(("strategy", "expected"), [("cross", 4_921_601), ("select", 8_297_601)])
def test_a_bottleneck_bounds_the_parameters_at_vit_g(strategy: str, expected: int) -> None:
    def count(**options: int) -> int:
        return sum(p.numel() for p in FUSION_STRATEGIES[strategy](1408, 768, **options).parameters())

    assert count() == count(width=512) == expected < 12e6
    assert count(width=64) < expected / 4
    assert count(width=5000) == count(width=1408)  # no wider than the image


def test_text_is_projected_only_where_widths_differ() -> None:
    count = {
        width: sum(p.numel() for p in FUSION_STRATEGIES["gated"](1408, width).parameters())
        for width in (768, 1408)
    }
    assert count[768] - count[1408] == 768 * 1408 + 1408


@pytest.mark.parametrize(
    ("strategy", "learning"),
    [(name, ["delta_mlp.4"]) for name in WITH_DELTA + BY_TOKEN]
    + [("film", ["generator"]), ("tirg", ["gate_mlp.4", "res_mlp.4"])],
)
def test_identity_start_changes_nothing_but_can_learn(strategy: str, learning: list[str]) -> None:
    """To the bit on every processor: what is added is zero, and what is multiplied by is a power of two."""
    module = build(strategy, start="identity")
    image, text, mask = random_inputs(dtype=torch.float32)
    output = module(image, text, mask)
    assert torch.equal(output.fused, image)
    output.fused.square().sum().backward()
    for name in learning:
        assert module.get_parameter(f"{name}.weight").grad.abs().sum() > 0


def test_a_strategy_that_cannot_start_as_the_identity_says_so() -> None:
    with pytest.raises(InputError, match=r"'gmu' has no identity start.*--fusion-start random") as caught:
        build("gmu", start="identity")
    assert "\n" not in str(caught.value)


def test_strategies_keep_the_parameter_names_of_their_checkpoints() -> None:
    mlp_names = [f"{i}.{kind}" for i in (0, 1, 4) for kind in ("weight", "bias")]
    delta = [f"delta_mlp.{name}" for name in mlp_names]
    gate = [f"gate_mlp.{name}" for name in mlp_names]
    projection = ["text_proj.weight", "text_proj.bias"]
    expected = {
        "gated": [*projection, *delta, *gate, "alpha"],
        "additive": [*projection, *delta, "alpha"],
        "weighted": [*projection, *delta, *gate],
        "film": [*projection, "generator.weight", "generator.bias"],
        "tirg": [*projection, *gate, *(f"res_mlp.{name}" for name in mlp_names), "w_g", "w_r"],
        "gmu": [*projection, "image_layer.weight", "text_layer.weight", "gate_layer.weight"],
        "cross": ["query.weight", "query.bias", "key.weight", "value.weight", *delta, *gate, "alpha"],
        "select": [*projection, "relevance.0.weight", "relevance.1.weight", *delta, *gate, "alpha"],
    }
    for strategy, names in expected.items():
        assert sorted(build(strategy, 4).state_dict()) == sorted(names), strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_start_changes_the_tokens(strategy: str) -> None:
    image, text, mask = random_inputs(dtype=torch.float32)
    assert not torch.allclose(build(strategy, **RANDOM)(image, text, mask).fused, image, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_alpha_is_learned_from_its_start(alpha: float) -> None:
    for strategy in ("gated", "additive", "cross", "select"):
        start = build(strategy, alpha_init=alpha).alpha
        assert isinstance(start, torch.nn.Parameter)
        assert start.shape == ()
        assert start.item() == pytest.approx(alpha)
    for strategy in ("weighted", "film", "tirg", "gmu"):
        ours, default = build(strategy, alpha_init=alpha).state_dict(), build(strategy).state_dict()
        assert "alpha" not in ours
        assert all(torch.equal(ours[name], value) for name, value in default.items())


def test_alpha_starts_at_a_half() -> None:
    assert build("gated").alpha.item() == 0.5


@pytest.mark.parametrize("strategy", ["gated", "weighted", "cross", "select"])
def test_gate_and_delta_keep_their_ranges(strategy: str) -> None:
    module = build(strategy).double().eval()
    randomise(module)
    image, text, mask = random_inputs()
    output = module(image * 5, text * 5, mask)
    assert 0 < output.gate.min() < 0.3
    assert 0.7 < output.gate.max() < 1
    assert -1 < output.delta.min() < -0.3
    assert 0.3 < output.delta.max() < 1


@pytest.mark.parametrize(
    ("strategy", "networks"),
    [("gated", 2), ("additive", 1), ("weighted", 2), ("tirg", 2), ("cross", 2), ("select", 2)],
)
def test_dropout_acts_in_training_alone(strategy: str, networks: int) -> None:
    image, text, mask = random_inputs(dtype=torch.float32)
    module = build(strategy, dropout=0.5, **RANDOM)
    rates = {name: m.p for name, m in module.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert set(rates.values()) == {0.5}
    assert len(rates) == networks
    module.train()
    assert not torch.equal(module(image, text, mask).fused, module(image, text, mask).fused)
    module.eval()
    assert torch.equal(module(image, text, mask).fused, module(image, text, mask).fused)


# Multiplications in units of D^2: a token's, and those of the text's one row. gated: W_i and the gate's last
# layer; the gate's half and delta's two. tirg: two such gates. gmu: W_v and a half of W_z; W_t and the other.
@pytest.mark.parametrize(
    ("strategy", "a_token", "a_text"),
    [("gated", 2, 3), ("additive", 0, 2), ("film", 0, 2), ("tirg", 4, 2), ("gmu", 2, 2)],
)
def test_text_is_worked_out_once_a_sample(strategy: str, a_token: int, a_text: int) -> None:
    tokens, width = 257, 64
    module = FUSION_STRATEGIES[strategy](width, width).eval()
    image, text, mask = torch.randn(1, tokens, width), torch.randn(1, 32, width), torch.ones(1, 32)
    with FlopCounterMode(display=False) as counter:
        module(image, text, mask)
    assert counter.get_total_flops() == 2 * (a_token * tokens + a_text) * width**2


D, W, M, K = 64, 16, 32, 8  # widths, words, chosen tokens


# Multiplications. cross, a token: three layers read it, both networks read its text and have a last layer, it
# meets each word twice. select, a token that is not chosen: its relevance, which is no matrix product.
@pytest.mark.parametrize(
    ("strategy", "a_token", "a_chosen", "a_word", "a_text"),
    [
        ("cross", 3 * D * W + 2 * W * W + 2 * W * D + 2 * M * W, 0, 2 * D * W, 0),
        ("select", 0, 2 * D * W, 0, 2 * D * W + 4 * D * W + 2 * D * W),
    ],
)
def test_an_edit_for_each_token_costs_no_more_than_it_must(
    strategy: str, a_token: int, a_chosen: int, a_word: int, a_text: int
) -> None:
    module = FUSION_STRATEGIES[strategy](D, D, width=W, top_k=K).eval()
    image, text, mask = torch.randn(1, 257, D), torch.randn(1, M, D), torch.ones(1, M)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one that is counted
        module(image, text, mask)
    assert counter.get_total_flops() == 2 * (257 * a_token + K * a_chosen + M * a_word + a_text)


# --- what the strategies by token promise


def randomised(strategy: str, **options: object) -> torch.nn.Module:
    module = build(strategy, **options).double().eval()
    randomise(module)
    return module


@torch.no_grad()
def test_cross_knows_no_order_of_the_words_but_their_own() -> None:
    module, (image, text, mask) = randomised("cross"), random_inputs()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
    expected = module(image, text, mask).fused
    torch.testing.assert_close(module(image, text[:, order], mask[:, order]).fused, expected)
    other = text.clone()
    other[:, 1] += 1
    assert not torch.allclose(module(image, other, mask).fused, expected)


@torch.no_grad()
def test_select_edits_the_chosen_tokens_and_leaves_the_others_to_the_bit() -> None:
    image, text, mask = random_inputs(dtype=torch.float32)
    for top_k in (1, CHOSEN, TOKENS, TOKENS + 3):
        module = build("select", top_k=top_k, **RANDOM)
        output = module(image, text, mask)
        chosen = output.weights[..., 0] > 0
        assert chosen.sum(dim=1).tolist() == [min(top_k, TOKENS)] * BATCH
        assert torch.equal((output.fused != image).any(dim=2), chosen)
        torch.testing.assert_close(output.weights.sum(dim=1), chosen.sum(dim=1, keepdim=True).float())
        assert output.delta.shape == (BATCH, min(top_k, TOKENS), WIDTH)


def test_what_is_selected_learns_through_its_weights() -> None:
    module, (image, text, mask) = randomised("select"), random_inputs()
    module(image, text, mask).fused.square().sum().backward()
    for layer in module.relevance:
        assert layer.weight.grad.abs().sum() > 0
    # Of one token the weight is 1 whatever its relevance is.
    alone = randomised("select", top_k=1)
    alone(image, text, mask).fused.square().sum().backward()
    torch.testing.assert_close(alone.relevance[0].weight.grad, torch.zeros(BOTTLENECK, WIDTH).double())


@torch.no_grad()
def test_of_tokens_that_are_equal_the_first_are_selected() -> None:
    module, (image, text, mask) = randomised("select"), random_inputs()
    output = module(image[:, :1].expand(-1, 300, -1), text, mask)
    assert output.weights[..., 0].tolist() == [[1.0] * CHOSEN + [0.0] * (300 - CHOSEN)] * BATCH


@torch.no_grad()
def test_select_reads_the_first_word_alone() -> None:
    module, (image, text, mask) = randomised("select"), random_inputs()
    expected = module(image, text, mask).fused
    torch.testing.assert_close(module(image, text[:, :1], mask[:, :1]).fused, expected)
    other = text.clone()
    other[:, 0] += 1
    assert not torch.allclose(module(image, other, mask).fused, expected)


def test_unknown_strategy_is_refused_by_name(tokenizer) -> None:
    for refused in (
        lambda: fusion_class("nope"),
        lambda: Blip2QformerCirAlignPrompt(small_config(fusion_strategy="nope"), tokenizer),
    ):
        with pytest.raises(InputError, match=r"nope.*gated") as caught:
            refused()
        assert "\n" not in str(caught.value)


# --- mixed precision: bfloat16 has eight bits


def constant(module: torch.nn.Module, layer: str, *values: float) -> None:
    """Make the layer's output constant, each value for an equal share of its channels."""
    linear = module.get_submodule(layer)
    torch.nn.init.zeros_(linear.weight)
    for part, value in zip(linear.bias.data.chunk(len(values)), values, strict=True):
        part.fill_(value)


ALPHA, SMALL_CHANGE = 0.501, 0.002  # in bfloat16 0.501 is 0.5, and 1 + 0.002 is 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("strategy", "set_up", "scale", "shift"),
    [
        ("gated", {"delta_mlp.4": [20.0], "gate_mlp.4": [20.0], "alpha": [ALPHA]}, 1, ALPHA),
        ("additive", {"delta_mlp.4": [20.0], "alpha": [ALPHA]}, 1, ALPHA),
        ("weighted", {"delta_mlp.4": [0.5], "gate_mlp.4": [20.0]}, 1, math.tanh(0.5)),
        ("film", {"generator": [SMALL_CHANGE, 0.0]}, 1 + SMALL_CHANGE, 0),
        ("tirg", {"res_mlp.4": [1.0], "gate_mlp.4": [20.0], "w_r": [ALPHA]}, 1, ALPHA),
        ("cross", {"delta_mlp.4": [20.0], "gate_mlp.4": [20.0], "alpha": [ALPHA]}, 1, ALPHA),
        (
            "select",  # all tokens, of equal weight
            {"delta_mlp.4": [20.0], "gate_mlp.4": [20.0], "alpha": [ALPHA], "relevance.1.weight": [0.0]},
            1,
            ALPHA,
        ),
    ],
)
def test_small_terms_survive_mixed_precision(strategy, set_up, scale, shift) -> None:
    module = build(strategy, dropout=0.0, top_k=TOKENS)
    for name, values in set_up.items():
        if name in dict(module.named_parameters()):
            module.get_parameter(name).fill_(*values)
        else:
            constant(module, name, *values)
    image, text, mask = random_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(image, text, mask)
    assert output.fused.dtype == torch.float32
    # film's change itself is rounded to eight bits, 0.2 % of it; the others' terms are not rounded at all.
    slack = 0.004 * SMALL_CHANGE * image.abs().max().item() + 1e-6
    torch.testing.assert_close(output.fused, scale * image + shift, rtol=0, atol=slack)


@pytest.mark.parametrize("strategy", ["gated", "weighted", "tirg", "cross", "select"])
def test_mixed_precision_keeps_no_float32_copy_of_the_tokens(strategy) -> None:
    """What the gradient needs of (B, N, D) values is half precision, but for the tokens that came in."""
    module = build(strategy, dropout=0.0)
    image, text, mask = random_inputs(dtype=torch.float32)
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        output = module(image, text, mask)
    large = [x for x in kept if x.dtype == torch.float32 and x.shape == image.shape and x is not image]
    # select's gate is one row a sample.
    assert output.gate.dtype == (torch.float32 if strategy == "select" else torch.bfloat16)
    # tirg's w_g scales gate * image, a product with the float32 tokens, and needs it for its own gradient.
    assert len(large) == (1 if strategy == "tirg" else 0)


@torch.no_grad()
def test_tokens_that_half_precision_cannot_tell_apart_are_selected_as_in_full_precision() -> None:
    module = build("select", top_k=3, **RANDOM)
    text, mask = torch.randn(1, 1, WIDTH), torch.ones(1, 1)
    image = torch.randn(1, 1, WIDTH) * torch.linspace(1, 1.001, 20)[:, None]
    chosen = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            chosen.append(module(image, text, mask).weights[0, :, 0].nonzero().flatten().tolist())
    assert chosen[0] == chosen[1]
    assert chosen[0] in ([0, 1, 2], [17, 18, 19])


def test_what_is_logged_of_half_precision_is_not_rounded() -> None:
    module = build("gated", alpha_init=ALPHA)
    image, text, mask = random_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(image, text, mask)
        logged = fusion_diagnostics(output, image, module)
    gate = output.gate.double()
    expected = {
        "gate_mean": gate.mean(),
        "gate_std": gate.std(),
        "alpha": torch.tensor(ALPHA),
        "mean_change": (output.fused - image).double().abs().mean(),
    }
    assert set(logged) == set(expected)
    for name, value in expected.items():
        assert logged[name].dtype == torch.float32, name
        assert logged[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_what_is_told_of_the_strategies_without_torch_is_what_they_are():
    assert config.STRATEGIES.keys() == FUSION_STRATEGIES.keys()
    for name, told in config.STRATEGIES.items():
        cls = fusion_class(name)
        assert hasattr(cls(2, 2), "alpha") == told.has_alpha
        assert hasattr(cls(2, 2), "pool") == told.pools
        default, own = (build(name, **options).state_dict() for options in ({}, {"start": told.start}))
        assert all(torch.equal(default[key], value) for key, value in own.items())
        try:
            cls(2, 2, start="identity")
        except InputError:
            assert not told.has_identity
        else:
            assert told.has_identity


def test_a_config_says_what_its_strategy_decides() -> None:
    for name, told in config.STRATEGIES.items():
        for pool in ("masked", "all"):
            made = small_config(fusion_strategy=name, pool=pool)
            assert made.fusion_start == told.start == ("identity" if name in BY_TOKEN else "random")
            assert made.fusion_text == ("contextual" if name == "select" else "embeddings")
        assert small_config(fusion_strategy=name, fusion_start="random").fusion_start == "random"
        both = {"fusion_strategy": name, "fusion_text": "contextual", "pool": "all"}
        if told.pools:
            with pytest.raises(InputError, match="pool='all' averages padding as well"):
                small_config(**both)
        else:
            assert small_config(**both).pool == "all"  # of which it takes no notice
    with pytest.raises(InputError, match="fusion_top_k=0 must be at least 1"):
        small_config(fusion_top_k=0)
    assert ModelConfig().fusion_top_k == 8
    assert config.read_backbone("tiny")["model"]["fusion_top_k"] == 3


def test_an_unknown_strategy_is_refused_before_a_vision_transformer_is_built(tokenizer, monkeypatch):
    def built(_):
        raise AssertionError("it was built")

    monkeypatch.setattr(Blip2QformerCirAlignPrompt, "vision_transformer", staticmethod(built))
    with pytest.raises(InputError, match=f"'gatd' is unknown; choose from {', '.join(config.STRATEGIES)}"):
        Blip2QformerCirAlignPrompt(small_config(fusion_strategy="gatd"), tokenizer)
