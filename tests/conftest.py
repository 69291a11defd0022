"""Makes `pytest` find sid_fm.py and toy_2d.py, which stand beside this folder, and builds each tiny
pipeline once."""

import os
import sys
from pathlib import Path

# Here and in the processes that tests start: on tensors this small, threads that wait for each
# other cost more than they give, ten times more where the machine has other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: runs in CI with the rest; `pytest -m "not slow"` leaves it out')


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """pipeline(family) -> the folder of that family's tiny pipeline (tests/pipelines.py). To be
    read, not changed."""
    from pipelines import build

    root, built = tmp_path_factory.mktemp("pipelines"), {}

    def folder(family: str, **options) -> Path:
        key = family + "".join(options)
        if key not in built:
            built[key] = build(family, root / key, **options)
        return built[key]

    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """The folder of a tiny CLIP (tests/pipelines.py). To be read, not changed."""
    from pipelines import clip_model

    return clip_model(tmp_path_factory.mktemp("clip"))
