"Executing the quick numbered notebooks gives the outputs on their pages. The tour has a test of its own."

import nbformat
import pytest

from nli_ft.process import project_root
from outputs import differences, execute

QUICK = "02_labels 05_rows 06_sft_rows 08_reading 13_answers 40_meanings 43_quantifiers 47_teacher_replies".split()


@pytest.mark.parametrize("name", QUICK)
def test_committed_text_outputs_are_what_executing_gives(name):
    "A cell without a committed output is not compared. It holds temporary folders, or nothing to read."
    path = project_root() / "nbs" / f"{name}.ipynb"
    committed, executed = nbformat.read(path, 4), execute(path)
    for old, new in zip(committed.cells, executed.cells, strict=True):
        if old.cell_type == "code" and not old.outputs:
            new.outputs = []
    shown = [c for c in committed.cells if c.cell_type == "code" and c.outputs]
    assert len(shown) > 1, "nothing is shown on this page"
    found = differences(committed, executed)
    remedy = f"If the new outputs are right: python tests/outputs.py nbs/{name}.ipynb && nbdev_clean"
    assert not found, "\n\n".join([*found, remedy])
