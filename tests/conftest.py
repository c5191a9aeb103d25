"""What every test may rely on: one thread, a loud answer for missing components, the extra data."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported, here and in the processes that tests start: the ranks of a test share
# few cores, and sums are taken in one order only with one thread.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
# Nothing in the tests may wait for the network or report to anybody.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

# component: (programs, any of which will do; how to get one)
_COMPONENTS = {
    "chromium": (("chromium", "chromium-browser", "google-chrome"), "apt-get install chromium"),
    "git": (("git",), "apt-get install git"),
}


@pytest.fixture(scope="session")
def component() -> Callable[[str], Path]:
    """Find a program that pip cannot install, as in `component("chromium")`.

    Missing, it skips the test with the way to get it; under CI, where skipping would hide that a
    part of the suite never runs, it fails the test.
    """

    def find(name: str) -> Path:
        programs, remedy = _COMPONENTS[name]
        for program in programs:
            if path := shutil.which(program):
                return Path(path)
        reason = f"{name} is not installed ({remedy})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)

    return find


@pytest.fixture(scope="session")
def datasets() -> Path:
    """The bundled data: `datasets / "bccd"`, `datasets / "coco_mini"`."""
    return ROOT / "data_prep" / "datasets"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """More real data, beside the repository on the developers' machines only."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs ../shared/data, which is not part of the project")
    return path
