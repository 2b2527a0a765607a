import pytest
import torch
import torchvision
from torchvision.models import MobileNet_V3_Small_Weights, ResNet50_Weights
from torchvision.ops import FrozenBatchNorm2d

from internals import weights
from internals.errors import UserError

SMALL = MobileNet_V3_Small_Weights.IMAGENET1K_V1
FILE = "mobilenet_v3_small-047dcff4.pth"


def test_weights_that_cannot_be_downloaded_say_where_to_place_them(monkeypatch, tmp_path):
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


def test_placed_weights_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    torch.save(state, tmp_path / "checkpoints" / FILE)
    found = weights.download(SMALL, "")
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_weights_are_found_by_name():
    for name in ("IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2"):
        assert weights.find_weights(ResNet50_Weights, name) is ResNet50_Weights.IMAGENET1K_V2
    with pytest.raises(UserError, match=r"'IMAGENET9'.*IMAGENET1K_V1, IMAGENET1K_V2.*\.pth"):
        weights.find_weights(ResNet50_Weights, "IMAGENET9")


def test_file_is_told_from_a_name(tmp_path):
    (tmp_path / "weights").touch()
    assert weights.is_file("gone.pth")
    assert weights.is_file(str(tmp_path / "weights"))
    assert not weights.is_file("COCO_V1")


def test_coco_weights_give_a_stock_model_the_same_norms(monkeypatch):
    """COCO_V1 was trained with an epsilon of 0; a stock model divides with 1e-5."""
    norm = FrozenBatchNorm2d(6, eps=0.0)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in norm.named_buffers():
        values = torch.randn(6, generator=generator)
        buffer.copy_(values.abs() ** 8 * 1e-3 if name == "running_var" else values)
    state = {f"bn.{key}": value.clone() for key, value in norm.state_dict().items()}
    enum = torchvision.models.get_model_weights("fasterrcnn_resnet50_fpn")
    monkeypatch.setattr(enum, "get_state_dict", lambda *a, **k: state)
    absorbed = weights.download(enum.COCO_V1, "")
    stock = FrozenBatchNorm2d(6)
    stock.load_state_dict({key.removeprefix("bn."): value for key, value in absorbed.items()})
    x = torch.randn(2, 6, 3, 3, generator=generator)
    torch.testing.assert_close(stock(x), norm(x), rtol=1e-4, atol=1e-4)
