"""Triton kernels: in Triton's interpreter, compiled for an H100, and when they cannot be used."""

import sys
from textwrap import dedent

import pytest
import torch
from helpers import ROOT, run

from internals.fast import kernels, plain_kernels


def run_python(code: str, **environment) -> str:
    result = run(sys.executable, "-c", dedent(code), cwd=ROOT, **environment)
    assert not result.returncode, result.stderr
    return result.stdout


@pytest.mark.slow
def test_kernels_agree_with_pytorch_in_interpreter():
    """On integer coordinates, as at the start of a run, and on any others."""
    pytest.importorskip("triton")
    code = """
        import torch
        from torchvision.models.detection._utils import Matcher
        from internals.fast import kernels, plain_kernels, triton_kernels

        assert kernels.find_difference(triton_kernels, torch.device("cpu")) is None
        torch.manual_seed(0)
        corners = torch.rand(3, 300, 2) * 100
        boxes = torch.cat([corners, corners + torch.rand(3, 300, 2) * 60 + 1], dim=2)
        valid, labels = torch.rand(3, 300) < 0.9, torch.randint(1, 4, (3, 300))
        for options in ((0.3,), (0.7,), (0.5, labels), (0.5, labels, 7)):
            found = triton_kernels.nms(boxes, valid, *options)
            assert torch.equal(found, plain_kernels.nms(boxes, valid, *options)), options
        gt_boxes, counts = boxes[:, :16], torch.tensor([16, 0, 3])
        gt_boxes[2, 0] += 1000  # overlaps nothing
        for matcher in (Matcher(0.7, 0.3, True), Matcher(0.5, 0.5)):
            for candidates in (boxes[1:2], boxes):
                found = triton_kernels.match(gt_boxes, counts, candidates, matcher, block=128)
                expected = plain_kernels.match(gt_boxes, counts, candidates, matcher)
                assert torch.equal(found[1], expected[1])
                assert torch.equal(found[0][[0, 2]], expected[0][[0, 2]])
        # The check finds errors.
        triton_kernels.nms = lambda boxes, valid, *options: valid
        assert "NMS" in kernels.find_difference(triton_kernels, torch.device("cpu"))
        print("equal")
        """
    assert run_python(code, TRITON_INTERPRET="1") == "equal\n"


@pytest.mark.slow
def test_kernels_compile_for_h100():
    """And without fused multiply-adds, which would round IoUs differently."""
    pytest.importorskip("triton")
    code = """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from internals.fast import triton_kernels as k

        boxes, numbers, flags, number = "*fp32", "*i64", "*i8", "i32"
        match = dict(gt_boxes=boxes, counts=numbers, boxes=boxes, image_stride=number,
                     highest=boxes)
        sizes = dict(count=number, padded=number)
        nms = dict(boxes=boxes, labels=numbers, valid=flags, keep=flags, count=number,
                   threshold="fp32", limit=number)
        for kernel, signature, constants in (
            (k.match_kernel, {**match, "matches": numbers, "best_of_gt": "*i32", **sizes},
             {"block": 1024}),
            (k.kind_kernel, {**match, "best_of_gt": "*i32", "kinds": flags, "low": "fp32",
             "high": "fp32", **sizes}, {"low_quality": True, "block": 1024}),
            (k.nms_kernel, nms, {"has_labels": False, "block": 2048}),
            (k.nms_kernel, nms, {"has_labels": True, "block": 2048}),
        ):
            source = ASTSource(
                fn=kernel,
                signature={**signature, **dict.fromkeys(constants, "constexpr")},
                constexprs=constants,
            )
            options = {"num_warps": 8, **k.EXACT}
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert compiled.asm["cubin"]
            assert "fma." not in compiled.asm["ptx"]
        print("compiled")
        """
    assert run_python(code) == "compiled\n"


def fail(*_) -> None:
    raise RuntimeError("Failed to find C compiler\nmore lines")


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda *_: "NMS differs from PyTorch's", "(NMS differs from PyTorch's)"),
        (fail, "(RuntimeError: Failed to find C compiler)"),
    ],
)
def test_unusable_kernels_are_reported_in_one_line(monkeypatch, capsys, check, reason):
    monkeypatch.setattr(kernels, "find_difference", check)
    monkeypatch.setitem(sys.modules, "internals.fast.triton_kernels", object())
    assert kernels.kernels_for.__wrapped__(torch.device("cuda")) is plain_kernels
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("matching and NMS are slower")
    assert line.endswith(reason)


def test_missing_triton_is_reported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "internals.fast.triton_kernels", None)
    assert kernels.kernels_for.__wrapped__(torch.device("cuda")) is plain_kernels
    assert "cannot be used (" in capsys.readouterr().out


def test_cpu_needs_no_kernels():
    assert kernels.kernels_for(torch.device("cpu")) is plain_kernels
