import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors here are tiny: a second thread costs more than it computes, up to tenfold."""
    import torch

    torch.set_num_threads(1)
