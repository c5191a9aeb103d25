"""Upstream's files become ours: every tensor in its place, or one sentence about why not."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from convnext_yolo.launch.cli import main
from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.errors import WeightsError
from convnext_yolo.model.weights import load_detector
from convnext_yolo.model.yolov5_import import (
    COCO_IDS,
    COCO_NAMES,
    MODELS,
    import_yolov5,
    upstream_name,
)

NAMES = ["cell", "größer", "c"]
# Anchors that are not COCO's, exact in 16 bits.
ANCHORS = (((8, 16), (24, 8)), ((32, 48), (64, 32)), ((96, 64), (128, 320)))


def architecture(model: str, classes: int = len(NAMES)) -> dict[str, Any]:
    depth, width = MODELS[model]
    return {
        "name": "yolov5",
        "classes": classes,
        "depth": depth,
        "width": width,
        "anchors": [[[float(v) for v in pair] for pair in level] for level in ANCHORS],
    }


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    """A YOLOv5n whose every number is its own, exact in 16 bits."""
    torch.manual_seed(0)
    tensors = build_detector(architecture("yolov5n")).state_dict()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and name != "head.anchors":
            tensor.copy_(torch.rand_like(tensor).half())
        elif not tensor.is_floating_point():
            tensor.fill_(1234)
    return tensors


@pytest.fixture(scope="module")
def upstream(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by upstream's names, in 16 bits, anchors in strides."""
    tensors = {upstream_name(name): t.clone() for name, t in ours.items()}
    tensors["model.24.anchors"] /= torch.tensor([8, 16, 32])[:, None, None]
    return {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}


@pytest.fixture
def safetensors(tmp_path: Path) -> Callable[..., Path]:
    def write(tensors: dict[str, Tensor], **metadata: Any) -> Path:
        path = tmp_path / "upstream.safetensors"
        save_file(tensors, path, {k: json.dumps(v) for k, v in metadata.items()} or None)
        return path

    return write


@pytest.fixture
def pt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes what upstream would: objects of classes that exist only while it is written."""

    def write(tensors: dict[str, Tensor], key: str = "model", **attributes: Any) -> Path:
        modules = {name: types.ModuleType(name) for name in ("models", "models.yolo", "models.x")}
        kinds = {}
        for module, kind in (("models.yolo", "Model"), ("models.x", "Layer")):
            kinds[kind] = type(kind, (nn.Module,), {"__module__": module})
            setattr(modules[module], kind, kinds[kind])
        with monkeypatch.context() as patch:
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            model = kinds["Model"]()
            for name, tensor in tensors.items():
                *path, last = name.split(".")
                holder = model
                for part in path:
                    if part not in holder._modules:
                        holder.add_module(part, kinds["Layer"]())
                    holder = holder._modules[part]
                if tensor.is_floating_point() and last in ("weight", "bias"):
                    holder.register_parameter(last, nn.Parameter(tensor))
                else:
                    holder.register_buffer(last, tensor)
            for name, value in attributes.items():
                setattr(model, name, value)
            other = kinds["Layer"]() if key == "ema" else None
            saved = {"epoch": -1, "ema": None, "model": other, "optimizer": None, key: model}
            torch.save(saved, tmp_path / "upstream.pt")
        assert "models.yolo" not in sys.modules
        return tmp_path / "upstream.pt"

    return write


def imported(source: Path, model: str = "yolov5n") -> tuple[dict[str, Tensor], Any]:
    output = source.with_name("imported.safetensors")
    sha256, info = import_yolov5(source, model, output)
    detector, read = load_detector(output)
    assert read.sha256 == sha256
    assert (read.architecture, read.classes, read.image_px) == (
        info.architecture,
        info.classes,
        info.image_px,
    )
    return detector.state_dict(), read


def refusal(source: Path, model: str = "yolov5n") -> str:
    with pytest.raises(WeightsError) as caught:
        import_yolov5(source, model, source.with_name("never.safetensors"))
    assert not source.with_name("never.safetensors").exists()
    sentence = str(caught.value)
    assert sentence.startswith(f"weights {source}: ") and "\n" not in sentence
    assert caught.value.exit_code == 2
    return sentence


def test_there_and_back_is_the_identity(ours, upstream, safetensors) -> None:
    tensors, info = imported(safetensors(upstream, names=NAMES))
    assert tensors.keys() == ours.keys()
    for name, tensor in ours.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert info.architecture == architecture("yolov5n")
    assert info.classes == tuple({"id": i, "name": n} for i, n in enumerate(NAMES))
    assert info.image_px == (640, 640)


@pytest.mark.parametrize("model", list(MODELS))
def test_upstream_names_are_those_of_its_layers(model: str) -> None:
    with torch.device("meta"):
        own = build_detector(architecture(model)).state_dict()
    names = [upstream_name(name) for name in own]
    assert len(set(names)) == len(names)
    layers = {int(name.split(".")[1]) for name in names}
    assert layers == set(range(25)) - {11, 12, 15, 16, 19, 22}  # upsampling and joins have none
    norm = r"bn\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    conv = rf"(conv\.weight|{norm})"
    plain, pools = "(0|1|3|5|7|10|14|18|21)", r"9\.cv[12]"
    c3 = r"(2|4|6|8|13|17|20|23)\.(cv[123]|m\.\d+\.cv[12])"
    detect = r"24\.(anchors|m\.[012]\.(weight|bias))"
    pattern = rf"model\.(({plain}|{pools}|{c3})\.{conv}|{detect})"
    assert all(re.fullmatch(pattern, name) for name in names)


@pytest.mark.parametrize("key", ["model", "ema"])
@pytest.mark.parametrize("names", [NAMES, dict(enumerate(NAMES))], ids=["list", "dict"])
def test_pt_files(ours, upstream, pt, key: str, names: Any) -> None:
    # Older files keep the anchors twice.
    extra = {"model.24.anchor_grid": torch.zeros(3, 1, 2, 1, 1, 2)}
    strides = torch.tensor([8.0, 16, 32])
    source = pt(upstream | extra, key, names=names, stride=strides, yaml={"nc": 3})
    tensors, info = imported(source)
    assert tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in ours.items())
    assert [c["name"] for c in info.classes] == NAMES


def test_coco_classes_get_cocos_ids(safetensors) -> None:
    assert (len(COCO_IDS), len(set(COCO_NAMES)), COCO_IDS[0], COCO_IDS[-1]) == (80, 80, 1, 90)
    ids = dict(zip(COCO_NAMES, COCO_IDS, strict=True))
    # from COCO's published list of categories
    known = {"stop sign": 13, "backpack": 27, "handbag": 31, "wine glass": 46, "toilet": 70}
    known |= {"dining table": 67, "bed": 65, "tv": 72, "refrigerator": 82, "book": 84}
    assert {name: ids[name] for name in known} == known
    tensors = build_detector(architecture("yolov5n", 80)).state_dict()
    upstream = {upstream_name(name): tensor for name, tensor in tensors.items()}
    _, info = imported(safetensors(upstream, names=list(COCO_NAMES)))
    assert info.classes == tuple(
        {"id": i, "name": n} for i, n in zip(COCO_IDS, COCO_NAMES, strict=True)
    )
    _, info = imported(safetensors(upstream, names=list(reversed(COCO_NAMES))))
    assert [c["id"] for c in info.classes] == list(range(80))


def test_the_bundled_table_is_cocos(shared_data: Path) -> None:
    document = json.loads((shared_data / "coco_cc_val100/instances.json").read_text())
    categories = sorted((c["id"], c["name"]) for c in document["categories"])
    assert categories == list(zip(COCO_IDS, COCO_NAMES, strict=True))


def test_weights_that_do_not_fit(upstream, safetensors) -> None:
    key = "model.4.m.1.cv2.bn.running_var"
    missing = {name: tensor for name, tensor in upstream.items() if name != key}
    sentence = refusal(safetensors(missing, names=NAMES))
    assert f"{key} is not there" in sentence and "yolov5n" in sentence

    whole = safetensors(upstream, names=NAMES)
    for model in ("yolov5s", "yolov5m", "yolov5l"):
        assert "they look like yolov5n's: give --model yolov5n" in refusal(whole, model)

    sentence = refusal(safetensors(upstream, names=["a", "b"]))
    assert "2 classes" in sentence and "(16, 64, 1, 1)" in sentence and "model.24.m.0" in sentence
    spare = upstream | {"model.25.conv.weight": torch.zeros(1)}
    assert "model.25.conv.weight has no place" in refusal(safetensors(spare, names=NAMES))
    anchors = upstream | {"model.24.anchors": torch.ones(4, 2, 2)}
    assert "model.24.anchors" in refusal(safetensors(anchors, names=NAMES))


@pytest.mark.parametrize(
    "names",
    [None, [], {}, [1, 2, 3], {"0": "a", "2": "b"}, {"x": "a"}, "abc", 3],
    ids=str,
)
def test_classes_must_have_names(upstream, safetensors, names: Any) -> None:
    assert "`names`" in refusal(safetensors(upstream, names=names, yaml={}))


def test_what_upstream_can_be_and_ours_is_not(upstream, safetensors, pt) -> None:
    sentence = refusal(safetensors(upstream, names=NAMES, yaml={"activation": "nn.ReLU()"}))
    assert "nn.ReLU()" in sentence
    strides = torch.tensor([8.0, 16, 32, 64])
    assert "[8.0, 16.0, 32.0, 64.0]" in refusal(pt(upstream, names=NAMES, stride=strides))
    assert "`names`" in refusal(pt(upstream))


def test_files_that_are_no_weights(tmp_path: Path, upstream, pt) -> None:
    for name in ("absent.safetensors", "absent.pt"):
        assert "no such file" in refusal(tmp_path / name)
    for name in ("text.safetensors", "text.pt"):
        (tmp_path / name).write_text("not weights at all")
        assert "give" in refusal(tmp_path / name) or "fetch" in refusal(tmp_path / name)
    whole = pt(upstream, names=NAMES)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-1000])
    assert "not a whole zip" in refusal(tmp_path / "cut.pt")
    for value in ({"model": None}, {}, [1], {"model": {"a": torch.ones(1)}}):
        torch.save(value, tmp_path / "other.pt")
        assert "is a model" in refusal(tmp_path / "other.pt")
    save_file(upstream, tmp_path / "m.safetensors", {"names": "[cell"})
    assert "no JSON" in refusal(tmp_path / "m.safetensors")


def test_the_command(upstream, safetensors, tmp_path: Path, capsys) -> None:
    source, output = safetensors(upstream, names=NAMES), tmp_path / "new" / "w.safetensors"
    words = ["import", "--yolov5", str(source), "--output", str(output)]
    assert main([*words, "--model", "yolov5n", "--image-px", "320"]) == 0
    printed = capsys.readouterr().out
    assert "yolov5n, 3 classes" in printed and re.search(r"sha256 [0-9a-f]{64}\n", printed)
    assert load_detector(output)[1].image_px == (320, 320)
    output.unlink()

    assert main([*words, "--model", "yolov5s"]) == 2
    assert "give --model yolov5n" in capsys.readouterr().err
    for more in ([], ["--model", "yolov5x"], ["--model", "yolov5n", "--image-px", "100"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, *more])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.strip().splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["import", "--output", str(output)])
    assert not output.exists()
