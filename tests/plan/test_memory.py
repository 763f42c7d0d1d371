"""Memory of a plan: by hand, by laws, and against what is known to have fitted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptbook.model.config import NAMED, MPTConfig
from mptbook.plan.costs import GIB, GPUS, parameters, training_bytes_per_parameter
from mptbook.plan.memory import (
    POLICIES,
    Setup,
    block_and_root,
    buffers_backwards,
    largest_micro_batch,
    logit_bytes,
    memory,
    moments,
    reserve,
    shortage,
)
from mptbook.plan.published import measured
from mptbook.plan.serving import serving

ODD = MPTConfig(d_model=6, n_heads=2, n_layers=3, vocab_size=11, expansion_ratio=2)
SEVEN = MPTConfig.named("mpt-7b")


def ran_with(row):
    precision = "pure" if row.gpu == "A100-40GB" else "default"
    return Setup(row.gpus, row.row_tokens, "adamw", precision, int(row.recomputed))


@pytest.mark.parametrize("row", measured(), ids=str)
def test_what_ran_fits(row):
    # Those programs held all logits at once. Ours does not: more may fit here, not less.
    assert largest_micro_batch(row.config, ran_with(row), GPUS[row.gpu]) >= row.micro_rows


def test_the_largest_micro_batches_that_ran_filled_the_memory_that_was_planned():
    """With all logits, 12 bytes each, which the plan's program does not keep.

    A plan that says far too little would pass the test above. Whoever chose these rows looked
    for the most that fits, so the fullest of each card must come near to the whole.
    """
    fullest = {}
    for row in measured():
        if row.micro_rows > 1 and row.size in ("7b", "13b", "30b"):
            tokens = row.micro_rows * row.row_tokens
            at_loss = moments(row.config, ran_with(row), row.micro_rows)["loss"]["total"]
            share = (at_loss + 12 * tokens * row.config.vocab_size) / GPUS[row.gpu].memory_bytes
            fullest[row.gpu] = max(share, fullest.get(row.gpu, 0))
    print(fullest)
    assert all(0.9 < share < 1.2 for share in fullest.values())


def test_mpt_30b_answers_on_the_cards_that_it_was_sized_for():
    config = MPTConfig.named("mpt-30b")
    assert serving(config, 8192, 16).held_by[0] == "A100-80GB"
    assert serving(config, 8192, 8).held_by[0] == "A100-40GB"


def test_seven_billion_are_finetuned_on_four_cards_of_40_gb_and_not_on_two():
    # llm-foundry's tutorial: at least four
    fits = [
        n for n in (1, 2, 4, 8) if largest_micro_batch(SEVEN, Setup(n, 2048), GPUS["A100-40GB"])
    ]
    assert fits == [4, 8]


def test_twelve_bytes_a_parameter_with_lion_as_the_tutorial_has_it():
    parts = memory(SEVEN, Setup(1, 2048), 1)
    owned = parts["weights"] + parts["gradients"] + parts["optimizer"]
    each = training_bytes_per_parameter("lion")
    assert owned == each * parameters(SEVEN)["total"] == 12 * parameters(SEVEN)["total"]


@pytest.mark.parametrize("name", NAMED)
def test_blocks_and_root_are_all(name):
    config = MPTConfig.named(name)
    block, root = block_and_root(config)
    parts = parameters(config)
    assert config.n_layers * block + root == parts["total"]
    assert root == parts["embedding"] + config.d_model  # and the last norm


def test_buffers_by_hand():
    # A block: attention 4 * 36, MLP 2 * 6 * 12, two norms of 6. Root: 11 words of 6, a norm.
    block, root = 144 + 144 + 12, 66 + 6
    assert block_and_root(ODD) == (block, root)
    pure = 2 * (block + block + root) + 2 * (block + root) + 2 * block
    assert buffers_backwards(ODD, Setup(2, 8)) == pure
    # gradients of the block once more, in float32
    assert buffers_backwards(ODD, Setup(2, 8, precision="default")) == pure + 2 * block


def test_one_gpu_in_full_gathers_nothing_and_copies_every_matrix():
    full = Setup(1, 8, precision="full", recompute=0)
    assert buffers_backwards(ODD, full) == 2 * 3 * (144 + 144)
    assert buffers_backwards(ODD, Setup(1, 8, precision="full")) == 2 * (144 + 144)


def test_logits_never_exceed_those_of_a_piece():
    pure = POLICIES["pure"]
    assert logit_bytes(SEVEN, 1024, pure) == logit_bytes(SEVEN, 1_000_000, pure)
    few = 14 * 3 * 11 + 6 * 66
    assert logit_bytes(ODD, 3, pure) == max(few, 10 * 66) == few


def test_a_plan_is_the_fuller_of_its_two_moments():
    for recompute in (0, 1):
        found = moments(SEVEN, Setup(8, 2048, recompute=recompute), 3)
        fuller = max(found.values(), key=lambda parts: parts["total"])
        assert memory(SEVEN, Setup(8, 2048, recompute=recompute), 3) == fuller
        for parts in found.values():
            assert sum(parts.values()) == 2 * parts["total"]


@given(
    st.sampled_from(list(NAMED)),
    st.integers(1, 300),
    st.sampled_from([1, 17, 2048]),
    st.sampled_from(list(GPUS)),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(list(POLICIES)),
)
def test_the_largest_micro_batch_fits_and_one_row_more_does_not(
    name, gpus, row_tokens, gpu, recompute, precision
):
    config, card = MPTConfig.named(name), GPUS[gpu]
    setup = Setup(gpus, row_tokens, precision=precision, recompute=recompute)
    most = largest_micro_batch(config, setup, card)
    if most:
        total = memory(config, setup, most)["total"]
        assert total + reserve(card) <= card.memory_bytes
    assert shortage(config, setup, card, most + 1) > 0


def test_more_gpus_never_need_more_memory():
    totals = [memory(SEVEN, Setup(n, 2048), 2)["total"] for n in (1, 2, 3, 8, 100, 440)]
    assert totals == sorted(totals, reverse=True)


def test_a_copy_of_the_weights_in_each_group_takes_what_the_group_takes_alone():
    grouped, alone = Setup(24, 512, shards=8), Setup(8, 512)
    assert memory(SEVEN, grouped, 2) == memory(SEVEN, alone, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be one of lion, adamw"),
        ({"precision": "bf16"}, "precision is 'bf16'; it must be one of full, default, pure"),
        ({"shards": 3}, "shards=3 does not divide gpus=8; .* take a divisor"),
    ],
)
def test_a_setup_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Setup(8, 2048, **change)


def test_a_reserve_is_left_on_every_card():
    assert reserve(GPUS["A100-80GB"]) == 5 * GIB
    assert all(GIB < reserve(gpu) < gpu.memory_bytes / 5 for gpu in GPUS.values())
