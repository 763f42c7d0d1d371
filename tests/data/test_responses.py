import numpy as np
import torch

from mptbook.data.loader import batches
from mptbook.data.packing import IGNORE
from mptbook.data.responses import ResponseRows, apart, pack_conversations

END = 0
EXAMPLES = [
    ([5, 6, 7, END], [False, False, True, True]),
    ([8, 9, END], [False, True, True]),
    ([4, 3, 2, 1, 9, END], [False, True, True, False, True, True]),
]


def read(rows):
    block = torch.from_numpy(rows.astype(np.int64))
    return apart(block[:, :-1], block[:, 1:])


def test_rows_keep_conversations_and_what_is_learned_of_them():
    rows = pack_conversations(EXAMPLES, row_tokens=8, end_of_text=END)
    inputs, targets, documents = read(rows)
    assert inputs.tolist() == [[4, 3, 2, 1, 9, 0, 8, 9], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert documents.tolist() == [[1, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2, 2, 2]]
    _ = IGNORE
    assert targets.tolist() == [[3, 2, _, 9, 0, _, 9, 0], [_, 7, 0, _, _, _, _, _]]


def test_the_order_and_mixture_of_prepared_rows_are_theirs_too():
    rows = ResponseRows(
        {name: pack_conversations([one], 6, END) for name, one in zip("abc", EXAMPLES, strict=True)}
    )
    assert rows.domains == {"a": range(1), "b": range(1, 2), "c": range(2, 3)}
    assert rows.learned == 2 + 2 + 4
    seen = set()
    stream = batches(rows, 3, seed=7)
    for x, y in (next(stream), next(stream)):
        seen.add(tuple(apart(x, y)[0][:, 0].tolist()))
    assert all(sorted(firsts) == [4, 5, 8] for firsts in seen)
