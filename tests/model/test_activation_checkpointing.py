"""Activation checkpointing: the same numbers from fewer tensors kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from convnext_yolo.model.backbone import Backbone
from convnext_yolo.model.csp import CSPDarknet
from convnext_yolo.model.errors import BackboneError
from convnext_yolo.model.norms import micro_batch_norms
from convnext_yolo.model.registry import FeatureRegistry

LEVELS = ("P3", "P4", "P5")


def maps_of(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    features = FeatureRegistry()
    backbone(images, features)
    return [features.take(level) for level in LEVELS]


def trained(backbone: nn.Module, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Maps, gradients by name, and the bytes that were kept from forward to backward pass."""
    torch.manual_seed(3)  # stochastic depth
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = maps_of(backbone, images)
    kept = sum(sizes.values())
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(m.shape, generator=generator, dtype=m.dtype) for m in maps]
    sum(((m * w).sum() for m, w in zip(maps, weights, strict=True)), torch.zeros(())).backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(backbone.parameters()))
    return [m.detach() for m in maps], gradients, kept


def both(build: Callable[[], nn.Module], images: Tensor) -> tuple[nn.Module, nn.Module, float]:
    """A backbone trained for a step without and with it; compares, gives the share of bytes."""
    torch.manual_seed(0)
    plain = build().train()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim == 1:  # layer scales and norms: let every block matter
                parameter.uniform_(0.5, 1.5)
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpoint_activations()  # type: ignore[operator]
    maps, gradients, bytes_plain = trained(plain, images)
    maps_again, gradients_again, bytes_checkpointed = trained(checkpointed, images)
    for found, want in zip(maps_again, maps, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    for name, want in gradients.items():
        torch.testing.assert_close(gradients_again[name], want, rtol=0, atol=0, msg=name)
    return plain, checkpointed, bytes_checkpointed / bytes_plain


def picture(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 96, 64, generator=generator, dtype=dtype)


def test_convnext_with_stochastic_depth() -> None:
    """The second forward pass drops what the first has dropped."""

    def build() -> nn.Module:
        return Backbone("test_convnext", {"drop_path_rate": 0.5})

    plain, _, share = both(build, picture())
    assert share < 0.4
    other, _, _ = trained(plain, picture())
    torch.manual_seed(5)
    assert not all(a.equal(b) for a, b in zip(maps_of(plain, picture()), other, strict=True))


@pytest.mark.parametrize("name", ["convnextv2_atto", "resnet18", "regnety_002"])
def test_other_trunks(name: str) -> None:
    plain, checkpointed, share = both(lambda: Backbone(name), picture())
    assert share < 0.6
    assert_same_statistics(plain, checkpointed)


def test_csp_darknet() -> None:
    """In double precision, so that nothing hides in rounding."""
    plain, checkpointed, share = both(
        lambda: CSPDarknet(0.33, 0.25).double(), picture(torch.double)
    )
    assert share < 0.3
    assert_same_statistics(plain, checkpointed)


def assert_same_statistics(plain: nn.Module, checkpointed: nn.Module) -> None:
    """BatchNorm has seen the micro-batch twice, which must not show in its statistics."""
    pairs = zip(micro_batch_norms(plain), micro_batch_norms(checkpointed), strict=True)
    twice = False
    for one, other in pairs:
        twice = twice or bool(other.pending_count == 2)
        for norm in (one, other):
            norm.move_running(*norm.take_pending())
        assert one.running_mean is not None and one.running_mean.any()
        torch.testing.assert_close(other.running_mean, one.running_mean)
        torch.testing.assert_close(other.running_var, one.running_var)
    assert twice or not micro_batch_norms(plain)


@pytest.mark.parametrize(
    "build", [lambda: Backbone("test_convnext"), lambda: CSPDarknet(0.33, 0.25)]
)
def test_inference_is_not_touched(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    backbone = build().eval()
    want = maps_of(backbone, picture())
    backbone.checkpoint_activations()  # type: ignore[operator]
    with torch.no_grad():
        found = maps_of(backbone, picture())
    assert all(a.equal(b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("name", ["dla34", "darknet53"])
def test_a_trunk_that_can_not_says_so(name: str) -> None:
    with torch.device("meta"):
        backbone = Backbone(name)
    with pytest.raises(BackboneError) as caught:
        backbone.checkpoint_activations()
    text = str(caught.value)
    assert text.startswith(f"backbone {type(backbone.trunk).__name__}: ")
    assert text.endswith("set deepspeed.activation_checkpointing: false")
    assert "\n" not in text
