import argparse

import pytest
import torch
import torchvision

import settings
import utils
from arguments import parse_arguments
from internals import devices
from internals.devices import choose_device
from internals.errors import UserError
from internals.failures import is_out_of_memory
from internals.mixed_precision import resolve_precision


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "use cuda, cuda:N, mps or cpu"),
        ("xpu", "xpu is not supported: use cuda, mps or cpu"),
        ("mps", "mps: PyTorch finds no Apple GPU here"),
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


MPS = torch.device("mps")


@pytest.fixture
def apple(monkeypatch):
    """Let PyTorch find an Apple GPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("0.28.1", False), ("0.9.0", False), ("0.29.0", True), ("0.29.1+cpu", True), ("1.0a0", True)],
)
def test_mps_needs_a_torchvision_with_right_gradients(apple, monkeypatch, version, accepted):
    monkeypatch.setattr(torchvision, "__version__", version)
    if accepted:
        assert choose_device("mps") == MPS
    else:
        with pytest.raises(UserError, match=f"needs torchvision 0.29 or newer, but {version}"):
            choose_device("mps")


def test_mps_is_for_one_process_and_not_the_default(apple, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None).type == "cpu"
    assert devices.no_gpu_note() == " (no CUDA device found; --device mps uses the Apple GPU)"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="mps is for one process"):
        choose_device("mps")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--find-batch-size", "cannot measure the memory of Apple GPUs"),
        ("--cuda-graphs", "is for training on a CUDA device"),
        ("--sync-bn", "needs torchrun with several CUDA devices"),
    ],
)
def test_flags_that_mps_does_not_have(flags, message):
    args: argparse.Namespace = parse_arguments([*flags.split(), "--device", "mps"])
    settings.resolve_defaults(args, None, MPS)
    with pytest.raises(UserError, match=message):
        settings.validate_args(args, MPS)


def test_mps_trains_in_float32():
    assert resolve_precision(MPS, amp=False) == (None, "float32")
    for name in (None, "float16", "bfloat16"):
        with pytest.raises(UserError, match="--amp is not for Apple GPUs"):
            resolve_precision(MPS, amp=True, dtype_name=name)
    assert devices.precise_dtype(MPS) == torch.float32
    assert devices.precise_dtype(torch.device("cpu")) == torch.float64
    assert utils.peak_memory(MPS) is None
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))


def test_contiguous_format_includes_small_kernels():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 1), torch.nn.Conv2d(4, 4, 3))
    expected = [parameter.stride() for parameter in model.parameters()]
    values = [parameter.clone() for parameter in model.parameters()]
    model.to(memory_format=torch.channels_last)
    assert [parameter.stride() for parameter in model.parameters()] != expected
    devices.use_contiguous_format(model)
    assert [parameter.stride() for parameter in model.parameters()] == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))
