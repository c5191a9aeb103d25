"""What a plan needs to know of a recipe's detector, found without a single weight.

The detector is built on torch's meta device: shapes without numbers. A micro-batch's passes over
fake tensors, which are shapes that claim to be on a device, then show what autograd would hold
there, autocast and activation checkpointing included. That takes a second or two and no memory,
whatever the detector's size.

Exact: sizes of parameters and buffers, their groups, the operations of a forward pass. Estimated,
and not yet compared with a GPU: activations. Not in them are the losses' own tensors, cuDNN's
workspaces, what the allocator loses between its blocks, and the CUDA context (half a GiB or more).
"""

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.detector import Detector, build_detector, without_pretrained
from ..model.norms import micro_batch_norms
from .build import architecture
from .config import Recipe
from .multi_scale import largest_frame
from .optim import freeze, parameter_groups
from .utilization import gflops

COCO_CLASSES = 80
FP32_BYTES = 4


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        numel: how many numbers it is.
        is_autocast: belongs to a linear or convolutional layer, which autocast runs in 16 bits and
            which DeepSpeed's `torch_autocast` therefore communicates in 16 bits.
    """

    numel: int
    is_autocast: bool


@dataclass(frozen=True)
class ModelFacts:
    """A recipe's detector, as a plan sees it.

    Attributes:
        groups: the trained parameters of each of the optimizer's groups, in its order.
        frozen: the parameters that stay.
        buffer_bytes: of all buffers.
        average_bytes: of the buffers that are averaged along with the weights (statistics).
        statistics: numbers that BatchNorm's layers average over the ranks at a step.
        gflops: 10⁹ operations of one picture's forward pass, 2 for a multiplication and addition.
        activation_bytes: the most that a micro-batch's forward and backward pass hold at once
            beside parameters and gradients.
        image_bytes: of a micro-batch's pictures; a rank keeps those of all until the step is done.
    """

    groups: tuple[tuple[Weight, ...], ...]
    frozen: tuple[Weight, ...]
    buffer_bytes: int
    average_bytes: int
    statistics: int
    gflops: float
    activation_bytes: int
    image_bytes: int

    @property
    def weights(self) -> list[Weight]:
        """All trained parameters."""
        return [weight for group in self.groups for weight in group]

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return sum(weight.numel for weight in self.weights)

    @property
    def parameters(self) -> int:
        """Numbers of the detector."""
        return self.trained + sum(weight.numel for weight in self.frozen)


def model_facts(recipe: Recipe, classes: int = COCO_CLASSES) -> ModelFacts:
    """Builds a recipe's detector out of shapes and reads its sizes.

    Args:
        recipe: of which the model, the frame, the micro-batch, precision and optimizer count.
        classes: how many the data has; the figures hardly depend on it.

    Raises:
        BackboneError, RecipeError: no such detector or parameter.
    """
    with torch.device("meta"):
        detector = build_detector(without_pretrained(architecture(recipe, classes))).train()
    freeze(detector, recipe.optimizer.freeze)
    picture_gflops = gflops(detector, recipe.data.image_px)
    if recipe.deepspeed.activation_checkpointing:
        detector.backbone.checkpoint_activations()
    autocast = _autocast_parameters(detector)

    def weights(parameters: Iterable[nn.Parameter], trained: bool) -> tuple[Weight, ...]:
        chosen = (p for p in parameters if p.requires_grad == trained)
        return tuple(Weight(p.numel(), id(p) in autocast) for p in chosen)

    groups = [
        weights(group["params"], True) for group in parameter_groups(detector, recipe.optimizer)
    ]
    persistent = detector.state_dict(keep_vars=True).keys()
    buffers = dict(detector.named_buffers())
    return ModelFacts(
        groups=tuple(group for group in groups if group),
        frozen=weights(detector.parameters(), False),
        buffer_bytes=sum(b.nbytes for b in buffers.values()),
        average_bytes=sum(b.nbytes for name, b in buffers.items() if name in persistent),
        statistics=sum(2 * norm.num_features for norm in micro_batch_norms(detector)),
        gflops=picture_gflops,
        activation_bytes=_activation_bytes(detector, recipe),
        image_bytes=recipe.batch.micro * 3 * math.prod(largest_frame(recipe)),
    )


def _autocast_parameters(detector: Detector) -> set[int]:
    """Ids of the parameters that DeepSpeed's `init_autocast_params` marks, by exact class."""
    from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES as SAFE

    layers = [module for module in detector.modules() if module.__class__ in SAFE]
    return {id(p) for layer in layers for p in layer.parameters(recurse=False)}


def _activation_bytes(detector: Detector, recipe: Recipe) -> int:
    """The peak of a forward and a backward pass of the largest frame, over fake tensors.

    Autocast keeps other things in 32 bits on a GPU than on a CPU (the norms' outputs above all), so
    the forward pass is a GPU's. Autograd refuses to go backwards over fake GPU tensors where there
    is no GPU: what that needs beyond the forward pass is a CPU's.
    """
    forward = _peak_bytes(detector, recipe, "cuda", backward=False)
    more = _peak_bytes(detector, recipe, "cpu") - _peak_bytes(
        detector, recipe, "cpu", backward=False
    )
    return forward + more


def _peak_bytes(detector: Detector, recipe: Recipe, device: str, backward: bool = True) -> int:
    """The most that live at once of what a micro-batch makes beside parameters and gradients."""
    frame_px = largest_frame(recipe)
    tensors, step = PeakOfTensors(), _Step(detector, recipe.deepspeed.precision, backward)
    with FakeTensorMode():
        held = {
            name: torch.empty(t.shape, dtype=t.dtype, device=device, requires_grad=t.requires_grad)
            for name, t in [*step.named_parameters(), *step.named_buffers()]
        }
        for tensor in held.values():
            if tensor.requires_grad:  # they are counted apart
                tensor.register_post_accumulate_grad_hook(_drop_gradient)
        with tensors:
            images = torch.empty(recipe.batch.micro, 3, *frame_px, dtype=torch.uint8, device=device)
            torch.func.functional_call(step, held, (images,))
    return tensors.peak


class _Step(nn.Module):
    """A forward pass, and by option a backward pass, which must find the same parameters."""

    def __init__(self, detector: Detector, precision: str, backward: bool):
        super().__init__()
        self.detector, self.precision, self.backward = detector, precision, backward

    def forward(self, images: Tensor) -> None:
        with _autocast(images.device.type, self.precision):
            raw = self.detector(images)
        if self.backward:  # the sum of squares stands in for the losses
            squares = [level.float().square().sum() for level in raw.levels]
            torch.stack(squares).sum().backward()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextlib.contextmanager
def _autocast(device: str, precision: str) -> Iterator[None]:
    """`torch.autocast`, which for "cuda" does nothing on a machine without a GPU."""
    if precision == "fp32":
        yield
        return
    torch.set_autocast_dtype(device, torch.bfloat16 if precision == "bf16" else torch.float16)
    torch.set_autocast_enabled(device, True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, False)


class PeakOfTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes
