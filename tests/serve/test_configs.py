import pytest
import torch

from mptbook.infer.slots import Slots
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.plan import GPUS, weight_bytes
from mptbook.plan.memory import reserve
from mptbook.serve.command import Serve
from mptbook.settings import CONFIGS


@pytest.mark.parametrize(
    ("file", "gpu"), [("serve-30b.toml", "A100-80GB"), ("serve-30b-8bit.toml", "A100-40GB")]
)
def test_thirty_billion_fit_one_gpu_and_one_text_more_would_not(file, gpu):
    settings = Serve.from_toml(CONFIGS / file, model="mosaicml/mpt-30b")
    config = MPTConfig.named("mpt-30b")
    with torch.device("meta"):
        model = MPT(config).to("meta")  # the slopes too: slots are where they are
    card, weights = GPUS[gpu], weight_bytes(config, settings.bits)
    taken = [
        Slots(model, n, settings.tokens, settings.cache_dtype).bytes
        for n in (settings.slots, settings.slots + 1)
    ]
    left = card.memory_bytes - reserve(card) - weights
    assert taken[0] < left < taken[1]
    assert settings.tokens <= config.max_seq_len
    assert settings.device == "cuda"
