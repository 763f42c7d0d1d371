import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook.infer.attend import KEYS, attend_texts
from mptbook.infer.compiled import pytorchs_threads
from mptbook.infer.decode import Cache, Shape
from mptbook.infer.emit import BF16_UNITS
from mptbook.infer.linear import bits_of
from mptbook.infer.steps import ROWS
from mptbook.model.alibi import alibi_slopes

needs_units = pytest.mark.skipif(not BF16_UNITS, reason="a processor with units for bfloat16")
DTYPES = [
    *[(torch.float32, kept) for kept in (torch.float32, torch.bfloat16, torch.int8)],
    *[
        pytest.param(torch.bfloat16, kept, marks=needs_units)
        for kept in (torch.bfloat16, torch.int8)
    ],
]


class Case:
    """Texts in slots of one cache, and what attention to them is."""

    def __init__(self, dtype, kept, texts, copies=2, heads=2, width=6, size=1.0, bias_max=8):
        generator = torch.Generator().manual_seed(len(texts) + width)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        n_rows, n_heads = sum(size for _, size in texts), copies * heads
        room = max(before + size for before, size in texts) + 3
        self.qkv = (size * normal(n_rows, (n_heads + 2 * heads) * width)).to(dtype)
        # Slot 0 and the first of two layers are not those that are asked for.
        shape = 2, len(texts) + 1, heads, room, width
        self.scales = [torch.empty(0, 0, 0, 0)] * 2
        if kept == torch.int8:
            self.kept = [normal(*shape).mul(40).clamp(-127, 127).to(kept) for _ in range(2)]
            self.scales = [0.02 * normal(*shape[:-1]).abs() for _ in range(2)]
        else:
            self.kept = [normal(*shape).to(kept) for _ in range(2)]
        self.texts, self.dtype = texts, dtype
        self.slopes = alibi_slopes(n_heads, bias_max)
        self.shape = Shape(n_heads, heads, width, 1e-5, False, math.inf, width**-0.5)

    def attended(self, windows=None):
        ends = np.cumsum([size for _, size in self.texts])
        spans = [
            (end - size, slot, before, size)
            for slot, (end, (before, size)) in enumerate(zip(ends, self.texts, strict=True), 1)
        ]
        out = torch.full(
            (len(self.qkv), self.shape.n_heads * self.shape.width), math.nan, dtype=self.dtype
        )
        windows = [10**6] * self.shape.kv_heads if windows is None else windows
        with pytorchs_threads():
            attend_texts(
                bits_of(self.qkv),
                Cache(*map(bits_of, self.kept), *map(bits_of, self.scales)),
                1,
                np.array(spans),
                self.slopes.numpy(),
                np.array(windows),
                self.shape,
                bits_of(out),
            )
        return out.double()

    def expected(self):
        """By the definition in float64, and how far from it the dtype may be."""
        found, row, largest, most = [], 0, 0.0, 0.0
        n_heads, width = self.shape.n_heads, self.shape.width
        for slot, (before, size) in enumerate(self.texts, 1):
            end = before + size
            k, v = (kept[1, slot, :, :end].double() for kept in self.kept)
            if self.scales[0].numel():
                k, v = (
                    x * scale[1, slot, :, :end, None].double()
                    for x, scale in zip((k, v), self.scales, strict=True)
                )
            copies = n_heads // len(k)
            k, v = (x.repeat_interleave(copies, 0) for x in (k, v))
            q = self.qkv[row : row + size, : n_heads * width].double()
            q = q.unflatten(1, (n_heads, width)).transpose(0, 1)
            distance = torch.arange(end) - torch.arange(before, end)[:, None]
            scores = q @ k.mT * self.shape.scale + self.slopes.double()[:, None, None] * distance
            weights = scores.masked_fill(distance > 0, -math.inf).softmax(-1)
            found.append((weights @ v).transpose(0, 1).flatten(1))
            row += size
            largest = max(largest, scores.abs().max().item())
            most = max(most, v.abs().max().item())
        # A score is rounded in float32, and so is what its exponential loses; in bfloat16 a
        # weight and a result have 8 bits.
        loss = 2**-7 if self.dtype == torch.bfloat16 else 2**-22 * (4 + largest)
        return torch.cat(found), loss * most

    def check(self, windows=None):
        expected, most = self.expected()
        torch.testing.assert_close(self.attended(windows), expected, rtol=0, atol=most)


@pytest.mark.parametrize(("dtype", "kept"), DTYPES)
@given(
    texts=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=3),
    copies=st.integers(1, 3),
    heads=st.integers(1, 2),
    width=st.integers(1, 70),
)
@settings(max_examples=25, deadline=None)
def test_it_is_the_softmax_of_scores_times_values(dtype, kept, texts, copies, heads, width):
    Case(dtype, kept, texts, copies, heads, width).check()


@pytest.mark.parametrize(("dtype", "kept"), DTYPES)
@pytest.mark.parametrize(
    ("before", "size"),
    [(KEYS - 1, 2), (KEYS, 1), (0, KEYS + ROWS + 1), (3 * KEYS - 5, KEYS + 11)],
)
def test_tiles_of_keys_are_put_together(dtype, kept, before, size):
    Case(dtype, kept, [(before, size), (0, 3)], bias_max=16).check()


@pytest.mark.parametrize(("dtype", "kept"), DTYPES)
def test_scores_may_be_far_apart(dtype, kept):
    # Of such scores the largest alone counts, wherever it stands; exp of them overflows.
    Case(dtype, kept, [(600, 20)], size=300.0).check()


def test_keys_beyond_the_window_are_not_looked_at():
    # The slopes are 2 ** -0.25 and less steep: after 120 tokens no weight is above 2 ** -80.
    case, window = Case(torch.float32, torch.float32, [(1500, 700)], bias_max=1), 120
    expected, most = case.expected()
    for kept in case.kept:
        kept[1, 1, :, : (1500 - window) // KEYS * KEYS] = math.nan
    found = case.attended([window, window])
    torch.testing.assert_close(found, expected, rtol=0, atol=most)
    assert case.attended().isnan().all()


def test_what_is_not_a_number_is_not_lost():
    case = Case(torch.float32, torch.float32, [(0, 9)], copies=1, heads=1)
    case.kept[0][1, 1, 0, 4, 0] = math.nan
    assert case.attended().isnan().any(1).tolist() == [False] * 4 + [True] * 5
