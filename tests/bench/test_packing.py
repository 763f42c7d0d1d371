import json

import datasets
import numpy as np
import pytest
import torch

from mptbook.__main__ import main
from mptbook.bench import packing
from mptbook.bench.packing import ALONE, CUT, WHOLE, batches, filling, layouts
from mptbook.data.packing import IGNORE

END = 0
DOCUMENTS = [[n] * n for n in (1, 2, 9, 3, 1, 5)]


def test_rows_by_hand():
    laid = layouts(DOCUMENTS, row_tokens=5, end_of_text=END)
    assert laid[ALONE].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [2, 2, 0, 0, 0, 0],
        [9, 9, 9, 9, 9, 9],
        [9, 9, 9, 9, 0, 0],  # shares a token with the row before
        [3, 3, 3, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [5, 5, 5, 5, 5, 0],
    ]
    assert filling(laid[ALONE], END) == (4 + 3 + 1 + 2 + 4) / 42
    assert filling(laid[CUT], END) == 0
    assert len(laid[WHOLE]) < len(laid[ALONE])
    assert 0 < filling(laid[WHOLE], END) < filling(laid[ALONE], END)


@pytest.mark.parametrize("way", [ALONE, WHOLE, CUT])
def test_every_token_is_a_target_whatever_the_way(way):
    rows = layouts(DOCUMENTS, row_tokens=5, end_of_text=END)[way]
    x, y, *documents = next(batches(rows, 400, END, way != CUT))
    assert x.shape == y.shape == (400, 5)
    told = y[y != IGNORE]
    if way != CUT:
        assert ((y == IGNORE) == (x == END)).all()
        assert documents[0].shape == x.shape
    assert set(told.tolist()) >= {0, 2, 3, 5, 9}


def test_two_series_of_batches_are_the_same():
    rows = np.arange(60).reshape(10, 6) + 1
    one, other = (batches(rows, 3, END, apart=False) for _ in range(2))
    assert all(torch.equal(next(one)[0], next(other)[0]) for _ in range(3))


def test_the_bench_writes_what_each_way_wastes(data, tmp_path, monkeypatch, capsys):
    texts = ["far away", "the hare ran over the hill and far away " * 3, "here"] * 9

    def load_domain(name, split):
        assert (name, split) == ("wiki", "train")
        return datasets.Dataset.from_dict({"text": texts})

    monkeypatch.setattr(packing, "load_domain", load_domain)
    monkeypatch.setattr(packing, "keep_freed_memory", lambda: True)  # of this process
    out = tmp_path / "packing.json"
    words = "--row-tokens", "32", "--batch-rows", "2", "--steps", "1", "--repeats", "2"
    assert main(["bench", "packing", "--tokenizer", str(data), *words, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    ways = found["ways"]
    assert found["documents"] == 27
    assert ways[ALONE]["rows"] > ways[WHOLE]["rows"] >= ways[CUT]["rows"]
    assert ways[ALONE]["filling"] > ways[WHOLE]["filling"] > ways[CUT]["filling"] == 0
    assert all(way["targets_per_second"] > 0 for way in ways.values())
    assert "filling" in capsys.readouterr().out
