"""The backbone: any timm model whose stages reach strides 8, 16 and 32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import BackboneError
from .neck import LEVELS
from .norms import replace_batch_norms
from .registry import FeatureRegistry

STRIDES = (8, 16, 32)
SHAPES = {"depths", "dims"}  # options that make another model than the one with weights


class Backbone(nn.Module):
    """A timm trunk that puts P3, P4, P5 (strides 8, 16, 32) into the feature registry.

    The whole timm model is kept rather than its `features_only` wrapper: the wrapper hides the
    parameter groups, and layer-wise learning-rate decay then silently does nothing.

    Args:
        name: timm's name, such as "convnext_tiny" or "convnext_tiny.fb_in1k".
        options: further arguments of the timm model, such as `depths`, `dims`, `drop_path_rate`.
        pretrained: take timm's published weights from its hub.
        weights: a local safetensors file with timm's key names, instead of the hub.

    Raises:
        BackboneError: unknown name, other strides, weights that can't be had or don't fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
    ):
        super().__init__()
        if pretrained and (changed := sorted(SHAPES & set(options or {}))):
            raise BackboneError(
                f"backbone {name}: pretrained weights are for timm's own {changed[0]}; drop "
                f"model.backbone.options.{changed[0]}, or set model.backbone.pretrained: false"
            )
        options = dict(options or {})
        tensors, source = None, ""
        if weights is not None:
            tensors, source = _read_weights(weights), weights
        elif pretrained and "conv_mlp" in options:
            # timm loads published weights in the form that they were published in, and no other.
            plain = {key: value for key, value in options.items() if key != "conv_mlp"}
            tensors, source = _create(name, plain, pretrained=True).state_dict(), "from the hub"
        self.trunk = _create(name, options, pretrained and tensors is None)
        config = self.trunk.pretrained_cfg
        found = _stages(self.trunk, name)
        self.indices = tuple(index for index, _ in found)
        self.channels = tuple(channels for _, channels in found)
        # Pictures come in as the trunk's weights have learnt to see them. Buffers, so that exported
        # weights do not depend on what a later timm says about the name.
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(3, 1, 1))
        everything = set(self.trunk.state_dict())
        # What comes after the last stage would be parameters that never see a gradient.
        self.trunk.prune_intermediate_layers(list(self.indices), prune_norm=True, prune_head=True)
        if tensors is not None:
            classifier = config.get("classifier") or "head"
            classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
            unused = everything - set(self.trunk.state_dict())
            own = {k: t for k, t in tensors.items() if not k.startswith(classifier)}
            own = {k: t for k, t in own.items() if k not in unused}
            _fill(self.trunk, own, name, source)
        # After the weights are there. The statistics then do not depend on the world size.
        replace_batch_norms(self.trunk)

    def checkpoint_activations(self) -> None:
        """Trades compute for memory: what happens inside a stage is computed again for gradients.

        Raises:
            BackboneError: the trunk can't.
        """
        try:
            self.trunk.set_grad_checkpointing(True)
        except AssertionError as error:
            raise BackboneError(
                f"backbone {type(self.trunk).__name__}: {error}; set "
                "deepspeed.activation_checkpointing: false"
            ) from error

    def forward(self, images: Tensor, features: FeatureRegistry) -> None:
        """`[B, 3, H, W]`, floats in [0, 1] → puts P3, P4, P5 into `features`."""
        maps = self.trunk.forward_intermediates(
            (images - self.mean) / self.std, indices=self.indices, intermediates_only=True
        )
        for level, feature in zip(LEVELS, maps, strict=True):
            features.put(level, feature)


def _create(name: str, options: dict[str, Any], pretrained: bool) -> Any:
    import timm  # takes seconds to import, and --help must not wait for it

    if not timm.is_model(name):
        raise BackboneError(
            f"backbone {name}: timm {timm.__version__} has no such model; "
            "`timm.list_models('convnext*')` lists them"
        )
    for key in ("num_classes", "in_chans", "features_only", "pretrained"):
        if key in options:
            raise BackboneError(
                f"backbone {name}: model.backbone.options.{key} is not free in a detector; drop it"
            )
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except Exception as error:  # timm answers a wrong option with whatever breaks first
        # A broken download too: hub, HTTP and safetensors have their own errors, without a base.
        if pretrained and _builds(name, options):
            raise BackboneError(
                f"backbone {name}: its pretrained weights can't be loaded ({_cause(error)}); "
                "either set model.backbone.weights to a local safetensors file, or "
                "model.backbone.pretrained: false to train from scratch"
            ) from error
        raise BackboneError(
            f"backbone {name}: timm can't build it ({_cause(error)}); "
            "check model.backbone.name and model.backbone.options"
        ) from error


def _builds(name: str, options: dict[str, Any]) -> bool:
    """Whether a model can be built without weights: else it is not they that are missing."""
    import timm

    try:
        timm.create_model(name, num_classes=0, **options)
    except Exception:
        return False
    return True


def _stages(trunk: Any, name: str) -> list[tuple[int, int]]:
    """Index and channels of the stages with strides 8, 16 and 32."""
    info = {e["reduction"]: (i, e["num_chs"]) for i, e in enumerate(trunk.feature_info)}
    if any(stride not in info for stride in STRIDES):
        raise BackboneError(
            f"backbone {name}: its stages have strides {sorted(info)}, but a detector needs "
            "8, 16 and 32; take a convolutional backbone such as convnext_tiny"
        )
    if trunk.pretrained_cfg.get("fixed_input_size"):
        raise BackboneError(
            f"backbone {name}: takes pictures of one size only; take a convolutional backbone such "
            "as convnext_tiny"
        )
    return [info[stride] for stride in STRIDES]


def _read_weights(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise BackboneError(
            f"backbone weights {path}: no such file; give a safetensors file with timm's names"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BackboneError(
            f"backbone weights {path}: not a readable safetensors file ({_cause(error)}); "
            "give a safetensors file with timm's names"
        ) from error


def _fill(trunk: nn.Module, tensors: dict[str, Tensor], name: str, path: str) -> None:
    """Loads a trunk. timm itself would skip over what does not fit, and say so in a log only."""
    wanted = trunk.state_dict()
    for key in sorted(tensors.keys() ^ wanted.keys()):
        where = "is not in the file" if key in wanted else f"is not in {name}"
        raise BackboneError(
            f"backbone weights {path}: {key} {where}; give weights of the same timm model"
        )
    for key, own in wanted.items():
        # A 1x1 convolution and a linear layer hold the same numbers (timm's conv_mlp).
        if tensors[key].squeeze().shape != own.squeeze().shape:
            raise BackboneError(
                f"backbone weights {path}: {key} has the shape {tuple(tensors[key].shape)}, but "
                f"{name} needs {tuple(own.shape)}; give weights of the same timm model"
            )
    trunk.load_state_dict({key: tensors[key].reshape(own.shape) for key, own in wanted.items()})


def _cause(error: Exception) -> str:
    """The first line of an error: the hub's and torch's run over pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
