"""Run the losses of Faster R-CNN, and their gradients, as CUDA graphs (--cuda-graphs).

At small batches a GPU is faster than Python, which launches a thousand kernels per step. A graph
launches them at once. It is for one shape of the inputs, and computes with the memory addresses of
its capture: parameters, inputs, losses and gradients stay where they are.
"""

from contextlib import suppress

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

import utils
from internals.fast.anchors import cached_anchors
from internals.fast.boxes import GroundTruth
from internals.fast.frozen_norms import FoldedConv2d

Inputs = tuple[torch.Tensor, torch.Tensor, GroundTruth]
LARGEST_BATCH = 8  # with more images the GPU is the limit, and graphs only cost memory
WARM_UP_RUNS = 3
BOX_STEP = 64  # boxes are padded to a multiple of it, so that few graphs are needed


class CudaGraphs:
    """The graphs of a model: one for each shape of the inputs, captured when it is seen again.

    If a capture fails, the model continues without graphs.
    """

    def __init__(self, model: torch.nn.Module):
        self.losses_of = _Losses(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        self._frozen += model.buffers()
        self.stream = torch.cuda.Stream()  # a pool reuses memory of the same stream only
        self._clear()
        self.enabled = True

    def _clear(self) -> None:
        self.graphs: dict[tuple, _LossGraph] = {}
        self._seen: set[tuple] = set()
        self._boxes = BOX_STEP
        self._versions = self._frozen_versions()
        self.pool = torch.cuda.graph_pool_handle()

    def _frozen_versions(self) -> list[int]:
        return [tensor._version for tensor in self._frozen]

    def losses(
        self, images: torch.Tensor, sizes: torch.Tensor, gt: GroundTruth
    ) -> dict[str, torch.Tensor]:
        """Return `FastFasterRCNN.losses(images, sizes, gt)`, by a graph if there is one."""
        if not self.enabled or len(images) > LARGEST_BATCH:
            return self.losses_of(images, sizes, gt)
        if self._versions != self._frozen_versions():  # folded weights are constants of a graph
            self._clear()
        inputs = (images, sizes, self._pad(gt))
        shape = (tuple(images.shape), torch.get_autocast_dtype("cuda"))
        if shape in self._seen and shape not in self.graphs:
            self._capture(shape, inputs)
        self._seen.add(shape)
        if shape in self.graphs:
            return self.graphs[shape](inputs)
        return self.losses_of(*inputs)

    def _pad(self, gt: GroundTruth) -> GroundTruth:
        most = gt.boxes.shape[1]
        if most > self._boxes:  # graphs for fewer boxes are of no use any more
            self._clear()
            self._boxes = -(-most // BOX_STEP) * BOX_STEP
        boxes = pad(gt.boxes, (0, 0, 0, self._boxes - most))
        return gt._replace(boxes=boxes, labels=pad(gt.labels, (0, self._boxes - most)))

    def _capture(self, shape: tuple, inputs: Inputs) -> None:
        stream = torch.cuda.current_stream()
        try:
            self.graphs[shape] = _LossGraph(self, inputs)
        except Exception as error:  # an operator that cannot be captured, lack of memory, ...
            while error.__context__:  # the first one says why
                error = error.__context__
            reason = str(error).strip().partition("\n")[0][:200]
            utils.log(f"--cuda-graphs: training without graphs, as a capture failed: {reason}")
            # A failed capture leaves its stream current, and some versions its pool in use.
            torch.cuda.set_stream(stream)
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(stream.device_index, self.pool)
            self.enabled = False
            self._clear()


class _Losses(torch.nn.Module):
    """`FastFasterRCNN.losses` as the forward pass of a module."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs) -> dict[str, torch.Tensor]:
        return self.model.losses(*inputs)


class _LossGraph:
    """Two graphs: from the inputs to the losses, and from the losses to the gradients."""

    def __init__(self, owner: CudaGraphs, inputs: Inputs):
        self.parameters = owner.parameters
        self.inputs = tree_map(torch.clone, inputs)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # Copies that share the memory of the parameters: autograd would let the capture wait for
        # the stream on which the parameters themselves were used before.
        leaves = {
            name: parameter.detach().requires_grad_()
            for name, parameter in owner.losses_of.named_parameters()
            if parameter.requires_grad
        }

        def run() -> dict[str, torch.Tensor]:
            # Not cached: a cast of a parameter must be part of the graph.
            with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
                return torch.func.functional_call(owner.losses_of, leaves, self.inputs)

        def differentiate(losses: tuple, factors: tuple) -> tuple:
            return torch.autograd.grad(losses, list(leaves.values()), factors, allow_unused=True)

        owner.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(owner.stream):
            for _ in range(WARM_UP_RUNS):
                losses = tuple(run().values())
                differentiate(losses, tuple(torch.ones_like(loss) for loss in losses))
        del losses
        torch.cuda.current_stream().wait_stream(owner.stream)
        # Other threads may call CUDA meanwhile, such as the one that pins memory.
        mode = {"pool": owner.pool, "stream": owner.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **mode):
            outputs = run()
        self.names, self.losses = list(outputs), tuple(outputs.values())
        self.factors = tuple(torch.ones_like(loss) for loss in self.losses)
        with torch.cuda.graph(self.backward, **mode):
            self.gradients = differentiate(self.losses, self.factors)
        self.losses = tuple(loss.detach() for loss in self.losses)
        # The graph reads these tensors, also when they are no longer in a cache.
        modules = owner.losses_of.modules()
        folded = [module._folded for module in modules if isinstance(module, FoldedConv2d)]
        self._constants = folded, cached_anchors()

    def __call__(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        tree_map(torch.Tensor.copy_, self.inputs, inputs)
        losses = _Replay.apply(self, *self.parameters)
        return dict(zip(self.names, losses, strict=True))


class _Replay(torch.autograd.Function):
    """The graphs as an operation of autograd, with the losses as a function of the parameters."""

    @staticmethod
    def forward(ctx, graph, *parameters):
        ctx.graph = graph
        graph.forward.replay()
        return tuple(loss.detach() for loss in graph.losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, *factors):
        for static, factor in zip(ctx.graph.factors, factors, strict=True):
            static.copy_(factor)
        ctx.graph.backward.replay()
        return None, *(g if g is None else g.detach() for g in ctx.graph.gradients)
