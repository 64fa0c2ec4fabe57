"""What tests ask of a kernel that runs a notebook, and of what it showed."""

import copy
import os
import re
from pathlib import Path

from nbval.plugin import coalesce_streams


def pin(client, cores):
    """Give a kernel so many cores."""
    os.sched_setaffinity(client.km.provisioner.pid, sorted(os.sched_getaffinity(0))[:cores])


def peak_megabytes(client):
    """The most memory that a kernel has held so far, as Linux tells it."""
    status = Path(f"/proc/{client.km.provisioner.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000


def compared(outputs):
    """What nbval compares of a cell's outputs: each kind of text in its order, and never a picture."""
    shown = {}
    for output in coalesce_streams(copy.deepcopy(outputs)):
        if output.output_type == "stream":
            shown.setdefault(output.name, []).append(output.text)
        elif output.output_type == "error":
            shown.setdefault("error", []).append(f"{output.ename}: {output.evalue}")
        else:
            for kind, value in output.data.items():
                if kind not in ("image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json"):
                    shown.setdefault(kind, []).append(value)
    return shown


def assert_as_stored(cells, after, how):
    """Compare what nbval would of these cells with the cells of the same name that were run."""
    ran = {cell.id: cell for cell in after}
    for stored in cells:
        if "nbval-ignore-output" not in stored.metadata.get("tags", []):
            assert compared(ran[stored.id].outputs) == compared(stored.outputs), f"{stored.id}, {how}"
