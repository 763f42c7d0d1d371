import pytest
import torch

from mptbook import Tokenizer, save_model
from mptbook.__main__ import main
from mptbook.infer import generate as module
from mptbook.infer.cache import KVCache
from mptbook.infer.faults import Unanswered
from mptbook.infer.generate import generate, stream
from mptbook.infer.slots import Slots
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe

TEXTS = ["the cat sat on the mat\n", "a dog ate the hat — olé\n"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    # more ids than the tokenizer has, as in a padded vocabulary
    config = MPTConfig(d_model=36, n_heads=3, n_layers=3, max_seq_len=16, vocab_size=320)
    return MPT(config).eval()


def greedy_without_cache(model, tokenizer, prompt, n):
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    out = []
    for _ in range(n):
        logits = model(torch.tensor([ids + out]))[0, -1, : len(tokenizer)]
        token = int(logits.argmax())
        if token == tokenizer.end_of_text:
            break
        out.append(token)
    return tokenizer.decode(out)


@pytest.mark.parametrize("prompt", ["the cat", "", "olé, the dog sat on the mat and ate"])
def test_cached_generation_equals_reading_everything_anew(model, tokenizer, prompt):
    expected = greedy_without_cache(model, tokenizer, prompt, 20)
    assert generate(model, tokenizer, prompt, max_new_tokens=20) == [expected]


def test_dropout_is_off(model, tokenizer):
    drops = MPT(model.config.replace(resid_pdrop=0.5)).train()
    drops.load_state_dict(model.state_dict())
    expected = generate(model, tokenizer, "the cat", max_new_tokens=20)
    assert generate(drops, tokenizer, "the cat", max_new_tokens=20) == expected


def test_unequal_prompts_together_equal_each_alone(model, tokenizer):
    prompts = ["the", "a dog ate the hat on the mat", "", "olé"]
    alone = [generate(model, tokenizer, prompt, max_new_tokens=12)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, max_new_tokens=12) == alone


def test_a_stream_is_the_same_text_in_pieces(model, tokenizer):
    how = {"max_new_tokens": 30, "temperature": 1.0, "seed": 4}
    pieces = list(stream(model, tokenizer, "the ", **how))
    assert "".join(pieces) == generate(model, tokenizer, "the ", **how)[0]
    assert len(pieces) > 5


def test_the_same_seed_gives_the_same_text_and_another_another(model, tokenizer):
    first, again, other = (
        generate(model, tokenizer, "the", temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_generation_ends_before_an_end_of_text(model, tokenizer):
    class AlwaysEnds(MPT):
        def logits(self, hidden):
            return torch.nn.functional.one_hot(
                torch.full(hidden.shape[:2], tokenizer.end_of_text), 320
            ).float()

    ends = AlwaysEnds(model.config)
    assert generate(ends, tokenizer, ["the", "a dog"], max_new_tokens=9) == ["", ""]


def test_ids_that_only_pad_the_vocabulary_never_come_out(model, tokenizer):
    class PrefersPadding(MPT):
        def logits(self, hidden):
            out = torch.zeros(*hidden.shape[:2], 320)
            out[..., 310] = 9.0
            out[..., 65] = 1.0
            return out

    text = generate(PrefersPadding(model.config), tokenizer, "the", max_new_tokens=3)[0]
    assert text == tokenizer.decode([65] * 3)


def test_a_cache_in_chunks_equals_one_pass(model):
    ids = torch.randint(0, 300, (2, 23), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config.n_layers, room=2)  # has to grow on the way
    parts = [model(part, cache=cache) for part in ids.split([5, 1, 9, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-4, atol=1e-5)
    assert len(cache) == 23


def test_a_cache_doubles_its_room():
    cache = KVCache(1, room=2)
    one = torch.zeros(3, 2, 1, 4)
    rooms = []
    for _ in range(9):
        cache.extend(0, one, one)
        rooms.append(cache.bytes // (2 * 3 * 2 * 4 * 4))
    assert rooms == [2, 2, 4, 4, 8, 8, 8, 8, 16]


@pytest.mark.parametrize("size", [1, 2])
def test_more_prompts_than_are_written_at_once_take_turns(model, tokenizer, monkeypatch, size):
    prompts = ["the", "a dog ate the hat on the mat", "", "olé"]
    expected = generate(model, tokenizer, prompts, max_new_tokens=12)
    monkeypatch.setattr(module, "SIDE_BY_SIDE", size)
    assert generate(model, tokenizer, prompts, max_new_tokens=12) == expected
    assert generate(model, tokenizer, [], max_new_tokens=12) == []


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(model, tokenizer):
    (whole,) = generate(model, tokenizer, "the cat", max_new_tokens=20)
    stop = whole[4:6]
    (cut,) = generate(model, tokenizer, "the cat", max_new_tokens=20, stop=[stop])
    assert cut == whole[: whole.index(stop)]
    assert "".join(stream(model, tokenizer, "the cat", max_new_tokens=20, stop=[stop])) == cut


def test_learned_positions_run_out_with_a_way_out(tokenizer):
    config = MPTConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=5, vocab_size=320).replace(
        alibi=False
    )
    with pytest.raises(ValueError, match="positions end at max_seq_len=5; shorten the text"):
        generate(MPT(config), tokenizer, "a dog ate the hat on the mat")


def test_a_stream_tells_a_failure_before_its_first_token(model, tokenizer, monkeypatch):
    monkeypatch.setattr(Slots, "crop", lambda *_: 1 / 0)
    with pytest.raises(Unanswered, match="division by zero"):
        list(stream(model, tokenizer, "the cat", max_new_tokens=3))


def test_one_stop_string_is_as_good_as_a_list_of_it(model, tokenizer):
    (text,) = generate(model, tokenizer, "the cat", max_new_tokens=12)
    stop = text[len(text) // 2 :][:3]
    assert stop
    one = generate(model, tokenizer, "the cat", max_new_tokens=12, stop=stop)
    assert one == generate(model, tokenizer, "the cat", max_new_tokens=12, stop=[stop])
    assert one == [text[: text.find(stop)]]


def test_a_tokenizer_of_another_model_is_refused(model):
    larger = train_bpe([f"{n} hares" for n in range(999)], 400)
    with pytest.raises(ValueError, match=r"has 400 ids, the model 320; take the tokenizer that it"):
        generate(model, larger, "the cat")


def test_what_cannot_be_asked_for_is_one_line_at_the_command_line(tmp_path, data, capsys):
    shape = {"d_model": 24, "n_heads": 3, "n_layers": 1, "vocab_size": 320}
    save_model(MPT(MPTConfig(**shape)), tmp_path / "m", Tokenizer.load(data))
    for how, message in [
        (["--prompt", "caf\udce9"], "surrogates not allowed"),
        (["--max-new-tokens", str(10**11)], "no memory for 1 slots of 100,000,000,001 tokens"),
        (["--seed", str(2**63)], "seed is 9223372036854775808; it must have 64 bits at most"),
    ]:
        assert main(["generate", str(tmp_path / "m"), *how]) == 2
        found = capsys.readouterr().err
        assert message in found
        assert len(found.splitlines()) == 1


def test_a_model_that_says_nothing_finite_is_one_line_at_the_command_line(tmp_path, data, capsys):
    shape = {"d_model": 24, "n_heads": 3, "n_layers": 1, "vocab_size": 320}
    model = MPT(MPTConfig(**shape))
    with torch.no_grad():
        model.transformer.norm_f.weight[3] = float("nan")
    save_model(model, tmp_path / "m", Tokenizer.load(data))
    assert main(["generate", str(tmp_path / "m"), "--prompt", "why"]) == 1
    found = capsys.readouterr().err
    assert found == "error: the model gave logits that are not finite\n"
