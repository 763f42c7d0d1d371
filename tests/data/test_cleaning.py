import random

import pytest

from mptbook.data.cleaning import Cleaner, unfit
from mptbook.data.sources import Document

WORDS = "a hare ran over hills far away from here to there with old friends and new ones".split()


def text(n_words, seed=0):
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) + source.choice("aeiou") for _ in range(n_words))


def test_plain_prose_is_fit():
    assert unfit(text(200)) == unfit(text(3000)) == ""


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (text(199), "too short"),
        (text(50_001), "too long"),
        ("--------" + text(300).replace("a", "---"), "commonest character"),
        (
            " ".join(w + "!?;:,.'-"[n % 8] for n, w in enumerate(text(300).split())),
            "too few letters",
        ),
        (text(400) + " the" * 172, "a word too often"),  # 30.07 % of a long text
        (text(600) + " the" * 50, "a word too often"),  # 7.7 %
        (text(280) + " the" * 121, "a word too often"),  # 30.2 % of a short one
    ],
)
def test_what_mpt_7b_did_not_read_is_named(bad, reason):
    assert unfit(bad) == reason


def test_rules_hold_at_their_edges():
    assert unfit(text(555) + " the" * 45) == ""  # 7.5 % of 600
    assert unfit(text(350) + " the" * 150) == ""  # 30 % of 500, not yet long
    assert unfit(text(50_000)) == ""
    # 92 of 100 characters of each word are letters.
    word = "ab" * 46 + "!" * 8
    assert unfit(" ".join(word + "cd" * n for n in range(200))) == ""


def documents(*texts):
    return [Document(str(n), one) for n, one in enumerate(texts)]


def test_near_copies_are_dropped_and_the_first_is_kept():
    pytest.importorskip("datasketch")
    original, other = text(400, seed=1), text(400, seed=2)
    words = original.split()
    words[200] = "changed"
    edited = " ".join(words)  # five of 396 runs differ: 0.975 of what both have
    half = " ".join(original.split()[:200]) + " " + " ".join(other.split()[200:])
    cleaner = Cleaner(near_copies=0.8)
    kept = [d.name for d in cleaner.kept(documents(original, other, edited, half, original))]
    assert kept == ["0", "1", "3"]
    assert cleaner.dropped == {"near copy": 2}


def test_reasons_are_counted():
    cleaner = Cleaner(filtered=True)
    kept = list(cleaner.kept(documents(text(300), text(10), text(20), text(250))))
    assert [d.name for d in kept] == ["0", "3"]
    assert cleaner.dropped == {"too short": 2}


def test_without_rules_everything_is_kept():
    assert len(list(Cleaner().kept(documents("", "a", "a")))) == 3
