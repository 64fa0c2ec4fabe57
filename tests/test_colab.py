"""The notebooks as Colab has them: alone in a folder, under ipywidgets 7.7.1 and IPython 7.34; every cell runs."""

import json
import os
import subprocess
import sys

import build
import nbformat
import pytest

# What Colab has, and what those need that their successors do not bring. Laid over the kernel's own packages.
IPYWIDGETS = ["ipywidgets==7.7.1", "ipython_genutils", "widgetsnbextension~=3.6", "jupyterlab_widgets~=1.0"]
IPYTHON = ["ipython==7.34.0", "pickleshare", "backcall", "decorator"]
ASK = "import IPython, ipywidgets; print(ipywidgets.__version__, ipywidgets.__file__, IPython.__version__)"
VIEW = "application/vnd.jupyter.widget-view+json"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A folder with Colab's versions, to stand first on a kernel's path."""
    folder = tmp_path_factory.mktemp("colab")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, *IPYWIDGETS, *IPYTHON], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", build.sources())
def test_every_view_is_built_and_every_cell_runs(colab, name, tmp_path, monkeypatch):
    notebook = build.expected(build.sources()[name])
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path)  # where the kernel starts: there is nothing else
    asked = nbformat.v4.new_code_cell(ASK, id="versions")
    notebook.cells.insert(0, asked)
    path = os.pathsep.join(filter(None, [str(colab), os.environ.get("PYTHONPATH")]))
    with build.kernel(notebook, PYTHONPATH=path) as client:
        build.run_cells(client, notebook.cells)
        models = client.widget_state
    assert asked.outputs[0].text == f"7.7.1 {colab / 'ipywidgets' / '__init__.py'} 7.34.0\n"
    live = [cell for cell in notebook.cells if "widget" in cell.metadata.get("tags", [])]
    assert live or name.startswith(("00_", "exercises/"))
    for cell in live:
        views = [output.data[VIEW]["model_id"] for output in cell.outputs if VIEW in output.get("data", {})]
        assert views, f"{cell.id} shows no view"
        for view in views:
            # The frontend of version 7 knows these models; those of version 8 it does not draw.
            assert models[view]["_model_module_version"] == "1.5.0", json.dumps(models[view])
