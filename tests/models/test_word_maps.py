"""The maps of words against plain statements: attention written out, and the caption without the word."""

import math

import pytest
import torch
from helpers.small_models import CAPTIONS, TOO_LONG, VOCABULARY, random_images, randomise, small_config

from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.fusion_maps import fusion_maps, why_no_word_maps, word_maps
from sprc.models.tokenizer import WordPiece

# `squares` is `square` and a piece, and the last word is cut off.
PIECES = "make squares red and red squares in blue"
LONG_ENOUGH = 11  # for all its pieces but the last


@pytest.fixture(scope="module")
def tokenizer():
    return WordPiece([*VOCABULARY, "##s"])


def small_model(tokenizer, **changes):
    model = Blip2QformerCirAlignPrompt(small_config(vocab_size=len(VOCABULARY) + 2, **changes), tokenizer)
    randomise(model)
    return model.eval()


def image_of(model):
    return model.encode_image(random_images(1, model.config)).detach()


def attention_by_hand(fusion, image, words):
    """(N, M): each token's softmax over the words, one head after the other, and their mean."""
    query, key = fusion.query(image), fusion.key(words)
    width = query.shape[1] // 4
    total = torch.zeros(len(image), len(words))
    for head in range(4):
        part = slice(head * width, (head + 1) * width)
        for n in range(len(image)):
            powers = [math.exp(query[n, part] @ word[part] / math.sqrt(width)) for word in key]
            total[n] += torch.tensor([power / sum(powers) for power in powers])
    return total / 4


@pytest.mark.parametrize("text", ["embeddings", "contextual"])
def test_what_a_token_reads_is_the_softmax_of_each_head(tokenizer, text):
    model = small_model(tokenizer, fusion_strategy="cross", fusion_text=text)
    image = model.encode_image(random_images(3, model.config))
    captions = model.tokenize(CAPTIONS)
    with torch.no_grad():
        words = model.words_for_fusion(captions)
        found = model.gated_fusion.attention(image, words, captions.mask)
        for b in range(3):
            count = int(captions.mask[b].sum())
            expected = attention_by_hand(model.gated_fusion, image[b], words[b, :count])
            torch.testing.assert_close(found[b, :, :count], expected, rtol=1e-4, atol=1e-6)
            assert found[b, :, count:].eq(0).all()
    torch.testing.assert_close(found.sum(dim=2), torch.ones(found.shape[:2]))


@pytest.mark.parametrize("text", ["embeddings", "contextual"])
def test_what_words_share_of_the_change_sums_to_it(tokenizer, text):
    model = small_model(tokenizer, fusion_strategy="cross", fusion_text=text, max_txt_len=LONG_ENOUGH)
    image = image_of(model)
    maps = word_maps(model, image, PIECES)
    _, change = fusion_maps(model, image, [PIECES])
    assert maps.words == ["make", "squares", "red", "and", "red", "squares", "in"]
    torch.testing.assert_close(maps.attention.sum(dim=0), change[0])
    # [CLS] make square ##s red and red square ##s in [SEP]
    places = [[1], [2, 3], [4], [5], [6], [7, 8], [9], [0, 10]]
    with torch.no_grad():
        words = model.words_for_fusion(model.tokenize([PIECES]))[0]
        shares = attention_by_hand(model.gated_fusion, image[0], words)
    for values, own in zip(maps.attention, places, strict=True):
        expected = shares[1:, own].sum(dim=1) * change[0].flatten()  # [CLS] of the image is left out
        torch.testing.assert_close(values.flatten(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("gated", {}),
        ("gated", {"pool": "all"}),
        ("film", {}),
        ("tirg", {}),
        ("cross", {"fusion_text": "contextual"}),
        ("cross", {}),
        ("select", {"fusion_top_k": 2}),
    ],
)
def test_a_word_left_out_is_the_caption_without_it(tokenizer, strategy, changes):
    model = small_model(tokenizer, fusion_strategy=strategy, max_txt_len=LONG_ENOUGH, **changes)
    image, side = image_of(model), model.config.num_patches
    maps = word_maps(model, image, PIECES)
    assert (maps.attention is None) == (strategy != "cross")
    read = PIECES.split()[:-1]  # the last is cut off, and stays so
    assert maps.words == read
    with torch.no_grad():
        whole = model.fuse(image, model.tokenize([PIECES])).fused
        for number, values in enumerate(maps.left_out):
            other = model.fuse(image, model.tokenize([" ".join(read[:number] + read[number + 1 :])])).fused
            expected = (whole - other)[0, 1:].abs().mean(dim=1).unflatten(0, (side, side))
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert maps.left_out.amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("caption", ["", "red", TOO_LONG, "red ! xylophone"])
def test_any_caption_has_its_maps(tokenizer, caption):
    model = small_model(tokenizer, fusion_strategy="cross")
    image = image_of(model)
    maps = word_maps(model, image, caption)
    expected = {"": [], "red": ["red"], TOO_LONG: TOO_LONG.split()[:7], "red ! xylophone": ["red", "[UNK]"]}
    assert maps.words == expected[caption]
    assert maps.left_out.shape == (len(maps.words), 3, 3)
    torch.testing.assert_close(maps.attention.sum(dim=0), fusion_maps(model, image, [caption])[1][0])


def test_where_all_tokens_move_alike_words_have_no_place(tokenizer):
    assert "same step" in why_no_word_maps(small_model(tokenizer, fusion_strategy="additive"))
    for strategy in ("gated", "weighted", "film", "tirg", "gmu", "cross", "select"):
        assert why_no_word_maps(small_model(tokenizer, fusion_strategy=strategy)) is None
