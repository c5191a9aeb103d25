"""A detector that begins from a whole one's weights takes all of them that mean the same."""

import pytest
import torch

from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.errors import WeightsError
from convnext_yolo.model.weights import WeightsInfo, begin_from, load_detector, save_weights


def test_fine_tuning_begins_with_all_but_the_other_classes(tmp_path, exported, info):
    """More classes than the file's: the head's outputs are new, everything else is the file's."""
    detector = build_detector(info.architecture | {"classes": 5})
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    fresh = begin_from(detector, exported, "abcde")
    theirs = load_detector(exported)[0].state_dict()
    assert fresh and all(name.startswith("head.convs.") for name in fresh)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, before[name] if name in fresh else theirs[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neck_repeats": 2}, "is not in the file; give weights of the same model"),
        ({"neck_channels": [8, 16, 32]}, "needs"),
        ({"anchors": [[[1, 2]] * 3] * 3}, "set model.anchors to these"),
    ],
)
def test_fine_tuning_of_another_model_is_refused(exported, info, change, message):
    detector = build_detector(info.architecture | change)
    with pytest.raises(WeightsError, match=message):
        begin_from(detector, exported, [entry["name"] for entry in info.classes])


def test_fine_tuning_on_the_same_classes_begins_with_everything(exported, info):
    detector = build_detector(info.architecture)
    names = [entry["name"] for entry in info.classes]
    assert begin_from(detector, exported, names) == []
    theirs = load_detector(exported)[0].state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in detector.state_dict().items())
    # The same classes in another order are other classes.
    assert begin_from(build_detector(info.architecture), exported, names[::-1])


def test_fine_tuning_ours_knows_classes_from_bins(tmp_path):
    design = {
        **{"name": "convnext_yolo", "classes": 3, "backbone": {"name": "test_convnext"}},
        **{"neck_channels": [8, 16, 24], "neck_repeats": 1, "head_channels": 16},
        **{"head_convs": 1, "distance_bins": 8},
    }
    classes = tuple({"id": i, "name": name} for i, name in enumerate("abc"))
    save_weights(
        tmp_path / "w.safetensors",
        build_detector(design).state_dict(),
        WeightsInfo(design, classes, (64, 64)),
    )
    path, more = tmp_path / "w.safetensors", build_detector(design | {"classes": 7})
    fresh = begin_from(more, path, "abcdefg")
    assert len(fresh) == 6 and all(name.startswith("head.cls_convs.") for name in fresh)
    with pytest.raises(WeightsError, match=r"head\.box_convs\.0\.weight has the shape"):
        begin_from(build_detector(design | {"distance_bins": 16}), path, "abc")
