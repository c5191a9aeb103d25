import pytest
import torch

from convnext_yolo.model.registry import FeatureRegistry


def test_a_feature_is_handed_over_once():
    registry, feature = FeatureRegistry(), torch.zeros(1)
    registry.put("P3", feature)
    assert registry.take("P3") is feature
    registry.assert_empty()
    with pytest.raises(KeyError, match="nobody put P3; waiting here: nothing"):
        registry.take("P3")
    registry.put("P3", feature)  # the name is free again


def test_nothing_is_put_twice():
    registry = FeatureRegistry()
    registry.put("P3", torch.zeros(1))
    with pytest.raises(KeyError, match="P3 was already handed over in this forward pass"):
        registry.put("P3", torch.zeros(1))


def test_a_wrong_name_hears_what_is_there():
    registry = FeatureRegistry()
    registry.put("P4", torch.zeros(1))
    registry.put("P3", torch.zeros(1))
    with pytest.raises(KeyError, match=r"nobody put P6; waiting here: .*P3.*P4"):
        registry.take("P6")


def test_what_nobody_takes_is_noticed():
    registry = FeatureRegistry()
    for name in ("P5", "P3", "P4"):
        registry.put(name, torch.zeros(1))
    registry.take("P4")
    with pytest.raises(RuntimeError, match=r"never taken .*P3.*P5"):
        registry.assert_empty()
