import pytest
import torch

from internals.devices import choose_device
from internals.errors import UserError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "use cuda, cuda:N or cpu"),
        ("mps", "mps is not supported: use cuda or cpu"),
        ("cuda:99", r"there are \d+ CUDA devices"),
    ],
)
def test_missing_devices_are_rejected(name, message):
    with pytest.raises(UserError, match=message):
        choose_device(name)


def test_cuda_device_is_local_rank(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda:1")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    assert devices == [torch.device("cuda:1")] * 2 + [torch.device("cuda:0")]
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="process takes its own GPU"):
        choose_device("cuda:0")
