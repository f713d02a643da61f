"""BERT's vocabulary: from the local cache, else from the hub, or from a file; and only the right one."""

from threading import Event

import pytest
import torch
import transformers.utils
from helpers.runner import assert_one_clear_line, run, train
from helpers.small_models import VOCABULARY, small_config
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sprc.data.captions import process_caption
from sprc.errors import InputError
from sprc.models import tokenizer as tokenizer_file
from sprc.models.blip2_qformer_cir_align_prompt import Blip2QformerCirAlignPrompt
from sprc.models.checkpoint import load_checkpoint, save_checkpoint
from sprc.models.factory import create_model
from sprc.models.tokenizer import (
    BERT_SPECIAL_TOKENS,
    DEC,
    SPECIAL_TOKENS,
    WordPiece,
    bert_tokenizer,
    read_bert_vocabulary,
)


def made_vocabulary(**changes):
    """As many entries as bert-base-uncased has, its special tokens in their places; ``changes`` by number."""
    words = [f"word{number}" for number in range(30522)]
    words[1000:1016] = ["make", "the", "circle", "blue", "façade", "¾", "##s", *"abcdefghi"]
    for word, number in BERT_SPECIAL_TOKENS.items():
        words[number] = word
    for number, word in changes.items():
        words[int(number[1:])] = word
    return words


def write(path, words, ending="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{word}{ending}" for word in words).encode())
    return path


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    return write(tmp_path_factory.mktemp("vocab") / "vocab.txt", made_vocabulary())


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_vocabulary_s_line_is_its_id(tmp_path, ending):
    tokenizer = bert_tokenizer(write(tmp_path / "vocab.txt", made_vocabulary(), ending))
    assert len(tokenizer) == 30523
    assert tokenizer.encode("make the circles BLUE") == [101, 1000, 1001, 1002, 1006, 1003, 102]
    assert tokenizer.convert_tokens_to_ids("[DEC]") == 30522


LETTERS = (
    "abzABZ019 \t\n$`^~<'-_.!?…ßÉéİıΣσςǅﬁ½¾中日本語가각한ﾊﾞか"
    "\u3099가\u0301\u0323\u200b\u200d\u00ad\u2028\u00a0\u3000👗"
)
WORDS = [word for word in VOCABULARY if not word.startswith("[")]  # special tokens come as words, never so
ODD = st.one_of(
    st.text(st.sampled_from(LETTERS), max_size=30),
    st.text(max_size=20),
    st.lists(st.sampled_from([*WORDS, "don't", "façade", "x" * 101, "MAKE", "[sep]"])).map(" ".join),
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' own tokenizer over the letters, and which of them are pieces of ours."""
    pieces = sorted({*"".join(LETTERS.split()).lower(), *"abcdefghijklmnopqrstuvwxyz"})
    words = [*BERT_SPECIAL_TOKENS, *pieces, *(f"##{piece}" for piece in pieces), *WORDS, "facade"]
    words = list(dict.fromkeys(words))
    file = write(tmp_path_factory.mktemp("theirs") / "vocab.txt", words)
    theirs = transformers.BertTokenizer(str(file))
    if getattr(theirs, "is_fast", False):
        pytest.skip("a tokenizer in Rust, which has Unicode's tables of its own")
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    return theirs, WordPiece(words)


@given(text=ODD)
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_odd_captions_are_read_as_transformers_reads_them(theirs, text):
    theirs, ours = theirs
    assume(not any(token in text for token in (*SPECIAL_TOKENS, DEC)))  # ours has no such words in a text
    for words in (text, process_caption(text)):
        assert ours.encode(words) == theirs(words).input_ids
        assert ours.encode(words, 7) == theirs(words, truncation=True, max_length=7).input_ids
        assert ours.tokenize(words) == theirs.tokenize(words)


def test_entries_and_ids_are_those_of_transformers(theirs):
    theirs, ours = theirs
    assert (len(ours), ours.vocab_size, ours.pad_token_id) == (len(theirs), theirs.vocab_size, 0)
    assert ours.get_vocab() == theirs.get_vocab()
    numbers = list(range(len(ours)))
    assert ours.convert_ids_to_tokens(numbers) == theirs.convert_ids_to_tokens(numbers)
    for token in ("[DEC]", "[UNK]", "facade", "nothing"):
        assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)


def test_every_letter_is_read_as_transformers_reads_it(theirs):
    theirs, ours = theirs
    for first in range(0, 0x30000, 16):
        text = "".join(f"a{chr(code)}b " for code in range(first, first + 16))
        assert ours.tokenize(text) == theirs.tokenize(text), f"{first:x}"


def test_only_an_end_of_line_parts_entries(tmp_path):
    words = made_vocabulary(_1004="\u2028", _1005="\x85")  # which Python takes for ends of lines as well
    assert read_bert_vocabulary(write(tmp_path / "vocab.txt", words)) == words


WRONG = {
    "has 3 lines and not 30,522": lambda path: write(path, ["[PAD]", "[UNK]", "a"]),
    "has 30,523 lines": lambda path: write(path, [*made_vocabulary(), "more"]),
    "does not have [CLS] on line 102": lambda path: write(path, made_vocabulary(_101="x")),
    "has 'make' 2 times": lambda path: write(path, made_vocabulary(_2000="make")),
    "cannot be read": lambda path: path.mkdir(),
    "is no text in UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_file_that_is_not_that_vocabulary_is_refused(tmp_path, message):
    WRONG[message](tmp_path / "vocab.txt")
    with pytest.raises(InputError) as caught:
        bert_tokenizer(tmp_path / "vocab.txt")
    assert message in str(caught.value)
    assert str(tmp_path / "vocab.txt") in str(caught.value)
    assert "give --vocab FILE with the vocab.txt of bert-base-uncased" in str(caught.value)


@pytest.mark.parametrize("name", ["bert-base-uncased", "google-bert/bert-base-uncased"])
def test_the_cache_is_read_under_either_name_and_no_network_is_asked(tmp_path, monkeypatch, vocab, name):
    """The cache's folders are those that the hub's client makes."""
    repo = tmp_path / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123456789abcdef")
    write(repo / "snapshots" / "0123456789abcdef" / "vocab.txt", made_vocabulary())
    asked = []
    cached_file = transformers.utils.cached_file

    def watched(*arguments, local_files_only):
        asked.append(local_files_only)
        return cached_file(*arguments, local_files_only=local_files_only, cache_dir=str(tmp_path))

    monkeypatch.setattr(transformers.utils, "cached_file", watched)
    assert bert_tokenizer().get_vocab() == bert_tokenizer(vocab).get_vocab()
    assert set(asked) == {True}


def test_a_hub_that_does_not_answer_is_not_waited_for_long(monkeypatch):
    answer, answered = Event(), []

    def cached_file(*_, local_files_only):
        if local_files_only:
            raise OSError("not cached")
        answered.append(answer.wait(60))

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    monkeypatch.setattr(tokenizer_file, "HUB_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"could not be fetched; .*--vocab FILE"):
        bert_tokenizer()
    assert answered == []
    answer.set()


def test_what_the_hub_gives_is_taken(monkeypatch, vocab):
    monkeypatch.setattr(
        transformers.utils,
        "cached_file",
        lambda name, file, local_files_only: None if local_files_only else str(vocab),
    )
    assert len(bert_tokenizer()) == 30523


def test_a_checkpoint_of_ours_takes_no_other_vocabulary(tmp_path, tokenizer, vocab):
    config = small_config(freeze_vit=False)
    model = Blip2QformerCirAlignPrompt(config, tokenizer)
    told = {"blip_model_name": "blip2_cir_align_prompt", "backbone": "tiny"}
    save_checkpoint(tmp_path / "small.pt", model, 1, told)
    with pytest.raises(
        InputError, match=r"--vocab .*small.pt carries another vocabulary; leave the flag out"
    ):
        load_checkpoint(tmp_path / "small.pt", vocab=vocab)
    large = Blip2QformerCirAlignPrompt(
        small_config(freeze_vit=False, vocab_size=30523), bert_tokenizer(vocab)
    )
    save_checkpoint(tmp_path / "large.pt", large, 1, told)
    loaded = load_checkpoint(tmp_path / "large.pt", vocab=vocab)
    assert loaded.model.tokenizer.get_vocab() == large.tokenizer.get_vocab()
    other = write(tmp_path / "other.txt", made_vocabulary(_2000="other"))
    with pytest.raises(InputError, match="carries another vocabulary"):
        load_checkpoint(tmp_path / "large.pt", vocab=other)


def test_tiny_has_words_of_its_own(data, tmp_path, vocab):
    with pytest.raises(InputError, match=r"--vocab .*backbone tiny has words of its own"):
        create_model(Blip2QformerCirAlignPrompt, "tiny", vocab=vocab)
    _, _, stderr = train(data, tmp_path / "models", "--vocab", vocab, code=2)
    assert_one_clear_line(stderr, "--vocab")


@pytest.mark.slow
def test_every_script_that_loads_a_model_without_words_takes_the_flag(data, tmp_path, tokenizer):
    wrong = write(tmp_path / "vocab.txt", ["[PAD]", "[UNK]", "a"])
    published = tmp_path / "published.pt"
    model = Blip2QformerCirAlignPrompt(small_config(use_gated_fusion=False), tokenizer)
    torch.save({"epoch": 1, "Blip2QformerCirAlignPrompt": model.state_dict()}, published)
    scoring = ("--model-path", published, "--backbone", "pretrain", "--vocab", wrong, "--data-path", data)
    for script, *flags in (
        ("blip_validate.py", "--dataset", "CIRR", *scoring),
        ("cirr_test_submission.py", *scoring),
        ("visualize_gates.py", "--dataset", "CIRR", *scoring),
        ("blip_fine_tune_2.py", "--dataset", "CIRR", *scoring),
        ("extract_features.py", "--dataset", "CIRR", "--feature-cache", tmp_path / "cache", *scoring),
        ("search.py", "index", data / "cirr_dataset/dev", "--index", tmp_path / "index", *scoring[:6]),
    ):
        _, stderr = run(script, *flags, "--device", "cpu", code=2)
        assert_one_clear_line(stderr, f"the vocabulary {wrong} has 3 lines")
