import sys

import numpy as np
import onnx as library
import onnxruntime
import pytest
import torch
from exported_model import PROMPT, UNUSUAL, make

from mptbook import load_model
from mptbook.export import onnx
from mptbook.export.verify import compared
from mptbook.infer.load import save_packed

MORE = {
    "kv_heads=1": {"attn_type": "multiquery_attention", "qk_ln": True},
    "7_heads": {"n_heads": 7, "d_model": 91},  # slopes of every second power
    "rmsnorm_everywhere": {"norm_type": "low_precision_rmsnorm", "no_bias": False, "qk_ln": True},
    "positions_of_GPT": {"alibi": False, "no_bias": False, "logit_scale": "inv_sqrt_d_model"},
}
SHAPES = {"as_mpt_7b": {}} | UNUSUAL | MORE
EVERY = pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
SOME = pytest.mark.parametrize(
    "fields", [{}, UNUSUAL["alibi"], UNUSUAL["kv_n_heads"]], ids=["alibi", "table", "grouped"]
)


def export(folder, **fields):
    """A model in float64, and what onnxruntime makes of its export in float32.

    The latter takes ids, past and mask, and gives logits and the next past.
    """
    make(folder / "m", **fields)
    onnx.write(folder / "m", folder, "float32")
    session = onnxruntime.InferenceSession(folder / onnx.GRAPH)
    cache = session.get_inputs()[2:]

    def run(ids, past=None, mask=None):
        if past is None:
            past = [np.zeros((len(ids), x.shape[1], 0, x.shape[3]), np.float32) for x in cache]
        if mask is None:
            mask = np.ones((len(ids), past[0].shape[2] + ids.shape[1]), np.int64)
        inputs = {"input_ids": np.asarray(ids), "attention_mask": np.asarray(mask)}
        named = {each.name: values for each, values in zip(cache, past, strict=True)}
        logits, *present = session.run(None, inputs | named)
        return torch.from_numpy(logits), present

    return load_model(folder / "m", torch.float64, attn_impl="reference"), run


def random_ids(batch, n_tokens):
    return torch.randint(320, (batch, n_tokens), generator=torch.manual_seed(n_tokens))


def near(found, expected):
    """Logits of size 20 of weights so large that ours are 6e-4 off in float32, too."""
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)


@EVERY
@torch.inference_mode()
def test_whatever_the_shape_a_text_read_in_pieces_has_the_logits_of_ours(tmp_path, fields):
    model, run = export(tmp_path, **fields)
    ids, past, start = random_ids(3, 31), None, 0
    expected = model(ids)
    for end in (17, 18, 19, 31):  # past of none, then of many; one token, and several
        logits, past = run(ids[:, start:end], past)
        near(logits, expected[:, start:end])
        assert [each.shape[:3] for each in past] == [(3, model.config.kv_heads, end)] * 4
        start = end


@EVERY
@torch.inference_mode()
def test_its_float32_is_as_near_to_float64_as_ours(tmp_path, fields):
    model, run = export(tmp_path, **fields)
    ids = random_ids(3, 128)
    exact, (found, _), ours = model(ids), run(ids), load_model(tmp_path / "m")(ids)
    # The largest of 122,880 differences is luck, within a factor of two.
    assert (found - exact).abs().max() < 3 * (ours - exact).abs().max() < 3e-3


@SOME
@pytest.mark.parametrize("cuts", [(1,), (128,), (1, 2), (1, 9), (40, 41, 90)])
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_batch_tokens_and_past_are_any(tmp_path, fields, batch, cuts):
    model, run = export(tmp_path, **fields)
    ids, past, found = random_ids(batch, cuts[-1]), None, []
    for start, end in zip((0, *cuts), cuts, strict=False):
        logits, past = run(ids[:, start:end], past)
        found.append(logits)
    near(torch.cat(found, 1), model(ids))


@torch.inference_mode()
def test_with_alibi_a_text_goes_on_beyond_the_length_of_training(tmp_path):
    model, run = export(tmp_path)
    ids = random_ids(1, 300)  # of a model for 128
    _, past = run(ids[:, :290])
    near(run(ids[:, 290:], past)[0], model(ids)[:, 290:])


def test_a_table_of_positions_that_ends_is_an_error_and_no_answer(tmp_path):
    _, run = export(tmp_path, **UNUSUAL["alibi"])
    run(random_ids(1, 128))
    with pytest.raises(Exception, match="out of data bounds"):
        run(random_ids(1, 129))


@SOME
@torch.inference_mode()
def test_padding_on_the_left_changes_nothing(tmp_path, fields):
    model, run = export(tmp_path, **fields)
    short, long = random_ids(1, 9), random_ids(1, 14)
    ids = torch.cat([torch.nn.functional.pad(short, (5, 0)), long])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits, past = run(ids[:, :12], None, mask[:, :12])
    found = torch.cat([logits, run(ids[:, 12:], past, mask)[0]], 1)
    assert found.isfinite().all()
    near(found[:1, 5:], model(short))
    near(found[1:], model(long))


def test_the_likeliest_tokens_are_ours_with_our_log_probabilities(tmp_path):
    folder = make(tmp_path / "m")
    onnx.write(folder, tmp_path, "float32")
    found = compared(folder, PROMPT, onnx.greedy(tmp_path, PROMPT, 12))
    assert (found.tokens, found.same) == (12, 12)
    assert found.difference < 1e-4


@EVERY
def test_the_checker_of_the_format_accepts_the_graph_and_weights_begin_with_a_page(
    tmp_path, fields
):
    make(tmp_path / "m", **fields)
    onnx.write(tmp_path / "m", tmp_path, "float32")
    library.checker.check_model(tmp_path / onnx.GRAPH, full_check=True)
    graph = library.load(tmp_path / onnx.GRAPH, load_external_data=False).graph
    weights = [tensor for tensor in graph.initializer if tensor.external_data]
    assert {tensor.name for tensor in weights} == {*load_model(tmp_path / "m").state_dict()}
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in weights]
    assert all(int(place["offset"]) % 4096 == 0 for place in places)
    assert (tmp_path / onnx.GRAPH).stat().st_size < 50_000


def test_inputs_and_outputs_have_the_names_that_other_exporters_use(tmp_path):
    make(tmp_path / "m")
    onnx.write(tmp_path / "m", tmp_path, "float32")
    graph = library.load(tmp_path / onnx.GRAPH, load_external_data=False).graph
    parts = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    cache = [f"past_key_values.{part}" for part in parts]
    assert [each.name for each in graph.input] == ["input_ids", "attention_mask", *cache]
    assert [each.name for each in graph.output] == ["logits", *(f"present.{x}" for x in parts)]


def test_weights_of_sixteen_bits_are_widened_and_the_tokenizer_goes_along(tmp_path):
    folder, out = make(tmp_path / "m", torch.bfloat16), tmp_path / "o"
    out.mkdir()
    onnx.write(folder, out, "float32")
    model = load_model(folder)
    stored = {tensor.name: tensor for tensor in library.load(out / onnx.GRAPH).graph.initializer}
    for name, weight in model.named_parameters():
        found = torch.tensor(library.numpy_helper.to_array(stored[name]))
        linear = name.endswith("weight") and "blocks" in name and weight.dim() == 2
        assert torch.equal(found.T if linear else found, weight.float())
    about = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in out.iterdir()) == sorted([*about, onnx.GRAPH, onnx.DATA])
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    folder = make(tmp_path / "m")
    save_packed(folder, tmp_path / "packed", 8)
    with pytest.raises(ValueError, match=r"^dtype is 'float8'; onnx has float32$"):
        onnx.write(folder, tmp_path, "float8")
    with pytest.raises(ValueError, match=r"^.*packed in fewer bits.*$"):
        onnx.write(tmp_path / "packed", tmp_path, "float32")
    onnx.write(folder, tmp_path, "float32")
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (onnx.write, folder, tmp_path, "float32"), (onnx.greedy, tmp_path, [1], 1):
        with pytest.raises(ValueError, match=r"^.*pip install 'mptbook\[export\]'.*$"):
            call[0](*call[1:])
