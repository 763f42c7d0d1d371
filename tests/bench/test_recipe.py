import pytest
import torch

from mptbook.bench import recipe
from mptbook.bench.recipe import RECIPE, VARIANTS, variant
from mptbook.bench.training import tiny_run


def test_each_variant_differs_from_the_recipe_in_what_its_name_says():
    whole = tiny_run()
    assert variant(RECIPE) == whole
    assert whole.shape["init_div_is_residual"] > 10
    for name, (optim, _) in VARIANTS.items():
        changed = variant(name)
        differing = {key for key, value in changed.optim if value != getattr(whole.optim, key)}
        assert differing == set(optim)
        assert (changed.shape == {}) == ("MPT" in name or "none" in name)
        assert changed.model_copy(update={"optim": whole.optim, "shape": whole.shape}) == whole
    assert variant("norms at the rate of matrices").optim.vector_lr == 1


def test_every_variant_is_trained_from_the_seeds_weights_and_read(data, monkeypatch):
    small = {"d_model": 24, "n_heads": 3, "n_layers": 1, "vocab_size": 320}
    config = recipe.tiny_config
    monkeypatch.setattr(recipe, "tiny_config", lambda *given: config(*given).replace(**small))
    monkeypatch.setattr(recipe, "keep_freed_memory", lambda: True)  # of this process
    begun, train = [], recipe.train

    def noted(model, rows, optim, **how):
        begun.append((model.transformer.wte.weight.detach().clone(), how["seed"], model.config))
        return train(model, rows, optim, batch_tokens=64, **how)

    monkeypatch.setattr(recipe, "train", noted)
    found = recipe.compare(data, steps=3, seeds=2)["bits_per_byte"]
    assert list(found) == list(VARIANTS)
    assert len({bits for pair in found.values() for bits in pair}) == 2 * len(VARIANTS)
    first = [weight for weight, seed, _ in begun if seed == 0]
    assert all(torch.equal(weight, first[0]) for weight in first)
    divisors = [config.init_config.init_div_is_residual for *_, config in begun]
    assert divisors == pytest.approx(
        [300, 300, 300, 300, 300, 300, True, True, True, True, True, True]
    )
