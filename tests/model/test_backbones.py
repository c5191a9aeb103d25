"""timm's trunks of several families: maps, parameter groups, norms, and the weights that fit."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from convnext_yolo.model.backbone import Backbone
from convnext_yolo.model.norms import MicroBatchNorm2d, micro_batch_norms, replace_batch_norms
from convnext_yolo.model.registry import FeatureRegistry

# name: (channels of P3-P5, parameter layers that layer-wise decay tells apart at least)
FAMILIES = {
    "test_convnext": ((32, 48, 64), 9),
    "convnextv2_atto": ((80, 160, 320), 12),
    "resnet18": ((128, 256, 512), 8),
    "regnety_002": ((56, 152, 368), 12),
    "mobilenetv4_conv_small": ((64, 96, 960), 12),
    "test_efficientnet": ((32, 48, 64), 5),
    "test_nfnet": ((64, 96, 192), 4),  # no norms at all
}


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request) -> Backbone:
    """In training mode, no parameter at zero; tests leave its weights as they are."""
    torch.manual_seed(0)
    backbone = Backbone(request.param)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if not parameter.any():  # the last norm of a residual block: nothing passes it
                parameter.normal_(std=0.1)
    return backbone.train()


def maps_of(backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
    features = FeatureRegistry()
    backbone(images, features)
    maps = [features.take(level) for level in ("P3", "P4", "P5")]
    features.assert_empty()
    return maps


def picture(height_px: int = 64, width_px: int = 96) -> torch.Tensor:
    return torch.rand(2, 3, height_px, width_px, generator=torch.Generator().manual_seed(1))


def name_of(backbone: Backbone) -> str:
    return backbone.trunk.pretrained_cfg["architecture"]


def test_maps_gradients_and_norms(backbone):
    maps = maps_of(backbone, picture())
    channels, _ = FAMILIES[name_of(backbone)]
    assert backbone.channels == channels
    sizes = ((8, 12), (4, 6), (2, 3))
    want = [(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
    assert [tuple(m.shape) for m in maps] == want
    generator = torch.Generator().manual_seed(2)
    weighted = [(m * torch.randn(m.shape, generator=generator)).sum() for m in maps]
    parameters = dict(backbone.named_parameters())
    grads = torch.autograd.grad(sum(weighted), list(parameters.values()), allow_unused=True)
    for name, grad in zip(parameters, grads, strict=True):
        assert grad is not None and grad.isfinite().all() and grad.any(), name
    norms = [m for m in backbone.modules() if isinstance(m, _NormBase)]
    assert all(isinstance(norm, MicroBatchNorm2d) for norm in norms)
    assert all(norm.take_pending().any() for norm in norms)  # each has seen the pictures


def test_layer_decay_tells_many_layers_apart(backbone):
    groups = param_groups_layer_decay(backbone.trunk, weight_decay=0.05, layer_decay=0.7)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = {id(p): name for name, p in backbone.trunk.named_parameters()}
    assert scale.keys() == names.keys()  # every parameter in a group
    assert sum(len(group["params"]) for group in groups) == len(names)  # and in one only
    _, layers = FAMILIES[name_of(backbone)]
    assert len(set(scale.values())) >= layers
    in_order = [scale[number] for number in names]
    assert in_order[0] == min(in_order) < 0.7 ** (layers - 2)
    assert in_order[-1] == max(in_order) >= 0.7
    for group in groups:
        vectors = {p.ndim <= 1 for p in group["params"]}
        assert vectors == {group["weight_decay"] == 0}


def test_the_mean_and_spread_that_the_weights_know(backbone):
    """A picture of the mean colour is a picture of zeros to the trunk."""
    backbone = copy.deepcopy(backbone).eval()
    colour = backbone.mean.expand(1, 3, 64, 64)
    trunk = backbone.trunk.forward_intermediates(
        torch.zeros(1, 3, 64, 64), indices=backbone.indices, intermediates_only=True
    )
    for ours, zeros in zip(maps_of(backbone, colour), trunk, strict=True):
        torch.testing.assert_close(ours, zeros)
    assert backbone.mean.flatten().tolist() == pytest.approx(backbone.trunk.pretrained_cfg["mean"])


def test_replaced_norms_say_the_same(backbone):
    """timm's own trunk, with statistics as after training, against the same with our norms."""
    torch.manual_seed(3)
    theirs = timm.create_model(name_of(backbone), num_classes=0)
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
    ours = copy.deepcopy(theirs)
    replace_batch_norms(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    batch_norms = sum(isinstance(m, nn.BatchNorm2d) for m in theirs.modules())
    assert len(micro_batch_norms(ours)) == batch_norms
    for training in (True, False):
        theirs.train(training), ours.train(training)
        torch.manual_seed(4)  # for drop-out, if there is some
        want = theirs.forward_features(picture())
        torch.manual_seed(4)
        torch.testing.assert_close(ours.forward_features(picture()), want, rtol=1e-6, atol=1e-6)
        theirs.load_state_dict(ours.state_dict())  # the statistics that training moved


def test_weights_of_timms_whole_model(backbone, tmp_path):
    """Classifier and all, as they lie on the hub."""
    torch.manual_seed(5)
    tensors = timm.create_model(name_of(backbone), num_classes=10).state_dict()
    save_file(tensors, tmp_path / "w.safetensors")
    held = Backbone(name_of(backbone), weights=str(tmp_path / "w.safetensors")).trunk.state_dict()
    assert len(held) > 20 and set(tensors) > set(held)
    assert all(torch.equal(held[name], tensors[name]) for name in held)


def test_weights_of_our_own_trunk(backbone, tmp_path):
    """Saved from one detector for another: the classifier is gone already."""
    path = tmp_path / "w.safetensors"
    save_file(backbone.trunk.state_dict(), path)
    other = Backbone(name_of(backbone), weights=str(path))
    same = zip(
        maps_of(copy.deepcopy(backbone).eval(), picture()),
        maps_of(other.eval(), picture()),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("name", ["test_convnext", "convnextv2_atto"])
@pytest.mark.parametrize("conv_mlp", [False, True])
def test_linear_layers_and_1x1_convolutions_are_one(tmp_path, name, conv_mlp):
    """timm's `conv_mlp` is the same network in another layout: its weights fit both ways."""
    torch.manual_seed(6)
    first = Backbone(name, {"conv_mlp": conv_mlp}).eval()
    assert first.trunk.stages[1].blocks[0].mlp.fc1.weight.ndim == (4 if conv_mlp else 2)
    save_file(first.trunk.state_dict(), tmp_path / "there.safetensors")
    options = {"conv_mlp": not conv_mlp}
    second = Backbone(name, options, weights=str(tmp_path / "there.safetensors")).eval()
    maps = zip(maps_of(first, picture()), maps_of(second, picture()), strict=True)
    for a, b in maps:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    save_file(second.trunk.state_dict(), tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    again = Backbone(name, {"conv_mlp": conv_mlp}, weights=str(tmp_path / "back.safetensors"))
    assert len(back) == len(again.trunk.state_dict())
    for key, tensor in again.trunk.state_dict().items():
        assert torch.equal(tensor, first.trunk.state_dict()[key]), key


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_published_weights_fit_both_layouts(tmp_path, conv_mlp):
    """timm itself loads a hub's linear layers into linear layers only."""
    torch.manual_seed(7)
    published = timm.create_model("test_convnext", num_classes=1000)
    save_file(published.state_dict(), tmp_path / "hub.safetensors")
    overlay = {"file": str(tmp_path / "hub.safetensors")}  # timm's stand-in for its hub
    options = {"conv_mlp": conv_mlp, "pretrained_cfg_overlay": overlay}
    trunk = Backbone("test_convnext", options, pretrained=True).trunk
    theirs = published.state_dict()
    for key, tensor in trunk.state_dict().items():
        assert torch.equal(tensor.squeeze(), theirs[key].squeeze()), key
