import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook.infer.text import TextStream
from mptbook.tokenizer.bpe import train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat — olé, 猫 🐈\n"] * 5, 300)
TEXTS = st.text("the cas o—é猫🐈\n", max_size=30)


def pieces(text, stop=()):
    stream = TextStream(TOKENIZER, stop)
    found = []
    for token in TOKENIZER.encode(text):
        found.append(stream.add(token))
        if stream.stopped is not None:
            return found, stream.stopped
    return [*found, stream.finish()], stream.stopped


@given(text=TEXTS)
@settings(deadline=None)
def test_pieces_are_the_text_and_no_piece_ends_within_a_character(text):
    found, stopped = pieces(text)
    assert "".join(found) == text
    assert stopped is None
    assert not any("\ufffd" in piece for piece in found)


@given(text=TEXTS, stop=st.lists(st.text("the ca猫", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_a_stop_string_ends_the_text_wherever_tokens_end(text, stop):
    found, stopped = pieces(text, stop)
    places = [text.find(string) for string in stop if string in text]
    if places:
        # Of two that come in one token the first is found; else the one that is whole first.
        ends = [text.find(string) + len(string) for string in stop if string in text]
        assert stopped in stop
        assert "".join(found) in {text[:place] for place in places}
        assert len("".join(found)) <= min(ends)
    else:
        assert "".join(found) == text
        assert stopped is None


@given(text=TEXTS, stop=st.lists(st.text("the ca猫", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_nothing_that_was_handed_out_would_have_to_be_taken_back(text, stop):
    found, _ = pieces(text, stop)
    whole = "".join(found)
    assert text.startswith(whole)
    assert not any(string in whole for string in stop)


def test_what_may_be_the_beginning_of_a_stop_string_waits():
    stream = TextStream(TOKENIZER, ["mat —"])
    handed = [stream.add(token) for token in TOKENIZER.encode("the mat")]
    assert "".join(handed) == "the "
    assert stream.finish() == "mat"


def test_half_a_character_at_the_end_is_shown_as_such():
    ids = TOKENIZER.encode("🐈")
    assert len(ids) > 1
    stream = TextStream(TOKENIZER)
    assert [stream.add(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("stop", [[], [""]])
def test_an_empty_stop_string_stops_nothing(stop):
    assert pieces("the cat", stop)[0][-1] == ""
