"""What holds for each of the three detectors, all on small trunks."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from convnext_yolo.model.assign import Targets
from convnext_yolo.model.csp import CSPDarknet
from convnext_yolo.model.detector import Detector, build_criterion, build_detector
from convnext_yolo.model.head import AlignedHead
from convnext_yolo.model.losses import AlignedCriterion, AnchorCriterion
from convnext_yolo.model.norms import micro_batch_norms
from convnext_yolo.model.registry import FeatureRegistry

NAMES = ("yolov5", "seed_convnext_yolo", "convnext_yolo")
BINS = 8
GAINS = {
    AnchorCriterion: {"box": 0.05, "obj": 1.0, "cls": 0.5},
    AlignedCriterion: {"box": 7.5, "cls": 0.5, "dfl": 1.5},
}
# An object for each level of each head, on a 128 px picture.
TARGETS = Targets(
    torch.tensor([0, 0, 1, 1]),
    torch.tensor([0, 2, 1, 1]),
    torch.tensor([[4.0, 5, 20, 19], [40, 24, 73, 56], [16, 16, 80, 81], [2, 8, 120, 118]]),
)


@pytest.fixture(scope="module")
def architectures(architecture) -> dict[str, dict[str, Any]]:
    """Of the three detectors, by name."""
    ours = {
        "backbone": {"name": "test_convnext"},
        "neck_channels": [16, 24, 32],
        "neck_repeats": 1,
        "head_channels": 16,
        "head_convs": 1,
        "distance_bins": BINS,
    }
    anchors = architecture["anchors"]
    small = {"depth": 0.33, "width": 0.125, "anchors": anchors}
    return {
        "yolov5": {"name": "yolov5", "classes": 3, **small},
        "seed_convnext_yolo": architecture,
        "convnext_yolo": {"name": "convnext_yolo", "classes": 3, **ours},
    }


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def detector(name, architectures) -> Detector:
    """In evaluation mode, its BatchNorms away from their start; tests leave it as it is."""
    torch.manual_seed(0)
    detector = build_detector(architectures[name]).eval()
    for norm in micro_batch_norms(detector):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
    return detector


def pictures(side_px: tuple[int, int] = (64, 96), seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 3, *side_px), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def raw_maps(detector: Detector, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return detector(images).levels


def assert_same(first, second) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def total_loss(detector: Detector, images: torch.Tensor) -> torch.Tensor:
    kind = AlignedCriterion if isinstance(detector.head, AlignedHead) else AnchorCriterion
    criterion = build_criterion(detector, GAINS[kind])
    assert isinstance(criterion, kind)
    return sum(criterion(detector.head, detector(images).levels, TARGETS).values())


def gradients(detector: Detector) -> dict[str, torch.Tensor]:
    """Of the whole loss, in training mode."""
    detector.train().zero_grad()
    total_loss(detector, pictures((128, 128))).backward()
    return {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


def sees_objects_on_every_level(detector: Detector) -> Detector:
    """A copy; the cells of our head then start with boxes that are about two strides wide."""
    detector = copy.deepcopy(detector)
    if isinstance(detector.head, AlignedHead):
        with torch.no_grad():
            for conv in detector.head.box_convs:
                conv.bias.zero_().view(4, BINS)[:, 1] = 4
    return detector


# The forward pass ------------------------------------------------------------------------------


def test_shapes(detector):
    levels = raw_maps(detector, pictures())
    sizes = ((8, 12), (4, 6), (2, 3))
    cells = 96 + 24 + 6
    if isinstance(detector.head, AlignedHead):
        want, candidates = [(2, *size, 4 * BINS + 3) for size in sizes], cells
    else:
        want, candidates = [(2, 3, *size, 5 + 3) for size in sizes], 3 * cells
    assert [tuple(level.shape) for level in levels] == want
    boxes, scores = detector.decode(detector(pictures()))
    assert boxes.shape == (2, candidates, 4) and scores.shape == (2, candidates, 3)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_bytes_and_floats_are_the_same_picture(detector):
    assert_same(raw_maps(detector, pictures()), raw_maps(detector, pictures().float() / 255))


def test_channels_last_is_the_same_picture(detector):
    images = pictures()
    plain = raw_maps(detector, images)
    model = copy.deepcopy(detector).to(memory_format=torch.channels_last)
    for other in (
        raw_maps(detector, images.to(memory_format=torch.channels_last)),
        raw_maps(model, images.to(memory_format=torch.channels_last)),
    ):
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_pictures_of_a_batch_do_not_mix(detector):
    together, alone = raw_maps(detector, pictures()), raw_maps(detector, pictures()[1:])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-4)


def test_a_neck_that_ignores_a_level_is_noticed(detector):
    class Short(torch.nn.Module):
        def forward(self, features: FeatureRegistry) -> list[torch.Tensor]:
            return [features.take("P3"), features.take("P4")]

    other = copy.deepcopy(detector)
    other.neck = Short()
    with pytest.raises(RuntimeError, match=r"never taken from the registry: \['P5'\]"):
        other(pictures())


def test_threads_do_not_mix(detector):
    """Two forward passes of one model at once, on pictures of different sizes."""
    jobs = [pictures((64, 32 * (1 + k % 3)), seed=k) for k in range(8)]
    want = [raw_maps(detector, images) for images in jobs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(partial(raw_maps, detector), jobs))
    for alone, together in zip(want, found, strict=True):
        assert_same(alone, together)


# Copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(detector, copied):
    other = copied(detector)
    before = raw_maps(detector, pictures())
    assert_same(before, raw_maps(other, pictures()))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(before, raw_maps(detector, pictures()))


def test_state_dict_round_trip(name, detector, architectures):
    torch.manual_seed(1)
    other = build_detector(architectures[name]).eval()
    assert not torch.equal(raw_maps(detector, pictures())[0], raw_maps(other, pictures())[0])
    other.load_state_dict(detector.state_dict())
    assert_same(raw_maps(detector, pictures()), raw_maps(other, pictures()))


def test_the_same_seed_is_the_same_model(name, architectures):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_detector(architectures[name]).state_dict())
    assert_same(models[0].values(), models[1].values())


# Training --------------------------------------------------------------------------------------


def test_ours_has_no_batchnorm(architectures):
    detector = build_detector(architectures["convnext_yolo"])
    assert not [name for name, m in detector.named_modules() if isinstance(m, _NormBase)]
    assert not any("running" in name for name in detector.state_dict())


def test_every_parameter_gets_a_gradient(detector):
    detector = sees_objects_on_every_level(detector)
    found = gradients(detector)
    for name, _ in detector.named_parameters():
        assert name in found and found[name].isfinite().all() and found[name].any(), name


def test_pictures_without_objects_train(detector):
    detector = copy.deepcopy(detector).train()
    kind = AlignedCriterion if isinstance(detector.head, AlignedHead) else AnchorCriterion
    nothing = Targets(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0, 4))
    criterion = build_criterion(detector, GAINS[kind])
    losses = criterion(detector.head, detector(pictures()).levels, nothing)
    sum(losses.values()).backward()
    assert losses["box"] == 0 < sum(losses.values())
    grads = [p.grad for p in detector.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert any(g.any() for g in grads)


def checkpoint_stages(detector: Detector) -> None:
    """Activations of the backbone's stages are computed a second time instead of kept."""
    if not isinstance(detector.backbone, CSPDarknet):
        detector.backbone.trunk.set_grad_checkpointing(True)
        return
    for name, stage in detector.backbone.named_children():
        assert name in ("stem", "stage2", "stage3", "stage4", "stage5", "pool")
        stage.forward = partial(checkpoint, stage.forward, use_reentrant=False)


def checkpoint_backbone(detector: Detector) -> None:
    """The whole backbone at once, registry and all."""
    backbone = detector.backbone
    backbone.forward = partial(checkpoint, backbone.forward, use_reentrant=False)


def checkpoint_neck(detector: Detector) -> None:
    """All of it behind the registry, which a recomputation would find empty."""
    detector.neck.mix = partial(checkpoint, detector.neck.mix, use_reentrant=False)


@pytest.mark.parametrize("checkpointed", [checkpoint_stages, checkpoint_backbone, checkpoint_neck])
def test_activation_checkpointing_changes_no_gradient(detector, checkpointed):
    plain, other = copy.deepcopy(detector), copy.deepcopy(detector)
    calls = []
    checkpointed(other)
    part = other.neck if checkpointed is checkpoint_neck else other.backbone
    *_, last = (m for m in part.modules() if isinstance(m, nn.Conv2d))
    last.register_forward_hook(lambda *_: calls.append(1))
    want, found = gradients(plain), gradients(other)
    assert len(calls) == 2  # or nothing was checkpointed
    assert want.keys() == found.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-6)


# torch.compile ---------------------------------------------------------------------------------


def assert_one_graph(model: Detector) -> None:
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    for _ in range(2):  # the second time without tracing
        assert_same(raw_maps(model, pictures()), raw_maps(compiled, pictures()))
    for a, b in zip(micro_batch_norms(model), micro_batch_norms(compiled), strict=True):
        assert torch.equal(a.take_pending(), b.take_pending())


def test_the_forward_pass_compiles_as_one_graph(detector):
    assert_one_graph(detector)


def test_the_forward_pass_of_training_compiles_as_one_graph(architectures):
    """The seed's detector has both timm's trunk and the norms that gather statistics."""
    torch.manual_seed(0)
    assert_one_graph(build_detector(architectures["seed_convnext_yolo"]).train())


@pytest.mark.long
def test_a_compiled_model_gives_the_same_maps(architectures):
    """With torch's own compiler, which takes a minute even for this."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build_detector(architectures["convnext_yolo"]).eval()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    for a, b in zip(raw_maps(model, pictures()), raw_maps(compiled, pictures()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
