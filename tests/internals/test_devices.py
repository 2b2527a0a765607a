import pytest
import torch

from internals.devices import choose_device
from internals.errors import UserError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "use cuda, cuda:N or cpu"),
        ("mps", "runs on cuda and cpu only"),
        ("cuda:99", r"there are \d+ CUDA devices here"),
    ],
)
def test_devices_that_are_not_there_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        choose_device(name)


def test_each_process_takes_the_cuda_device_of_its_own_number(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda:1")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    assert taken == [torch.device("cuda:1")] * 2 + [torch.device("cuda:0")]
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="each process takes its own"):
        choose_device("cuda:0")
