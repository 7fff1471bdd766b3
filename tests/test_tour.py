"More people read the tour than run it. So its page must show what running it gives."

import copy, re, tempfile

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nli_ft.process import project_root
from outputs import assert_outputs_hold, differences, execute, normalised, refresh

TOUR = project_root() / "nbs" / "tour.ipynb"
cells = nbformat.read(TOUR, 4).cells
prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
shown = [out for c in cells if c.cell_type == "code" for out in c.outputs]


def test_executing_the_tour_without_gpu_and_hub_gives_the_committed_text(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_outputs_hold(TOUR)


def test_the_tour_shows_text_tables_pictures_and_the_coloured_mask():
    kinds = {mime for out in shown for mime in out.get("data", {})}
    assert {"text/html", "image/png"} <= kinds and any(out.output_type == "stream" for out in shown)
    assert any("background:#ffc27a" in out.get("data", {}).get("text/html", "") for out in shown)


def test_the_tour_shows_nothing_of_the_machine_it_was_executed_on():
    assert not any(out.get("name") == "stderr" or out.output_type == "error" for out in shown)
    text = TOUR.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users|mnt)/", text)


def test_every_link_of_the_tour_leads_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", prose)
    assert len(set(links)) > 20
    assert not [link for link in links if not (TOUR.parent / link).exists()]


@pytest.mark.parametrize("step", "pair thought row ids mask loss training answer score verdict".split())
def test_the_tour_has_a_heading_for_each_step_of_the_way(step):
    assert re.search(rf"^## \d+\. .*\b{step}", prose, re.M), step


def notebook(*outputs):
    return new_notebook(cells=[new_markdown_cell("# A"), new_code_cell("x", outputs=list(outputs))])


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def test_a_changed_number_in_text_or_table_is_found():
    old = notebook(printed("accuracy 0.617\n"), new_output("display_data", {"text/html": "<td>74</td>"}))
    assert differences(old, copy.deepcopy(old)) == []
    for wrong in ("accuracy 0.618\n", ""):
        new = copy.deepcopy(old)
        new.cells[1].outputs[0].text = wrong
        (message,) = differences(old, new)
        assert "code cell 1 (x)" in message and "-accuracy 0.617" in message
    new = copy.deepcopy(old)
    new.cells[1].outputs[1].data["text/html"] = "<td>75</td>"
    assert differences(old, new)
    assert differences(old, notebook())


def test_what_depends_on_the_machine_is_no_difference():
    old = notebook(printed("read "), printed("it\n"), printed("100%|####|", "stderr"))
    new = notebook(printed("read it\n"), new_output("display_data", {"image/png": "aaaa"}))
    assert differences(old, new) == []
    assert normalised("took 12.3 s (1 min 4 s), 1,031.5 rows/s") == normalised("took 9 s (59 s), 80 rows/s")
    for folder in (project_root(), tempfile.gettempdir()):
        assert str(folder) not in normalised(f"in {folder}/x1y2/rows.jsonl")
    assert normalised("<F object at 0x7f12ab34>") == normalised("<F object at 0x7fffff00>")
    assert normalised("20261126-095322-s42-e8b84932, 2026-11-26T09:53:29Z") == "RUN_ID, DATE"
    assert normalised("74 of 120 (0.617)") == "74 of 120 (0.617)"


def test_a_live_bar_is_left_out(tmp_path):
    path = tmp_path / "bar.ipynb"
    code = "from tqdm.notebook import tqdm\nsum(tqdm([1, 2, 3]))"
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), path)
    nb = execute(path)
    assert [o.data["text/plain"] for o in nb.cells[0].outputs if o.output_type != "stream"] == ["6"]
    assert not nb.metadata


def test_refresh_writes_the_outputs_of_a_fresh_kernel_and_no_stderr(tmp_path):
    path = tmp_path / "small.ipynb"
    code = "import os, sys\nprint(os.getcwd())\nprint('a bar', file=sys.stderr)\n6 * 7"
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), path)
    refresh(path)
    stored = nbformat.read(path, 4)
    (where, result) = stored.cells[0].outputs
    assert where.name == "stdout" and where.text.strip() == str(tmp_path)
    assert result.data["text/plain"] == "42"
    assert differences(stored, execute(path)) == []
