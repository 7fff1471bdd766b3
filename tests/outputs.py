"""Does executing a notebook give the outputs that are committed in it?

    python tests/outputs.py nbs/tour.ipynb      # execute it and write its outputs anew

The comparison goes cell by cell. It looks at what a reader reads: printed text, and the text, Markdown and HTML of
what is displayed. It ignores pictures (they depend on fonts) and stderr (bars and warnings depend on the machine).
`execute` leaves out live bars, which need a running kernel. `refresh` also leaves stderr out of the file.
`normalised` says what may differ within a text."""

import copy, difflib, re, sys, tempfile
from pathlib import Path

import nbformat

READ = ("text/plain", "text/markdown", "text/html")
WIDGET = "application/vnd.jupyter.widget-view+json"  # a live bar, such as that of "Loading weights"
ROOT = Path(__file__).resolve().parent.parent
# what may differ between two equal executions: (the name put in its place, what it looks like)
VARIES = [
    ("RUN_ID", r"\b\d{8}-\d{6}-s\d+-[0-9a-f]{8}\b"),
    ("DATE", r"\b20\d\d-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?(\.\d+)?Z?)?"),
    ("0xADDRESS", r"\b0x[0-9a-f]{6,}\b"),
    ("TIME", r"\b\d+(\.\d+)? ?(µs|ms|s|min|h|seconds?|minutes?|hours?)\b( \d+(\.\d+)? ?(s|min)\b)*"),
    ("RATE", r"\b[\d,]+(\.\d+)? ?(it|rows|tokens|pairs)(/s| a second| per second)\b"),
]


def execute(path, timeout: int = 600):  # a notebook, seconds that a cell may take
    "The notebook with the outputs of a fresh kernel. It starts in the notebook's folder, as in JupyterLab."
    from nbclient import NotebookClient

    nb = nbformat.read(path, 4)
    metadata = copy.deepcopy(nb.metadata)
    folder = {"metadata": {"path": str(Path(path).resolve().parent)}}
    NotebookClient(nb, timeout=timeout, kernel_name="python3", resources=folder).execute()
    nb.metadata = metadata  # without what the kernel adds: its version, and the state of its bars
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    return nb


def texts(cell) -> str:  # "" where it shows nothing
    "What a cell shows as text. Printed text comes in pieces of any length, so pieces are joined."
    parts = []
    for out in cell.get("outputs", []):
        if out.output_type == "stream" and out.name == "stdout":
            parts.append(out.text)
        elif out.output_type == "error":
            parts.append(f"{out.ename}: {out.evalue}\n")
        elif out.output_type in ("display_data", "execute_result"):
            parts += [f"\n<{mime}>\n{out.data[mime]}\n" for mime in READ if mime in out.data]
    return "".join(parts)


def normalised(text: str) -> str:
    "A text without what varies: folders of this machine, run ids, dates, addresses in memory, durations and rates."
    for name, folder in (("PROJECT", ROOT), ("TEMPORARY", tempfile.gettempdir()), ("HOME", Path.home())):
        text = re.sub(rf"{re.escape(str(folder))}(?=[/\s'\"]|$)", name, text)
    text = re.sub(r"TEMPORARY/\w+", "TEMPORARY", text)
    for name, pattern in VARIES:
        text = re.sub(pattern, name, text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def differences(committed, executed) -> list:  # of text: one for each cell that shows something else now
    "Compare the outputs of two copies of one notebook."
    found = []
    pairs = [p for p in zip(committed.cells, executed.cells, strict=True) if p[0].cell_type == "code"]
    for n, (old, new) in enumerate(pairs, 1):
        before, after = (normalised(texts(cell)).splitlines() for cell in (old, new))
        if before != after:
            lines = difflib.unified_diff(before, after, "committed", "executed", lineterm="", n=1)
            found.append(f"code cell {n} ({old.source.strip().splitlines()[-1]}):\n" + "\n".join(lines))
    return found


def assert_outputs_hold(path):
    "Execute a notebook. If it shows something else than the committed file, fail with a diff and with what to do."
    found = differences(nbformat.read(path, 4), execute(path))
    remedy = f"If the new outputs are right: python tests/outputs.py nbs/{Path(path).name} && nbdev_clean"
    assert not found, "\n\n".join([*found, remedy])


def refresh(path):
    "Execute a notebook and write its outputs into it, without stderr."
    nb = execute(path)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(nb, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        refresh(name)
