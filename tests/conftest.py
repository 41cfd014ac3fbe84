"""Every test starts from the same random numbers and an empty parameter store."""

import pyro
import pytest
import torch

torch.set_num_threads(1)  # the runner uses one process per core


@pytest.fixture(autouse=True)
def _fresh_start():
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(True)  # torch.compile switches it off, for good
    pyro.clear_param_store()
    yield
    torch.distributions.Distribution.set_default_validate_args(True)  # torch.compile switches it off for good
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
