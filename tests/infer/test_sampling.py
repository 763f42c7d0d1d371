import pytest
import torch

from mptbook.infer.sampling import sample

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))  # probabilities by hand


def draws(n=4000, **how):
    """How often each token comes out of `LOGITS`, as fractions."""
    generator = torch.Generator().manual_seed(5)
    tokens = sample(LOGITS.expand(n, -1), temperature=1.0, generator=generator, **how)
    return (torch.bincount(tokens, minlength=4) / n).tolist()


def test_temperature_zero_takes_the_largest_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    assert sample(logits).tolist() == [1, 0]


def test_tokens_come_as_often_as_their_probability_says():
    assert draws() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)  # 4 standard errors


def test_top_k_keeps_the_k_likeliest():
    assert draws(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)


def test_top_p_keeps_the_fewest_that_reach_p():
    # 0.4 + 0.3 reach 0.65; the third would not be needed
    assert draws(top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)


def test_top_p_always_keeps_one_token():
    assert draws(top_p=1e-9) == [0, 1, 0, 0]


@pytest.mark.parametrize("least", [1e-30, 1e-300, 5e-324])
def test_the_smallest_numbers_are_as_good_as_none(least):
    logits = torch.tensor([[1.0, 9.0, -float("inf")], [80.0, 79.999, 3.0]])
    for how in ({}, {"top_p": least}, {"top_k": 2}):
        assert sample(logits, temperature=least, **how).tolist() == [1, 0]
    assert draws(top_p=least) == [0, 1, 0, 0]


def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    generator = torch.Generator().manual_seed(0)
    many = LOGITS.expand(4000, -1)
    sharp = sample(many, temperature=0.25, generator=generator)
    flat = sample(many, temperature=100.0, generator=generator)
    # p ** 4: 0.0256 of 0.0354 in all
    assert (sharp == 1).float().mean().item() == pytest.approx(0.723, abs=0.03)
    assert (flat == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"top_k": 0}, "top_k is 0; at least one token must remain"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_values_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        sample(LOGITS, **wrong)
