import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from convnext_yolo.model.assign import Targets
from convnext_yolo.model.backbone import Backbone
from convnext_yolo.model.boxes import xyxy_to_cxcywh
from convnext_yolo.model.detector import Detector, build_detector
from convnext_yolo.model.errors import BackboneError
from convnext_yolo.model.head import AnchorHead
from convnext_yolo.model.losses import AnchorCriterion
from convnext_yolo.model.registry import FeatureRegistry

HUB = {"pretrained_cfg_overlay": {"hf_hub_id": "convnext-yolo/nobody-has-this"}}


@pytest.fixture(scope="module")
def detector(architecture) -> Detector:
    """In evaluation mode; tests leave it as it is."""
    torch.manual_seed(0)
    return build_detector(architecture).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    shape = (2, 3, 64, 96)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@torch.no_grad()
def raw_maps(detector: Detector, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return detector(images).levels


def assert_same(first, second) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("neck_channels", "neck_repeats", "parameters"),
    [((64, 128, 256), 1, 29_223_709), ((96, 192, 384), 2, 30_740_797)],
)
def test_the_seeds_models_to_the_parameter(architecture, neck_channels, neck_repeats, parameters):
    with torch.device("meta"):
        detector = build_detector(
            architecture
            | {
                "classes": 80,
                "backbone": {"name": "convnext_tiny"},
                "adapter_channels": (128, 256, 512),
                "neck_channels": neck_channels,
                "neck_repeats": neck_repeats,
            }
        )
    assert sum(p.numel() for p in detector.parameters()) == parameters
    assert detector.backbone.channels == (192, 384, 768)


def test_shapes(detector, images):
    levels = raw_maps(detector, images)
    assert [tuple(level.shape) for level in levels] == [
        (2, 3, 8, 12, 8),
        (2, 3, 4, 6, 8),
        (2, 3, 2, 3, 8),
    ]
    boxes, scores = detector.decode(detector(images))
    assert boxes.shape == (2, 3 * (96 + 24 + 6), 4) and scores.shape == (2, 378, 3)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_every_parameter_gets_a_gradient(architecture, images):
    torch.manual_seed(0)
    detector = build_detector(architecture).train()
    targets = Targets(
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 2, 1]),
        torch.tensor([[2.0, 4, 20, 30], [30, 20, 90, 60], [0, 0, 96, 64]]),
    )
    losses = AnchorCriterion(0.05, 1.0, 0.5)(detector.head, detector(images).levels, targets)
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_bytes_and_floats_are_the_same_picture(detector, images):
    assert_same(raw_maps(detector, images), raw_maps(detector, images.float() / 255))


def test_channels_last_is_the_same_picture(detector, images):
    plain = detector.decode(detector(images))
    other = detector.decode(detector(images.to(memory_format=torch.channels_last)))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_pictures_of_a_batch_do_not_mix(detector, images):
    together, alone = raw_maps(detector, images), raw_maps(detector, images[1:])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-4)


def test_a_neck_that_ignores_a_level_is_noticed(detector, images):
    class Short(torch.nn.Module):
        def forward(self, features: FeatureRegistry) -> list[torch.Tensor]:
            return [features.take("P3"), features.take("P4")]

    other = copy.deepcopy(detector)
    other.neck = Short()
    with pytest.raises(RuntimeError, match=r"never taken from the registry: \['P5'\]"):
        other(images)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(detector, images, copied):
    other = copied(detector)
    assert_same(raw_maps(detector, images), raw_maps(other, images))
    before = raw_maps(detector, images)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(before, raw_maps(detector, images))


def test_state_dict_round_trip(detector, images, architecture):
    torch.manual_seed(1)
    other = build_detector(architecture).eval()
    assert not torch.equal(raw_maps(detector, images)[0], raw_maps(other, images)[0])
    other.load_state_dict(detector.state_dict())
    assert_same(raw_maps(detector, images), raw_maps(other, images))


def test_the_same_seed_is_the_same_model(architecture):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_detector(architecture).state_dict())
    assert_same(models[0].values(), models[1].values())


def test_the_decoding_is_the_published_one():
    head = AnchorHead((4, 4, 4), 2, [[[10, 13]], [[30, 61]], [[116, 90]]], (8, 16, 32))
    raw = [torch.zeros(1, 1, 64 // s, 96 // s, 7) for s in head.strides]
    logits = torch.tensor([2.0, -1, 0.5, -3, 1.5, 0.7, -0.2])
    raw[1][0, 0, 2, 3] = logits
    boxes, scores = head.decode(raw)
    at = 8 * 12 + 2 * 6 + 3  # behind the cells of P3, row by row
    x, y, w, h, objectness, *classes = logits.sigmoid().tolist()
    want = [(2 * x - 0.5 + 3) * 16, (2 * y - 0.5 + 2) * 16, 4 * w * w * 30, 4 * h * h * 61]
    assert xyxy_to_cxcywh(boxes[0, at]).tolist() == pytest.approx(want, abs=1e-4)
    assert scores[0, at].tolist() == pytest.approx([objectness * c for c in classes])
    # Zero logits: the middle of the cell, the anchor's size.
    assert xyxy_to_cxcywh(boxes[0, 13]).tolist() == pytest.approx([12, 12, 10, 13])


def test_a_backbone_that_is_not_a_convnext():
    backbone = Backbone("resnet10t")
    features = FeatureRegistry()
    backbone(torch.zeros(1, 3, 64, 64), features)
    shapes = [tuple(features.take(level).shape) for level in ("P3", "P4", "P5")]
    assert shapes == [(1, c, s, s) for c, s in zip(backbone.channels, (8, 4, 2), strict=True)]


def weights_file(tmp_path, change=lambda tensors: None) -> str:
    """Weights of timm's whole model, its classifier included."""
    import timm

    torch.manual_seed(5)
    tensors = OrderedDict(timm.create_model("test_convnext", num_classes=10).state_dict())
    change(tensors)
    save_file(tensors, tmp_path / "timm.safetensors")
    return str(tmp_path / "timm.safetensors")


def test_local_weights_fill_the_whole_trunk(tmp_path):
    path = weights_file(tmp_path)
    held, tensors = Backbone("test_convnext", weights=path).trunk.state_dict(), load_file(path)
    assert len(held) > 20 and set(tensors) > set(held)
    assert all(torch.equal(held[name], tensors[name]) for name in held)


def test_local_weights_spare_the_hub(tmp_path):
    path = weights_file(tmp_path)
    Backbone("test_convnext", HUB, pretrained=True, weights=path)  # raises if it asks the hub


def test_only_safetensors_are_opened(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.safetensors")
    with pytest.raises(BackboneError, match="not a readable safetensors file"):
        Backbone("test_convnext", weights=str(tmp_path / "pickle.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("stem.0.weight"), r"stem\.0\.weight is not in the file"),
        (lambda t: t.update({"stages.7.x": torch.zeros(1)}), r"stages\.7\.x is not in test_conv"),
        (
            lambda t: t.update({"stem.1.weight": torch.zeros(7)}),
            r"stem\.1\.weight has the shape \(7,\), but test_convnext needs \(24,\)",
        ),
    ],
)
def test_weights_of_another_model(tmp_path, change, message):
    with pytest.raises(BackboneError, match=message):
        Backbone("test_convnext", weights=weights_file(tmp_path, change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "convnext_huge_plus"}, r"timm [\d.]+ has no such model; .*list_models"),
        ({"name": "test_convnext.no_such_tag"}, "no_such_tag.*check model.backbone.name"),
        ({"name": "vit_tiny_patch16_224"}, r"strides \[16\], but a detector needs 8, 16 and 32"),
        ({"options": {"output_stride": 16}}, r"strides \[4, 8, 16\], but a detector needs"),
        ({"options": {"depht": 3}}, "depht.*check .*model.backbone.options"),
        ({"options": {"dims": [24, 48]}}, "IndexError.*check .*model.backbone.options"),
        ({"options": {"act_layer": "none"}}, "KeyError.*check .*model.backbone.options"),
        ({"options": {"drop_path_rate": "x"}}, "linspace.*check .*model.backbone.options"),
        ({"options": {"num_classes": 3}}, "options.num_classes is not free in a detector"),
        ({"options": {"in_chans": 1}}, "options.in_chans is not free in a detector"),
        ({"options": {"features_only": True}}, "options.features_only is not free"),
        ({"weights": "/nowhere/w.safetensors"}, "/nowhere/w.safetensors: no such file"),
        (
            {"options": HUB, "pretrained": True},
            r"pretrained weights can't be loaded .*set model\.backbone\.weights .*safetensors",
        ),
    ],
)
def test_mistakes_are_one_sentence(arguments, message):
    with pytest.raises(BackboneError, match=message) as caught:
        Backbone(**{"name": "test_convnext"} | arguments)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    assert caught.value.exit_code == 2
