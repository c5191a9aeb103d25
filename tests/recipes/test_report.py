from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from convnext_yolo.data_prep.formats import read_coco
from convnext_yolo.data_prep.reader import FileReader, ShardReader
from convnext_yolo.model.detector import build_detector
from convnext_yolo.model.predictor import Predictor
from convnext_yolo.model.weights import WeightsInfo, save_weights
from convnext_yolo.recipes.curves import _smooth
from convnext_yolo.recipes.report import ReportError, draw_predictions, report

ARCHITECTURE: dict[str, Any] = {
    "name": "seed_convnext_yolo",
    "classes": 3,
    "backbone": {"name": "test_convnext"},
    "adapter_channels": [16, 24, 32],
    "neck_channels": [16, 24, 32],
    "neck_repeats": 1,
    "anchors": [[[10, 10], [20, 20]], [[30, 30], [40, 40]], [[60, 60], [90, 90]]],
}


@pytest.fixture(autouse=True)
def no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its global state keeps figures for ever and is not safe under threads."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that get written, to look into."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        savefig(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def records(epochs: int = 6) -> list[dict[str, Any]]:
    """Metrics as `train` writes them: some a twentieth of an epoch, validation every other one."""
    result: list[dict[str, Any]] = []
    for i in range(1, 20 * epochs + 1):
        epoch, wave = i / 20, 0.01 * math.sin(i)
        losses = {"box": 0.1 / epoch + wave, "obj": 0.2 + wave, "cls": 0.02}
        result.append({"kind": "train", "step": i, "epoch": epoch, **losses, "lr": 1e-3 / epoch})
        if i % 40 == 0:
            found = {"AP": 0.05 * epoch, "AP50": 0.1 * epoch}
            result.append({"kind": "val", "step": i, "epoch": epoch, **losses, **found})
    return result


def make_run(folder: Path, metrics: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(r) + "\n" for r in (records() if metrics is None else metrics)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a detector that finds the same everywhere: 6 large objects, 24 small ones less surely."""
    torch.manual_seed(0)
    detector = build_detector(ARCHITECTURE)
    with torch.no_grad():
        for conv, label, logit in zip(detector.head.convs, (1, 0, 2), (-9, 0.5, 2), strict=True):
            conv.bias.fill_(-9)
            first_anchor = conv.bias[:8]
            first_anchor[:4] = 0  # the middle of the cell, the size of the anchor
            first_anchor[[4, 5 + label]] = logit
    classes = tuple({"id": i + 1, "name": name} for i, name in enumerate(("RBC", "WBC", "Pl$at_")))
    info = WeightsInfo(ARCHITECTURE, classes, (64, 96), step=77, metrics={"AP": 0.1234})
    path = tmp_path_factory.mktemp("export") / "model.safetensors"
    save_weights(path, detector.state_dict(), info)
    return path


def lines_of(figure: Figure, panel: int) -> list[tuple[list[float], list[float]]]:
    return [
        (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in figure.axes[panel].lines
    ]


def labels_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_the_curves_show_what_the_metrics_say(tmp_path, drawn, capsys):
    run = make_run(tmp_path / "first")
    output = tmp_path / "new" / "folder"
    assert report([run], output) == [output / "curves.png"]
    assert [path.name for path in output.iterdir()] == ["curves.png"]
    (figure,) = drawn
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["Box loss", "Objectness loss", "Class loss"]
    assert titles[3].startswith("Average precision") and titles[4] == "Learning rate"
    train = [r for r in records() if r["kind"] == "train"]
    val = [r for r in records() if r["kind"] == "val"]
    for panel, key in enumerate(("box", "obj", "cls")):
        raw, smooth, validation = lines_of(figure, panel)
        assert raw == ([r["epoch"] for r in train], [r[key] for r in train])
        assert smooth == (raw[0], _smooth(np.array(raw[1])).tolist())
        assert validation == ([2, 4, 6], [r[key] for r in val])
    assert lines_of(figure, 3) == [([2, 4, 6], [r[key] for r in val]) for key in ("AP50", "AP")]
    assert lines_of(figure, 4)[0][1] == [r["lr"] for r in train]
    assert figure.get_suptitle() == "first: AP 0.300, AP50 0.600"
    assert labels_of(figure) == ["train, smoothed", "train, as logged", "validation"]
    picture = imread(output / "curves.png")
    assert picture.shape[:2] == (1080, 1800) and picture[..., :3].std() > 0.05
    sentence = capsys.readouterr().out
    assert f"run {run}: no model.safetensors yet" in sentence and sentence.count("\n") == 1


def test_several_runs_have_a_colour_and_a_name_each(tmp_path, drawn):
    runs = [make_run(tmp_path / name, records(epochs)) for name, epochs in (("a", 2), ("_b$", 4))]
    report(runs, tmp_path)
    (figure,) = drawn
    assert labels_of(figure)[3:] == ["a: AP 0.100, AP50 0.200", r"b\$: AP 0.200, AP50 0.400"]
    colours = [[line.get_color() for line in axes.lines] for axes in figure.axes]
    first, second = colours[0][0], colours[0][3]
    assert first != second
    assert colours[:3] == [[first] * 3 + [second] * 3] * 3
    assert colours[3] == [first, first, second, second] and colours[4] == [first, second]
    assert all(4 <= axes.get_xlim()[1] < 4.2 for axes in figure.axes)


def test_runs_of_one_name_are_told_apart(tmp_path, drawn):
    runs = [make_run(tmp_path / part / "same") for part in ("x", "y")]
    report(runs, tmp_path)
    assert [label.split(":")[0] for label in labels_of(drawn[0])[3:]] == [str(r) for r in runs]


@pytest.mark.parametrize(
    "metrics",
    [
        records()[:1],
        [r for r in records() if r["kind"] == "train"],
        [r for r in records() if r["kind"] == "val"],
        [{"kind": "train", "step": 1, "epoch": 0.1, "box": None, "lr": 0.0}],
        [r | {"box": math.nan, "AP": -1.0, "AP50": -1.0} for r in records()],
        [r | {"AP": 0.0, "AP50": 0.0, "obj": math.inf} for r in records()],
    ],
    ids=["one record", "train only", "val only", "numbers missing", "nothing to find", "infinite"],
)
def test_poor_metrics_are_drawn_as_far_as_they_go(tmp_path, metrics):
    files = report([make_run(tmp_path / "run", metrics)], tmp_path)
    assert imread(files[0]).std() > 0


def test_a_run_that_grows_is_drawn_up_to_its_last_whole_line(tmp_path, drawn):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 121, "ep')
    report([run], tmp_path)
    assert len(lines_of(drawn[0], 0)[0][0]) == 120


def test_the_same_run_gives_the_same_picture(tmp_path):
    run = make_run(tmp_path / "run")
    first, second = (report([run], tmp_path / name)[0].read_bytes() for name in ("a", "b"))
    assert first == second


def test_an_exported_run_has_its_predictions_drawn(tmp_path, weights, tiny_shards, capsys):
    runs = [make_run(tmp_path / "runs" / name) for name in ("one", "two")]
    for run in runs:
        (run / "recipe.yaml").write_text(yaml.safe_dump({"data": {"val": f"{tiny_shards}/val"}}))
        (run / "model.safetensors").write_bytes(weights.read_bytes())
    output = tmp_path / "out"
    files = [output / name for name in ("curves.png", "predictions-one.png", "predictions-two.png")]
    assert report(runs, output) == files and all(file.is_file() for file in files)
    assert report(runs[:1], output) == [output / "curves.png", output / "predictions.png"]
    assert capsys.readouterr().out == ""


def test_truth_is_on_the_left_and_predictions_are_on_the_right(
    tmp_path, weights, tiny_shards, drawn
):
    reader = ShardReader(tiny_shards / "val")
    output = tmp_path / "predictions.png"
    assert draw_predictions(weights, reader, output, pictures=2) == output
    (figure,) = drawn
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes] == ["Ground truth", "Predictions"] * 2
    predictor = Predictor.load(weights)
    for i, position in enumerate((6, 18)):  # the middles of two halves of the 24
        sample = reader.decode(position)
        (found,) = predictor([sample.image])
        left, right = figure.axes[2 * i : 2 * i + 2]
        for axes, boxes in ((left, sample.boxes_xyxy), (right, found.boxes.numpy())):
            assert np.array_equal(axes.images[0].get_array(), sample.image)
            marks = [p for p in axes.patches if isinstance(p, Rectangle)]
            corners = sorted((*p.get_xy(), p.get_width(), p.get_height()) for p in marks)
            want = sorted((x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes.tolist())
            np.testing.assert_allclose(corners, want, atol=1e-3)
        names = [reader.classes[label].name for label in sample.labels]
        assert sorted(text.get_text() for text in left.texts) == sorted(names)
        names = [r"Pl\$at_" if k == 2 else ("RBC", "WBC")[k] for k in found.labels.tolist()]
        scored = [f"{n} {s:.2f}" for n, s in zip(names, found.scores.tolist(), strict=True)]
        assert {label.split()[0] for label in scored} == {"RBC", r"Pl\$at_"}
        assert [text.get_text() for text in right.texts] == scored[::-1]  # the best on top
    assert "model.safetensors: step 77, AP 0.123" in figure.get_suptitle()
    first = output.read_bytes()
    draw_predictions(weights, reader, output, pictures=2)
    assert output.read_bytes() == first


def test_files_that_were_never_sharded_and_few_of_them(tmp_path, weights, datasets, drawn):
    cells = read_coco(datasets / "bccd/instances_val.json", datasets / "bccd/images/val")
    reader = FileReader(cells)
    cells.images[1:] = []
    draw_predictions(weights, reader, tmp_path / "one.png")
    assert len(drawn[0].axes) == 2


def refused(runs: list[Path], output: Path, message: str) -> None:
    with pytest.raises(ReportError, match=message) as caught:
        report(runs, output)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path):
    good, output = make_run(tmp_path / "good"), tmp_path / "out"
    refused([good, tmp_path / "none"], output, "none: no such folder; give the folder that `train`")
    refused([good / "metrics.jsonl"], output, r"metrics\.jsonl: no such folder")
    (tmp_path / "empty").mkdir()
    refused([tmp_path / "empty"], output, r"empty: no metrics in its metrics\.jsonl yet")
    refused([good, make_run(tmp_path / "young", [])], output, "young: no metrics in its")
    assert not output.exists()
    output.write_text("a file")
    refused([good], output, r"out/curves\.png: can't be written")
    assert output.read_text() == "a file"


def test_smoothing():
    assert _smooth(np.zeros(0)).shape == (0,)
    assert _smooth(np.array([1.0, 5.0])).tolist() == [1, 5]  # too few
    np.testing.assert_allclose(_smooth(np.full(500, 0.7)), 0.7)  # the ends do not sag
    noisy = 1 + np.random.default_rng(0).normal(0, 0.1, 500)
    assert np.abs(_smooth(noisy) - 1).max() < 0.08 < np.abs(noisy - 1).max()
