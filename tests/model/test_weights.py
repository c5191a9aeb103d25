"""Exported weights: what is written is read back, and nothing damaged or foreign is."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convnext_yolo.model import weights
from convnext_yolo.model.errors import WeightsError
from convnext_yolo.model.weights import (
    WeightsInfo,
    load_detector,
    read_info,
    save_weights,
    tensors_sha256,
)


def rewrite(source, target, **metadata: str | None):
    """The file with other metadata; None takes a key away."""
    with safe_open(source, "pt") as file:
        held = dict(file.metadata()) | metadata
    save_file(load_file(source), target, {k: v for k, v in held.items() if v is not None})
    return target


def test_round_trip(tmp_path, tensors, info):
    path = tmp_path / "new" / "folder" / "model.safetensors"
    sha256 = save_weights(path, tensors, info)
    detector, read = load_detector(path)
    loaded = detector.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert not detector.training
    assert read == read_info(path)
    assert read.sha256 == sha256 == tensors_sha256(tensors)
    for field in ("classes", "image_px", "step", "recipe", "metrics"):
        assert getattr(read, field) == getattr(info, field)
    assert read.architecture == json.loads(json.dumps(info.architecture))
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_the_order_of_tensors_does_not_matter(tmp_path, tensors, info, exported):
    backwards = dict(reversed(tensors.items()))
    sha256 = save_weights(tmp_path / "again.safetensors", backwards, info)
    assert sha256 == read_info(exported).sha256
    names = list(load_file(tmp_path / "again.safetensors"))
    assert names == list(load_file(exported))


def test_the_hash_is_of_names_types_shapes_and_bytes():
    first = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    assert tensors_sha256(first) == tensors_sha256({"b": torch.tensor(1), "a": torch.arange(6.0)})
    strided = torch.arange(12.0)[::2] / 2
    assert tensors_sha256(first) == tensors_sha256(first | {"a": strided})
    assert tensors_sha256(first) == tensors_sha256(
        first | {"a": torch.arange(6.0).requires_grad_()}
    )
    others = (
        {"a": torch.arange(6.0)},
        {"c": torch.arange(6.0), "b": torch.tensor(1)},
        first | {"a": torch.arange(6.0).view(2, 3)},
        first | {"a": torch.arange(6.0).view(torch.int32)},
        first | {"a": torch.tensor([0.0, 1, 2, 3, 4, 5.000001])},
        first | {"b": torch.tensor([1])},
    )
    assert len({tensors_sha256(other) for other in (first, *others)}) == 7


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(7),
        torch.zeros(0),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(2, 3, 4).permute(2, 0, 1),
    ],
)
def test_any_tensor_can_be_hashed_and_saved(tmp_path, info, tensor):
    sha256 = save_weights(tmp_path / "w.safetensors", {"t": tensor}, info)
    assert tensors_sha256(load_file(tmp_path / "w.safetensors")) == sha256


def test_pretrained_weights_of_the_recipe_are_not_looked_for(tmp_path, tensors, info):
    backbone = info.architecture["backbone"]
    start = {"pretrained": True, "weights": "/gone/since.safetensors"}
    moved = WeightsInfo(
        info.architecture | {"backbone": backbone | start}, info.classes, info.image_px
    )
    save_weights(tmp_path / "w.safetensors", tensors, moved)
    detector, _ = load_detector(tmp_path / "w.safetensors")
    name, parameter = next(detector.named_parameters())
    assert torch.equal(parameter, tensors[name])


def refused(path, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        load_detector(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and len(text) < 400
    assert caught.value.exit_code == 2


def test_a_missing_file(tmp_path):
    refused(tmp_path / "none.safetensors", "no such file; `convnext-yolo export")


@pytest.mark.parametrize("content", [b"", b"\0", b"PNG no such thing", b"\xff" * 200])
def test_a_foreign_file(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    refused(tmp_path / "w.safetensors", "not a readable safetensors file")


def test_a_folder(tmp_path):
    refused(tmp_path, "not a readable safetensors file")


def test_a_pickle_is_not_opened(tmp_path, tensors):
    torch.save(tensors, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "not a readable safetensors file")


def test_safetensors_of_somebody_else(tmp_path, tensors):
    save_file(tensors, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "`format` is None, not 'convnext-yolo weights 1'")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999999])
def test_a_truncated_file(tmp_path, exported, share):
    content = exported.read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "w.safetensors", "not a readable safetensors file")


def test_any_flipped_bit_is_found_or_harmless(tmp_path, exported, tensors):
    content = exported.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    with safe_open(exported, "pt") as file:
        metadata = len(json.dumps(file.metadata()))
    rng = random.Random(0)
    places = [
        *(rng.randrange(metadata) for _ in range(80)),  # our part of the header
        *(rng.randrange(header) for _ in range(40)),  # names, shapes and offsets
        *(rng.randrange(header, len(content)) for _ in range(20)),
    ]
    path = tmp_path / "w.safetensors"
    survivors = 0
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            detector, _ = load_detector(path)
        except WeightsError:
            continue
        survivors += 1
        assert place < header  # a letter of the recipe or of a class name
        loaded = detector.state_dict()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert survivors < 60


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "convnext-yolo weights 9"}, "`format` is 'convnext-yolo weights 9'"),
        ({"classes": None}, "metadata is damaged"),
        ({"classes": "7"}, "metadata is damaged"),
        ({"step": "many"}, "metadata is damaged"),
        ({"architecture": "{"}, "metadata is damaged"),
        ({"architecture": "[]"}, "do not fit the architecture"),
        ({"architecture": "{}"}, "do not fit the architecture"),
        ({"architecture": '{"name": "yolo99"}'}, "do not fit the architecture"),
        ({"sha256": "0" * 64}, "differ from their sha256"),
    ],
)
def test_damaged_metadata(tmp_path, exported, metadata, message):
    refused(rewrite(exported, tmp_path / "w.safetensors", **metadata), message)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 4},
        {"neck_repeats": 2},
        {"neck_channels": [8, 16]},
        {"adapter_channels": [-1, 24, 32]},
        {"anchors": []},
        {"anchors": [[[1, 2], [3, 4]], [[1, 2]], [[1, 2]]]},
        {"backbone": {"name": "no_such_backbone"}},
        {"backbone": {"name": "test_convnext", "options": {"depths": [9]}}},
        {"surprise": 1},
    ],
)
def test_tensors_of_another_architecture(tmp_path, exported, info, change):
    architecture = json.dumps(info.architecture | change)
    path = rewrite(exported, tmp_path / "w.safetensors", architecture=architecture)
    refused(path, "do not fit the architecture in its metadata")


def test_nothing_half_written_stays(tmp_path, tensors, info, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the one before")

    def full_disk(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(WeightsError, match=r"can't be written .*No space left on device"):
        save_weights(path, tensors, info)
    assert path.read_bytes() == b"the one before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_interruption_leaves_nothing(tmp_path, tensors, info, monkeypatch):
    def interrupted(tensors, target, metadata):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path / "model.safetensors", tensors, info)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_can_not_be_written(tmp_path, tensors, info):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"file/w\.safetensors: can't be written"):
        save_weights(tmp_path / "file" / "w.safetensors", tensors, info)
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match="folder: can't be written"):
        save_weights(tmp_path / "folder", tensors, info)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
