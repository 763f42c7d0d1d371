import json

import pytest
import torch

from mptbook.bench.norms import (
    COPY,
    KERNEL,
    KINDS,
    STREAMS,
    BenchNorms,
    block_and_input,
    forward,
    forward_backward,
    kept_bytes,
    norm_and_stream,
    read,
)
from mptbook.model.config import NORMS

N, D = 40, 96
streams = pytest.mark.parametrize("stream", STREAMS)


@streams
def test_the_kernel_gives_what_a_low_precision_layernorm_gives(stream):
    kernel, norm = (
        norm_and_stream(kind, stream, N, D) for kind in (KERNEL, "low_precision_layernorm")
    )
    # Both round the same numbers of float32, which may differ in their last bit.
    torch.testing.assert_close(forward(*kernel), forward(*norm), rtol=2**-7, atol=0.0)


@streams
def test_the_kernel_gives_the_gradient_of_the_stream_too(stream):
    kernel, norm = (
        forward_backward(*norm_and_stream(kind, stream, N, D))
        for kind in (KERNEL, "low_precision_layernorm")
    )
    # It keeps mean and spread of each row in bfloat16.
    assert (kernel[0] - norm[0]).norm() < 2 * 2**-8 * forward_size(stream)


def forward_size(stream):
    """Length of the gradient of the output, which that of the input does not exceed by much."""
    return norm_and_stream(COPY, stream, N, D)[1].float().norm()


@streams
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_layer_reads_bfloat16_from_every_kind(kind, stream):
    norm, x = norm_and_stream(kind, stream, N, D)
    y = read(norm, x)
    assert (y.dtype, y.shape) == (torch.bfloat16, (N, D))
    gradients = forward_backward(norm, x)
    assert gradients[0].dtype == x.dtype == STREAMS[stream]
    assert all(g.isfinite().all() for g in gradients)


def test_all_kinds_normalise_the_same_stream_with_the_same_weights():
    assert norm_and_stream(COPY, "float32", N, D)[1].equal(
        norm_and_stream("rmsnorm", "float32", N, D)[1]
    )
    weights = [norm_and_stream(k, "float32", N, D)[0].weight for k in (*NORMS, KERNEL)]
    assert all(torch.equal(weight, weights[0]) for weight in weights)


@pytest.mark.parametrize(
    ("kind", "stream", "per_number", "per_row"),
    [
        (COPY, "float32", 2, 0),  # what the next layer reads
        (COPY, "bfloat16", 2, 0),
        (KERNEL, "float32", 2 + 2, 2 * 2),  # a rounded stream, the output; mean and spread
        (KERNEL, "bfloat16", 2 + 2, 2 * 2),
        ("layernorm", "float32", 4 + 2, 2 * 4),  # the stream itself, the output as it is read
        ("layernorm", "bfloat16", 4 + 2, 2 * 4),
    ],
)
def test_bytes_kept_are_those_counted_by_hand(kind, stream, per_number, per_row):
    kept = kept_bytes(*norm_and_stream(kind, stream, N, D))
    weight = 4 * D  # in float32, where the norm has a copy of its own
    assert 0 <= kept - (per_number * N * D + per_row * N) <= weight


def test_a_block_runs_with_every_norm_on_the_same_stream():
    made = {kind: block_and_input(kind, 128, 9) for kind in NORMS}
    assert all(torch.equal(x, made["rmsnorm"][1]) for _, x, _ in made.values())
    out = [block(x, slopes) for block, x, slopes in made.values()]
    torch.testing.assert_close(out[0], out[1])  # without autocast precision makes no difference
    assert not torch.equal(out[0], out[2])


def test_the_bench_writes_every_figure(tmp_path, capsys):
    out = tmp_path / "norms.json"
    settings = BenchNorms(widths=[64, 128], rows=8, block_tokens=4, repeats=1, out=out)
    settings.run()
    found = json.loads(out.read_text())
    assert found["norms"].keys() == STREAMS.keys()
    for by_kind in found["norms"].values():
        assert by_kind.keys() == set(KINDS)
        for figures in by_kind.values():
            for by_width in figures.values():
                assert by_width.keys() == {"64", "128"}
                assert all(value > 0 for value in by_width.values())
    assert found["block"]["seconds"].keys() == set(NORMS)
    assert "a whole block, 64 wide" in capsys.readouterr().out
