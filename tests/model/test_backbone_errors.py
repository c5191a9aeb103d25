"""What no trunk can be made of: each mistake is one sentence. And when the hub is asked at all."""

from collections import OrderedDict

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from convnext_yolo.model.backbone import Backbone
from convnext_yolo.model.errors import BackboneError

HUB = {"pretrained_cfg_overlay": {"hf_hub_id": "convnext-yolo/nobody-has-this"}}


def weights_file(tmp_path, change=lambda tensors: None) -> str:
    """Weights of timm's whole model, changed."""
    torch.manual_seed(5)
    tensors = OrderedDict(timm.create_model("test_convnext", num_classes=10).state_dict())
    change(tensors)
    save_file(tensors, tmp_path / "timm.safetensors")
    return str(tmp_path / "timm.safetensors")


def test_local_weights_spare_the_hub(tmp_path):
    path = weights_file(tmp_path)
    trunk = Backbone("test_convnext", HUB, pretrained=True, weights=path).trunk
    given = load_file(path)
    for key, tensor in trunk.state_dict().items():
        assert torch.equal(tensor, given[key]), key


def test_only_safetensors_are_opened(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.safetensors")
    with pytest.raises(BackboneError, match="not a readable safetensors file"):
        Backbone("test_convnext", weights=str(tmp_path / "pickle.safetensors"))


def assert_one_sentence(caught: pytest.ExceptionInfo[BackboneError]) -> None:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("stem.0.weight"), r"stem\.0\.weight is not in the file"),
        (lambda t: t.update({"stages.7.x": torch.zeros(1)}), r"stages\.7\.x is not in test_conv"),
        (
            lambda t: t.update({"stem.1.weight": torch.zeros(7)}),
            r"stem\.1\.weight has the shape \(7,\), but test_convnext needs \(24,\)",
        ),
        (
            lambda t: t.update({"stages.1.blocks.0.mlp.fc1.weight": torch.zeros(32, 128)}),
            r"fc1\.weight has the shape \(32, 128\), but test_convnext needs \(128, 32\)",
        ),
    ],
)
def test_weights_of_another_model(tmp_path, change, message):
    with pytest.raises(BackboneError, match=message) as caught:
        Backbone("test_convnext", weights=weights_file(tmp_path, change))
    assert_one_sentence(caught)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "convnext_huge_plus"}, r"timm [\d.]+ has no such model; .*list_models"),
        ({"name": "test_convnext.no_such_tag"}, "no_such_tag.*check model.backbone.name"),
        ({"name": "vit_tiny_patch16_224"}, r"strides \[16\], but a detector needs 8, 16 and 32"),
        ({"name": "swin_tiny_patch4_window7_224"}, "takes pictures of one size only; take a conv"),
        ({"options": {"output_stride": 16}}, r"strides \[4, 8, 16\], but a detector needs"),
        ({"options": {"depht": 3}}, "depht.*check .*model.backbone.options"),
        ({"options": {"dims": [24, 48]}}, "IndexError.*check .*model.backbone.options"),
        ({"options": {"act_layer": "none"}}, "KeyError.*check .*model.backbone.options"),
        ({"options": {"drop_path_rate": "x"}}, "linspace.*check .*model.backbone.options"),
        ({"options": {"num_classes": 3}}, "options.num_classes is not free in a detector"),
        ({"options": {"in_chans": 1}}, "options.in_chans is not free in a detector"),
        ({"options": {"features_only": True}}, "options.features_only is not free"),
        (
            {"options": {"dims": [1, 2, 3, 4]}, "pretrained": True},
            "pretrained weights are for timm's own dims; drop model.backbone.options.dims, or",
        ),
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
    assert_one_sentence(caught)


class Dropped(Exception):
    """What the hub's client lets out when the line breaks in the middle: neither OS nor Runtime."""


@pytest.mark.parametrize(
    "error",
    [
        OSError("We couldn't connect to 'https://huggingface.co'\nand more\nlines"),
        ConnectionResetError(104, "Connection reset by peer"),
        RuntimeError("No pretrained weights exist for test_convnext."),
        Dropped("the read operation timed out"),
        SafetensorError("Error while deserializing header: incomplete"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_download_has_two_ways_out(monkeypatch, error):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise error
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(BackboneError, match="pretrained weights can't be loaded") as caught:
        Backbone("test_convnext", pretrained=True)
    assert_one_sentence(caught)
    assert "set model.backbone.weights to a local safetensors file" in str(caught.value)
    assert "model.backbone.pretrained: false" in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_wrong_option_is_not_called_a_failed_download():
    with pytest.raises(BackboneError, match=r"depht.*check .*model\.backbone\.options"):
        Backbone("test_convnext", {"depht": 3, **HUB}, pretrained=True)
