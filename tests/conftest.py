"What every test starts from, and what tests of several files share."

import shutil, signal
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# under `nohup` the commands ignore SIGHUP, as they should. The tests of SIGHUP need the signal that a
# closing terminal sends
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    "Files that train come first, so that no worker begins a long one when the others have nothing left to do."
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project, in which the test runs."
    for name in ("settings.ini", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path
