import pytest
import torch

from mptbook.model.precision import autocast, has_bf16

CPU = torch.device("cpu")


def processor(monkeypatch, capability, **units):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)


@pytest.mark.parametrize(
    ("capability", "units", "expected"),
    [
        ("AVX512", {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ("AVX512", {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ("AVX512", {"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ("AVX2", {"avx512_bf16": True}, torch.float32),  # switched off
        ("DEFAULT", {}, torch.float32),  # no x86
    ],
)
def test_auto_computes_in_bfloat16_where_the_processor_does(
    monkeypatch, capability, units, expected
):
    processor(monkeypatch, capability, **units)
    x = torch.ones(2, 2)
    with autocast(CPU):
        assert (x @ x).dtype == expected
    with autocast(CPU, "bf16"):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("answer", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_does_not_count(monkeypatch, answer):
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: asked.update(how) or answer)
    assert has_bf16(torch.device("cuda")) is answer
    assert asked == {"including_emulation": False}


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'fp16'; it must be one of auto, bf16, fp32"):
        autocast(CPU, "fp16")
