import json
import re

import pytest
from transformers import PreTrainedTokenizerFast

from mptbook.tokenizer.bpe import train_bpe
from mptbook.tokenizer.chat import (
    FILE,
    NAMED,
    ChatTemplate,
    check_turns,
    encode_messages,
    encode_prompt,
    stop_ids,
)
from mptbook.tokenizer.tokenizer import END_OF_TEXT, Tokenizer


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, ASK, TELL = turn("system", "Be brief."), turn("user", "Why so?"), turn("assistant", "So.")
CHATML = ChatTemplate(NAMED["chatml"])
TEXTS = ["why so? be brief. hare, so far from home, here and there: where do you go?\n"] * 9


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 290)


@pytest.fixture
def marked():
    """A tokenizer in which ChatML's marks are tokens."""
    tokenizer = train_bpe(TEXTS, 290)
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(tokenizer.backend)


def learned(tokenizer, ids, mask):
    return tokenizer.decode(id for id, own in zip(ids, mask, strict=True) if own)


def test_instruct_has_blank_lines_and_its_card_has_none():
    text = ChatTemplate.load("instruct").render([ASK, TELL])
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nWhy so?\n\n### Response:\nSo."
    )
    card = ChatTemplate.load("instruct-card").render([ASK], generation_prompt=True)
    assert card == text.replace("\n\n", "\n").removesuffix("So.")


def test_chatml_is_written_out():
    assert CHATML.render([SYSTEM, ASK], generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy so?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ range(999999999) | list }}", "{{ a.b.c }}"])
def test_a_template_that_fails_is_a_mistake_of_its_writer(source):
    with pytest.raises(ValueError, match="the chat template: "):
        ChatTemplate(source).render([ASK])


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_a_damaged_file_beside_a_tokenizer_is_named_or_has_no_template(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    kind = FileNotFoundError if content == b"[]" else ValueError
    with pytest.raises(kind, match=r"has no chat template|tokenizer_config\.json cannot be read"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("messages", [[ASK], [SYSTEM, ASK], [ASK, TELL], [ASK, TELL, ASK]])
def test_transformers_makes_the_same_text_of_a_template(name, messages, tokenizer):
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, chat_template=NAMED[name], eos_token=END_OF_TEXT
    )
    template = ChatTemplate.load(name)
    if name != "chatml" and len(messages) > 2:
        with pytest.raises(ValueError, match="has one instruction and one response"):
            template.render(messages)
        return
    for asking in (False, True):
        expected = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asking
        )
        assert template.render(messages, generation_prompt=asking) == expected


def test_a_template_with_generation_tags_makes_the_same_text():
    plain = NAMED["chatml"]
    tagged = plain.replace("message.content + ", "message.content }}{% generation %}{{ ").replace(
        "'<|im_end|>\\n' }}", "'<|im_end|>\\n' }}{% endgeneration %}"
    )
    assert "endgeneration" in tagged
    assert ChatTemplate(tagged).render([ASK, TELL]) == ChatTemplate(plain).render([ASK, TELL])


def test_the_last_answer_is_learned_or_all_of_them(tokenizer):
    messages = [SYSTEM, ASK, TELL, turn("user", "here?"), turn("assistant", "there.")]
    ids, mask = encode_messages(CHATML, tokenizer, messages)
    assert learned(tokenizer, ids, mask) == f"there.<|im_end|>\n{END_OF_TEXT}"
    same, both = encode_messages(CHATML, tokenizer, messages, loss_on="all")
    assert same == ids
    assert learned(tokenizer, ids, both) == f"So.<|im_end|>\nthere.<|im_end|>\n{END_OF_TEXT}"
    assert tokenizer.decode(ids) == CHATML.render(messages) + END_OF_TEXT


def test_a_prompt_has_the_ids_that_training_saw_before_the_answer(tokenizer):
    messages = [ASK, turn("assistant", "so"), turn("user", "where"), turn("assistant", "here")]
    for template in (CHATML, ChatTemplate(NAMED["chatml"].replace("\\n' }}", "' }}"))):
        ids, mask = encode_messages(template, tokenizer, messages)
        assert encode_prompt(template, tokenizer, messages[:-1]) == ids[: mask.index(True)]


def test_an_end_of_text_of_the_template_is_not_doubled(tokenizer):
    source = (
        NAMED["instruct"] + "{% if messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}"
    )
    ids, mask = encode_messages(ChatTemplate(source), tokenizer, [ASK, TELL])
    assert ids == encode_messages(ChatTemplate.load("instruct"), tokenizer, [ASK, TELL])[0]
    assert ids.count(tokenizer.end_of_text) == 1
    assert mask[-1]


def test_the_mark_after_an_answer_is_a_text_or_a_token(tokenizer, marked):
    assert CHATML.stop == "<|im_end|>"
    assert stop_ids(CHATML, tokenizer) == [tokenizer.end_of_text]
    mark = marked.backend.token_to_id("<|im_end|>")
    assert stop_ids(CHATML, marked) == [marked.end_of_text, mark]
    ids, _ = encode_messages(CHATML, marked, [ASK, TELL])
    assert ids.count(mark) == 2
    assert ChatTemplate.load("instruct").stop == ""
    assert stop_ids(ChatTemplate.load("instruct"), marked) == [marked.end_of_text]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "a list of turns"),
        ("why", "a list of turns"),
        ([{"role": "user"}], "turn 1 has no role and content"),
        ([turn("human", "hi"), TELL], r"turn 1 has the unknown role 'human', not system, user"),
        ([ASK, turn("assistant", " \n")], "turn 2 is an empty response"),
        ([turn("user", ""), TELL], "turn 1 is an empty user turn"),
        ([SYSTEM, SYSTEM, ASK, TELL], "there are 2 system turns; one at most"),
        ([ASK, SYSTEM, TELL], "turn 2 is the system's; only the first may be"),
        ([ASK, TELL, ASK], "ends on a turn of the user"),
        ([SYSTEM, TELL], "turn 2 is of the assistant, where the user should speak"),
        ([ASK, ASK, TELL], "turn 2 is of the user, where the assistant should speak"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_turn(messages, said):
    with pytest.raises(ValueError, match=said):
        check_turns(messages)


@pytest.mark.parametrize("mark", ["<|im_end|>", END_OF_TEXT])
def test_a_turn_that_spells_a_mark_is_refused(mark, tokenizer):
    with pytest.raises(ValueError, match=re.escape(f"turn 1 spells {mark}")):
        encode_messages(CHATML, tokenizer, [turn("user", f"so{mark}?"), TELL])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "has no generation prompt"),
        (NAMED["chatml"].replace("in messages", "in messages[-1:] + messages"), "only appends"),
        ("{% for m in messages %}", "the chat template: Unexpected end"),
        ("{{ messages.__class__.__mro__ }}", "the chat template: access to attribute"),
        ("{{ raise_exception('no') }}", "the chat template: no"),
    ],
)
def test_a_template_that_is_not_fit_for_training_is_refused(source, said, tmp_path):
    (tmp_path / "mine.jinja").write_text(source)
    with pytest.raises(ValueError, match=said):
        ChatTemplate.load(tmp_path / "mine.jinja")


def test_a_template_is_found_in_a_model_directory(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": NAMED["chatml"]}))
    assert ChatTemplate.load(tmp_path) == CHATML
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / FILE).write_text(NAMED["instruct"])
    assert ChatTemplate.load(tmp_path / "model").source == NAMED["instruct"]
    with pytest.raises(FileNotFoundError, match="has no chat template; give instruct, "):
        ChatTemplate.load(tmp_path / "nowhere")
