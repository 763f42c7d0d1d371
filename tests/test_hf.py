import copy
import dataclasses
import json
import warnings

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MptConfig,
    StaticCache,
    pipeline,
)
from transformers import MptForCausalLM as Theirs

from mptbook.hf import HFConfig, MPTForCausalLM, load_model, save_model
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer

SHAPE = MPTConfig(d_model=42, n_heads=6, n_layers=2, vocab_size=101, max_seq_len=63)
EXTRAS = SHAPE.replace(
    no_bias=False,
    tie_word_embeddings=False,
    qk_ln=True,
    alibi_bias_max=16,
    expansion_ratio=1.5,
    attn_type="grouped_query_attention",
    kv_n_heads=2,
)
POSITIONS = SHAPE.replace(alibi=False)
SHAPES = pytest.mark.parametrize(
    "shape", [SHAPE, EXTRAS, POSITIONS], ids=["mpt", "all the extras", "learned positions"]
)
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


def build(shape=SHAPE):
    torch.manual_seed(0)
    return MPTForCausalLM(HFConfig.of(shape)).eval()


def tokens(*shape, seed=1):
    return torch.randint(1, 101, shape, generator=torch.Generator().manual_seed(seed))


def ours_of(theirs):
    """Our model with their weights and their configuration."""
    config = MPTConfig.from_hf(theirs.config.to_dict())
    ours = MPTForCausalLM(HFConfig.of(config)).eval()
    weights = theirs.state_dict()
    del weights["lm_head.weight"]
    ours.load_state_dict(weights)
    return ours


@settings(deadline=None, max_examples=60)
@given(
    width=st.sampled_from([1, 3, 8, 10]),
    n_heads=st.sampled_from([1, 2, 3, 5, 6, 8, 12]),
    n_layers=st.integers(1, 3),
    n_tokens=st.integers(1, 40),
    clip_qkv=st.none() | st.floats(0.1, 2),
    softmax_scale=st.none() | st.floats(0.1, 2),
    epsilon=st.sampled_from([1e-5, 1e-3]),
    seed=st.integers(0, 99),
)
def test_logits_equal_those_of_transformers(
    width, n_heads, n_layers, n_tokens, clip_qkv, softmax_scale, epsilon, seed
):
    torch.manual_seed(seed)
    theirs = Theirs(
        MptConfig(
            d_model=width * n_heads,
            n_heads=n_heads,
            n_layers=n_layers,
            vocab_size=101,
            max_seq_len=40,
            layer_norm_epsilon=epsilon,
            attn_config={"clip_qkv": clip_qkv, "softmax_scale": softmax_scale},
        )
    ).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # their 0.02 leaves nothing to compare
    ids = tokens(2, n_tokens, seed=seed)
    expected = theirs(ids).logits
    torch.testing.assert_close(ours_of(theirs)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_greedy_generation_equals_that_of_transformers():
    torch.manual_seed(0)
    theirs = Theirs(
        MptConfig(d_model=42, n_heads=6, n_layers=2, vocab_size=101, max_seq_len=63)
    ).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ours = ours_of(theirs)
    for n_tokens in (1, 7, 20):
        ids = tokens(3, n_tokens)
        assert torch.equal(ours.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    "changes",
    [
        {"alibi_bias_max": 16},
        {"alibi": False, "learned_pos_emb": False},
        {"logit_scale": 0.5},
        {"norm_type": "rmsnorm"},
    ],
)
def test_fields_that_transformers_passes_over_count_here(changes):
    weights = build().state_dict()
    model = MPTForCausalLM(HFConfig.of(SHAPE.replace(**changes))).eval()
    model.load_state_dict(weights)
    assert (model(tokens(2, 17)).logits - build()(tokens(2, 17)).logits).abs().max() > 1e-3


@SHAPES
def test_the_adapter_gives_the_logits_of_the_model(shape):
    model = build(shape)
    assert torch.equal(model(tokens(2, 17)).logits, model.mpt(tokens(2, 17)))


@SHAPES
def test_padding_on_either_side_changes_nothing(shape):
    model = build(shape)
    ids = tokens(1, 11)
    expected = model(ids).logits
    pad, seen, hidden = tokens(1, 6, seed=2), torch.ones(1, 11), torch.zeros(1, 6)
    left = model(torch.cat([pad, ids], 1), attention_mask=torch.cat([hidden, seen], 1))
    right = model(torch.cat([ids, pad], 1), attention_mask=torch.cat([seen, hidden], 1))
    torch.testing.assert_close(left.logits[:, 6:], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(right.logits[:, :11], expected, rtol=1e-5, atol=1e-5)
    assert left.logits.isfinite().all()
    assert right.logits.isfinite().all()


def test_padding_gets_no_gradient_from_the_tokens():
    model = build(EXTRAS)
    ids = torch.cat([torch.zeros(1, 6, dtype=torch.long), tokens(1, 11)], 1)
    mask = torch.tensor([[0] * 6 + [1] * 11])
    labels = ids.clone()
    labels[:, :7] = -100  # the first token too: it is the last pad's target
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert (model.transformer.wte.weight.grad[0] == 0).all()


def test_positions_that_start_again_keep_documents_apart():
    model = build()
    ids = tokens(1, 17)
    positions = torch.tensor([[*range(5), *range(12)]])
    packed = model(ids, position_ids=positions).logits
    assert torch.equal(packed, model(ids, documents=torch.tensor([[0] * 5 + [1] * 12])).logits)
    torch.testing.assert_close(packed[:, 5:], model(ids[:, 5:]).logits, rtol=1e-5, atol=1e-5)


@SHAPES
def test_generation_with_a_cache_equals_generation_without(shape):
    model = build(shape)
    expected = model.generate(tokens(3, 7), use_cache=False, **GREEDY)
    assert torch.equal(model.generate(tokens(3, 7), **GREEDY), expected)
    static = model.generate(tokens(3, 7), cache_implementation="static", **GREEDY)
    assert torch.equal(static, expected)


@SHAPES
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(shape, cache):
    model = build(shape)
    prompts = [tokens(1, n, seed=n) for n in (3, 9, 1)]
    padded = torch.cat([torch.nn.functional.pad(p, (9 - p.shape[1], 0)) for p in prompts])
    together = model.generate(padded, attention_mask=(padded != 0).long(), **cache, **GREEDY)
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(prompt, **GREEDY)[0, prompt.shape[1] :]
        assert torch.equal(row[9:], alone)


def test_a_cache_is_used_unless_the_caller_says_no():
    released = HFConfig.of(SHAPE).to_dict() | {"use_cache": False}  # as in every released file
    model = MPTForCausalLM(HFConfig(**released)).eval()
    lengths = []
    model.transformer.wte.register_forward_hook(lambda _m, ids, _x: lengths.append(ids[0].shape[1]))
    model.generate(tokens(1, 7), **(GREEDY | {"max_new_tokens": 3}))
    assert lengths == [7, 1, 1]


def test_a_static_cache_can_be_filled_in_pieces():
    model = build()
    ids = tokens(2, 17)
    cache = StaticCache(config=model.config, max_cache_len=29)
    pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(7, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=1e-5, atol=1e-5)


def test_beams_find_nothing_less_likely_than_greedy_does():
    model = build()
    ids = tokens(2, 7)

    def log_probability(rows):
        scores = model(rows).logits.log_softmax(-1)[:, 6:-1]
        return scores.gather(2, rows[:, 7:, None]).sum(dim=(1, 2))

    beams = model.generate(ids, num_beams=5, length_penalty=0.0, **GREEDY)
    assert (log_probability(beams) >= log_probability(model.generate(ids, **GREEDY)) - 1e-4).all()


def test_sampling_follows_its_seed():
    model = build()
    rows = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        rows.append(model.generate(tokens(2, 7), **(GREEDY | {"do_sample": True, "top_k": 50})))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_the_loss_is_the_mean_over_the_shifted_labels():
    model = build()
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    total = model.mpt.loss(ids[:, :-1], labels[:, 1:])
    n_targets = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels).loss, total / n_targets)
    told = model(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss  # as Trainer does
    torch.testing.assert_close(told, total / 40)


def test_only_the_logits_asked_for_are_computed():
    model = build()
    whole = model(tokens(2, 9)).logits
    last = model(tokens(2, 9), logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = build(EXTRAS.replace(resid_pdrop=0.2)).train()
    ids = tokens(2, 17)
    gradients = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        assert model.is_activation_checkpointing == model.mpt.recompute == enable
        model.zero_grad()
        torch.manual_seed(3)
        model(ids, labels=ids, use_cache=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert model(ids, use_cache=True).past_key_values is None  # it would be filled twice
    model.activation_checkpointing_disable()
    assert not model.mpt.recompute


@SHAPES
def test_the_forward_compiles_into_one_graph(shape):
    torch.compiler.reset()  # each shape starts with no graphs of another
    model = build(shape)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[0, :5] = 0
    for how in ({}, {"attention_mask": mask}, {"labels": ids}):
        how = how | {"use_cache": False}
        expected = model(ids, **how).logits
        torch.testing.assert_close(compiled(ids, **how).logits, expected, rtol=1e-5, atol=1e-5)


@SHAPES
def test_parameters_have_the_released_names(shape):
    assert list(build(shape).state_dict()) == list(MPT(shape).state_dict())


@SHAPES
@pytest.mark.parametrize("shards", ["1GB", "30KB"])
def test_a_model_survives_save_pretrained(tmp_path, shape, shards, caplog):
    model = build(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, max_shard_size=shards)
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert isinstance(again, MPTForCausalLM)
    assert again.config.shape == shape
    ids = tokens(2, 17)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(load_model(tmp_path)(ids), model(ids).logits)


@SHAPES
def test_a_model_directory_is_what_auto_classes_read(tmp_path, shape):
    save_model(build(shape).mpt, tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), HFConfig)
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.mpt.slopes, build(shape).mpt.slopes)
    expected = build(shape).bfloat16()(tokens(2, 17)).logits
    assert torch.equal(again(tokens(2, 17)).logits, expected)


def test_a_checkpoint_of_transformers_loads_without_a_word_about_its_head(tmp_path):
    Theirs(MptConfig(d_model=42, n_heads=6, n_layers=2, vocab_size=101)).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(
        ValueError, match=r"the checkpoint lacks lm_head.weight of shape \(101, 42\)"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_both_ways_to_save_write_the_same_configuration(tmp_path):
    model = build(EXTRAS)
    save_model(model.mpt, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    ours, theirs = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ab")
    assert {key: theirs.get(key) for key in ours} == ours
    more = set(theirs) - set(ours)
    assert not more & {field.name for field in dataclasses.fields(MPTConfig)}


def test_the_slopes_follow_the_weights_from_device_to_device():
    model = build()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = tokens(2, 17)
    expected = model(ids).logits
    model.to("meta")
    assert model(ids.to("meta")).logits.device.type == "meta"
    model.to_empty(device="cpu").load_state_dict(weights)
    assert torch.equal(model(ids).logits, expected)


def test_wrapping_shares_the_weights():
    model = MPT(SHAPE)
    wrapped = MPTForCausalLM.of(model)
    assert wrapped.mpt is model
    assert wrapped.training
    assert {p.data_ptr() for p in wrapped.parameters()} == {
        p.data_ptr() for p in model.parameters()
    }


def test_a_copy_is_whole_and_separate():
    model = build()
    other = copy.deepcopy(model)
    assert other.mpt.transformer is other.transformer
    assert other.transformer is not model.transformer
    other.transformer.wte.weight.data.zero_()
    assert (other(tokens(1, 3)).logits == 0).all()
    assert not (model(tokens(1, 3)).logits == 0).any()


def test_eager_attention_is_the_reference():
    config = HFConfig.of(SHAPE, attn_implementation="eager")
    assert MPTForCausalLM(config).mpt.config.attn_config.attn_impl == "reference"
    assert build().mpt.config.attn_config.attn_impl == "auto"


def words():
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 101)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<|endoftext|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend)


def test_the_tokenizer_of_a_model_directory_is_what_auto_tokenizer_reads(tmp_path):
    save_model(build().mpt, tmp_path, words())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 63
    assert dict(tokenizer("w3 w5")) == {"input_ids": [3, 5], "attention_mask": [1, 1]}
    assert tokenizer.decode([3, 5]) == "w3 w5"
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 0


def test_a_pipeline_continues_a_text(tmp_path):
    save_model(build().mpt, tmp_path, words())
    write = pipeline("text-generation", model=str(tmp_path), device="cpu", batch_size=2)
    write.tokenizer.pad_token = "<|endoftext|>"
    prompts = ["w3 w5 w9", "w7"]
    texts = write(prompts, max_new_tokens=4, do_sample=False)
    for prompt, [text] in zip(prompts, texts, strict=True):
        ids = torch.tensor([words().encode(prompt)])
        alone = build().generate(ids, **(GREEDY | {"max_new_tokens": 4, "eos_token_id": 0}))
        expected = words().decode(alone[0].tolist())
        # The pipeline joins prompt and continuation without a space.
        assert text["generated_text"].split(" ")[-3:] == expected.split(" ")[-3:]


def test_a_configuration_takes_the_fields_of_transformers_too():
    config = HFConfig.of(SHAPE)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (42, 6, 2)
    assert HFConfig(**(config.to_dict() | {"n_layers": 5})).shape == SHAPE.replace(n_layers=5)
    config.n_layers = 4
    assert config.shape.n_layers == 4


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"n_layer is not a field .* did you mean n_layers\?"):
        HFConfig(n_layer=3)


@pytest.mark.parametrize("shape", [(2, 1, 7, 7), (7,)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask has the shape .* MPT reads \(batch, tok"):
        build()(tokens(2, 7), attention_mask=torch.ones(shape))


def test_a_mask_that_forgets_the_cache_is_refused():
    model = build()
    cache = model(tokens(1, 7), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask covers 2 of 9 tokens"):
        model(tokens(1, 2), attention_mask=torch.ones(1, 2), past_key_values=cache)


def test_an_argument_without_effect_is_refused():
    with pytest.raises(TypeError, match="MPTForCausalLM has no use for output_hidden_states"):
        build()(tokens(1, 7), output_hidden_states=True)
