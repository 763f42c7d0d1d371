"""ONNX: one graph that reads prompts and writes tokens, keys and values going in and coming out.

Inputs are `input_ids` (B, T) and `attention_mask` (B, P + T), int64, the mask 0 for padding; and
for each layer `past_key_values.N.key` and `.value` (B, G, P, K), what `present.N.key` and
`.value` (B, G, P + T, K) were after the tokens before. P is 0 at first. `logits` are (B, T, V).
B, T and P may differ from call to call. These are the names that other exporters use. Weights
lie beside the graph, in `model.onnx.data`, under the names that they have in the model.

Dimensions in this file
    B   batch
    T   tokens given now
    P   tokens given before
    D   width of the residual stream
    H   attention heads;  G  key and value heads
    K   width of a head
    V   vocabulary

Source: the operators of ONNX, opset 23, the first that has attention as one of them.
"""

from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from mptbook.export.source import copy_about, described
from mptbook.export.verify import Written, engine
from mptbook.model.attention import Attention
from mptbook.model.mpt import MPT, Block
from mptbook.model.norms import Norm
from mptbook.weights import finite, read_weights

DTYPES = ("float32",)
OPSET = 23
GRAPH, DATA = "model.onnx", "model.onnx.data"
ALIGN = 4096  # bytes: a weight starts with a page of memory, so that it can be mapped


def write(folder: Path, out: Path, dtype: str) -> None:
    """Write the model of a directory into the folder `out`, one weight in memory at a time.

    Args:
        folder: a model directory.
        out: a folder that is there; it also gets copies of tokenizer and configuration.
        dtype: float32.

    Raises:
        ValueError: for another dtype, for what is no MPT's directory, or without `onnx`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; onnx has {' and '.join(DTYPES)}")
    onnx = engine("onnx")
    model = described(folder, "onnx")
    graph = Graph(onnx)
    with (out / DATA).open("wb") as data:
        for name, weight in read_weights(folder, model):
            graph.store(name, finite(name, weight), data)
    _draw(graph, model)
    onnx.save(graph.model(), out / GRAPH)
    copy_about(folder, out)


def greedy(out: Path, ids: list[int], new_tokens: int) -> Written:
    """What onnxruntime writes, the likeliest token at each place, with the cache.

    Raises:
        ValueError: without `onnxruntime`.
    """
    session = engine("onnxruntime").InferenceSession(out / GRAPH)
    cache = session.get_inputs()[2:]
    past = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), "f4") for each in cache}
    given, written = ids, []
    for step in range(new_tokens):
        seen = np.ones((1, len(ids) + step), np.int64)
        inputs = {"input_ids": np.array([given]), "attention_mask": seen}
        logits, *present = session.run(None, inputs | past)
        past = dict(zip(past, present, strict=True))
        logs = torch.from_numpy(logits[0, -1]).log_softmax(-1)
        given = [int(logs.argmax())]
        written.append((given[0], float(logs[given[0]])))
    return written


class Graph:
    """Nodes in the order in which they are computed, and the tensors that they read."""

    def __init__(self, onnx: ModuleType) -> None:
        self.onnx, self.helper, self.types = onnx, onnx.helper, onnx.TensorProto
        self.nodes: list = []
        self.inputs: list = []
        self.outputs: list = []
        self.tensors: dict[str, Any] = {}

    def nodes_of(self, kind: str, inputs: tuple[str, ...], names: list[str], **how: Any) -> None:
        self.nodes.append(self.helper.make_node(kind, inputs, names, names[0], **how))

    def op(self, kind: str, *inputs: str, name: str = "", **how: Any) -> str:
        """Add a node of one output; the name of that."""
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes_of(kind, inputs, [name], **how)
        return name

    def constant(self, value: Any, dtype: type = np.int64, name: str = "") -> str:
        """The name of a number, or of an array of them."""
        array = np.asarray(value, dtype)
        name = name or f"{array.dtype}_{array.tolist()}".replace(" ", "")
        self.tensors.setdefault(name, self.onnx.numpy_helper.from_array(array, name))
        return name

    def number(self, value: float) -> str:
        return self.constant(value, np.float32)

    def declare(self, where: list, name: str, shape: tuple, kind: str = "FLOAT") -> str:
        """Name an input or output of the graph."""
        kind = getattr(self.types, kind)
        where.append(self.helper.make_tensor_value_info(name, kind, shape))
        return name

    def store(self, name: str, weight: Tensor, data: BinaryIO) -> None:
        """Append a float32 weight to the file `data`, and note where it lies."""
        if weight.dim() == 2 and "blocks" in name:
            weight = weight.T  # ONNX multiplies from the right
        values = weight.contiguous().numpy()
        data.write(bytes(-data.tell() % ALIGN))
        tensor = self.types(name=name, dims=values.shape, data_type=self.types.FLOAT)
        tensor.data_location = self.types.EXTERNAL
        place = {"location": DATA, "offset": data.tell(), "length": values.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        values.tofile(data)
        self.tensors[name] = tensor

    def model(self) -> Any:
        tensors = [*self.tensors.values()]
        graph = self.helper.make_graph(self.nodes, "mpt", self.inputs, self.outputs, tensors)
        opsets = [self.helper.make_opsetid("", OPSET)]
        oldest = self.helper.find_min_ir_version_for(opsets)
        return self.helper.make_model(
            graph, opset_imports=opsets, ir_version=oldest, producer_name="mptbook"
        )


def _draw(graph: Graph, model: MPT) -> None:
    """`MPT.forward`, node by node."""
    config, op = model.config, graph.op
    ids = graph.declare(graph.inputs, "input_ids", ("batch", "tokens"), "INT64")
    mask = graph.declare(graph.inputs, "attention_mask", ("batch", "past + tokens"), "INT64")
    graph.declare(graph.outputs, "logits", ("batch", "tokens", config.vocab_size))
    x = op("Gather", "transformer.wte.weight", ids)
    if config.has_positions:
        x = op("Add", x, op("Gather", "transformer.wpe.weight", _positions(graph, ids, mask)))
    bias = _bias(graph, ids, mask, model.slopes)
    for layer, block in enumerate(model.transformer.blocks):
        x = _block(graph, x, bias, block, f"transformer.blocks.{layer}.")
    x = _norm(graph, x, model.transformer.norm_f, "transformer.norm_f")
    head = "transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    x = op("MatMul", x, op("Transpose", head, perm=[1, 0]))
    op("Mul", x, graph.number(config.logit_factor), name="logits")


def _bias(graph: Graph, ids: str, mask: str, slopes: Tensor) -> str:
    """(B, H, T, P + T): what to add to scores, see `mptbook.model.alibi.alibi_bias`.

    Padding sees padding, and only that: it counts as a document of its own.
    """
    op, axis = graph.op, graph.constant
    first, end = _given(graph, ids, mask)
    keys = op("Range", axis(0), op("Squeeze", end), axis(1))
    queries = op("Unsqueeze", op("Slice", keys, first, end), axis([1]))
    distance = op("Sub", queries, keys)  # (T, P + T), negative in the future
    own = op("Slice", mask, first, end, axis([1]))
    same = op("Equal", op("Unsqueeze", own, axis([2])), op("Unsqueeze", mask, axis([1])))
    seen = op("And", op("GreaterOrEqual", distance, axis(0)), same)  # (B, T, P + T)
    gain = graph.constant(-slopes[:, None, None].numpy(), np.float32, "minus_slopes")
    gain = op("Mul", gain, op("Cast", distance, to=graph.types.FLOAT))  # (H, T, P + T)
    return op("Where", op("Unsqueeze", seen, axis([1])), gain, graph.number(-np.inf))


def _positions(graph: Graph, ids: str, mask: str) -> str:
    """(B, T): how many tokens that are no padding lie before each."""
    one = graph.constant(1)
    before = graph.op("Sub", graph.op("CumSum", mask, one), mask)
    return graph.op("Slice", before, *_given(graph, ids, mask), graph.constant([1]))


def _given(graph: Graph, ids: str, mask: str) -> tuple[str, str]:
    """P and P + T, (1,) each: among all tokens, where those given now begin and end."""
    end = graph.op("Shape", mask, start=1)
    return graph.op("Sub", end, graph.op("Shape", ids, start=1)), end


def _block(graph: Graph, x: str, bias: str, block: Block, path: str) -> str:
    normed = _norm(graph, x, block.norm_1, f"{path}norm_1")
    x = graph.op("Add", x, _attention(graph, normed, bias, block.attn, f"{path}attn."))
    normed = _norm(graph, x, block.norm_2, f"{path}norm_2")
    up = graph.op("Gelu", _linear(graph, normed, block.ffn.up_proj, f"{path}ffn.up_proj"))
    down = _linear(graph, up, block.ffn.down_proj, f"{path}ffn.down_proj")
    return graph.op("Add", x, down)


def _attention(graph: Graph, x: str, bias: str, attn: Attention, path: str) -> str:
    qkv = _linear(graph, x, attn.Wqkv, f"{path}Wqkv")
    if attn.clip is not None:
        qkv = graph.op("Clip", qkv, graph.number(-attn.clip), graph.number(attn.clip))
    q, k, v = (f"{path}{part}" for part in "qkv")
    graph.nodes_of("Split", (qkv, graph.constant(attn.splits)), [q, k, v], axis=2)
    if attn.q_ln is not None:
        q = _norm(graph, q, attn.q_ln, f"{path}q_ln")
        k = _norm(graph, k, attn.k_ln, f"{path}k_ln")
    past, present = (_cache(graph, attn, way) for way in ("past_key_values", "present"))
    heads = {"q_num_heads": attn.n_heads, "kv_num_heads": attn.kv_heads, "scale": attn.scale}
    inputs = q, k, v, bias, *past
    graph.nodes_of("Attention", inputs, [f"{path}mixed", *present], **heads)
    return _linear(graph, f"{path}mixed", attn.out_proj, f"{path}out_proj")


def _cache(graph: Graph, attn: Attention, way: str) -> list[str]:
    """Keys and values of a layer, (B, G, P, K) as inputs or (B, G, P + T, K) as outputs."""
    where, length = {
        "past_key_values": (graph.inputs, "past"),
        "present": (graph.outputs, "past + tokens"),
    }[way]
    shape = "batch", attn.kv_heads, length, attn.width
    names = [f"{way}.{attn.layer}.{part}" for part in ("key", "value")]
    return [graph.declare(where, name, shape) for name in names]


def _linear(graph: Graph, x: str, linear: nn.Linear, path: str) -> str:
    product = graph.op("MatMul", x, f"{path}.weight")
    return product if linear.bias is None else graph.op("Add", product, f"{path}.bias")


def _norm(graph: Graph, x: str, norm: Norm, path: str) -> str:
    kind = "RMSNormalization" if norm.rms else "LayerNormalization"
    bias = () if norm.bias is None else (f"{path}.bias",)
    return graph.op(kind, x, f"{path}.weight", *bias, epsilon=norm.eps)
