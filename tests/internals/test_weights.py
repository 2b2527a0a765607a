import pytest
import torch
import torchvision
from torchvision.models import MobileNet_V3_Small_Weights, ResNet50_Weights
from torchvision.ops import FrozenBatchNorm2d

from internals import weights
from internals.errors import UserError

SMALL = MobileNet_V3_Small_Weights.IMAGENET1K_V1
FILE = "mobilenet_v3_small-047dcff4.pth"


def test_download_error_names_cache_path(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as caught:
        weights.download(SMALL, "or do without")
    message = str(caught.value)
    assert "no network" in message
    assert f"https://download.pytorch.org/models/{FILE}" in message
    assert f"{tmp_path / 'checkpoints' / FILE}, or do without" in message


def test_cached_weights_are_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    torch.save(state, tmp_path / "checkpoints" / FILE)
    loaded = weights.download(SMALL, "")
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_find_weights_by_name():
    for name in ("IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2"):
        assert weights.find_weights(ResNet50_Weights, name) is ResNet50_Weights.IMAGENET1K_V2
    with pytest.raises(UserError, match=r"'IMAGENET9'.*IMAGENET1K_V1, IMAGENET1K_V2.*\.pth"):
        weights.find_weights(ResNet50_Weights, "IMAGENET9")


def test_is_file(tmp_path):
    (tmp_path / "weights").touch()
    assert weights.is_file("missing.pth")
    assert weights.is_file(str(tmp_path / "weights"))
    assert not weights.is_file("COCO_V1")


def test_coco_weights_absorb_norm_epsilon(monkeypatch):
    """COCO_V1 was trained with epsilon 0; a stock model has 1e-5."""
    norm = FrozenBatchNorm2d(6, eps=0.0)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in norm.named_buffers():
        values = torch.randn(6, generator=generator)
        buffer.copy_(values.abs() ** 8 * 1e-3 if name == "running_var" else values)
    state = {f"bn.{key}": value.clone() for key, value in norm.state_dict().items()}
    enum = torchvision.models.get_model_weights("fasterrcnn_resnet50_fpn")
    monkeypatch.setattr(enum, "get_state_dict", lambda *a, **k: state)
    adapted = weights.download(enum.COCO_V1, "")
    stock = FrozenBatchNorm2d(6)
    stock.load_state_dict({key.removeprefix("bn."): value for key, value in adapted.items()})
    x = torch.randn(2, 6, 3, 3, generator=generator)
    torch.testing.assert_close(stock(x), norm(x), rtol=1e-4, atol=1e-4)
