"""The map of the room in its docstring names every module, and nothing that isn't there."""

import re
from pathlib import Path

from convnext_yolo import data_prep

# In the map, but no modules.
OTHERS = {"DetectionDataset", "manifest.json", "report.json"}


def test_the_map_is_complete() -> None:
    assert data_prep.__doc__ and data_prep.__file__
    named = re.findall(r"`([\w.]+)`", data_prep.__doc__)
    modules = {path.stem for path in Path(data_prep.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(named) - OTHERS == modules
