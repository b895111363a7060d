"""What a module imports: a stage waits for it before its first cell."""

import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib.pipeline import notebook

ROOT = Path(__file__).parents[2]
STAGE = {"IPython", "dvc", "nbconvert", "nbformat", "papermill"}
PLOTS = {"matplotlib.pyplot", "pandas", "scipy", "sklearn"}
MODELS = {"datasets", "tokenizers", "transformers"}


def modules(room: str) -> list[str]:
    names = sorted(path.stem for path in (ROOT / "lib" / room).glob("[!_]*.py"))
    return [f"lib.{room}.{name}" for name in names if name != "triton_kernels"]  # needs triton


def imported(names: list[str]) -> set[str]:
    """The modules of a fresh process after these imports."""
    code = f"import os, sys, {', '.join(names)}\nprint(*sys.modules, flush=True)\nos._exit(0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (
            [f"lib.benchmark.{name}" for name in ("metrics", "statistics", "runs", "locov1")],
            {"torch", *MODELS, *PLOTS, *STAGE},
        ),
        (modules("pipeline"), {"torch", *MODELS, *PLOTS, *STAGE}),
        (
            [f"lib.report.{name}" for name in ("audit", "claims", "comparison", "results")],
            {"torch", "matplotlib.pyplot", *MODELS, *STAGE},
        ),
        (modules("benchmark"), {*MODELS, *PLOTS, *STAGE}),
        (modules("operators") + modules("kernels"), {*MODELS, *PLOTS, *STAGE}),
        (modules("training"), {*MODELS, *PLOTS, *STAGE}),
        (
            ["lib.model.checkpoint", "lib.model.extend", "lib.model.tokens", "lib.report.card"],
            {*MODELS, *PLOTS, *STAGE},
        ),
        (["lib.model.m2bert"], {"datasets", "matplotlib.pyplot", "pandas", *STAGE}),
    ],
    ids="scores pipeline report benchmark kernels training checkpoint m2bert".split(),
)
def test_a_module_imports_only_what_it_uses(names, absent):
    assert not absent & imported(names)


def test_a_kernel_preloads_what_its_notebook_imports_of_ours_and_of_the_slow_ones():
    cells = [
        new_markdown_cell("import torch"),
        new_code_cell("import os, torch\nimport numpy as np\nimport mine, library"),
        new_code_cell("from lib.report import (\n    display,\n)\nif True:\n    import pandas"),
        new_code_cell("%matplotlib inline\nimport torch"),
        new_code_cell("import matplotlib.pyplot as plt"),
    ]
    assert notebook.imports(new_notebook(cells=cells)).splitlines() == [
        "import numpy as np",
        "from lib.report import display",
        "import matplotlib.pyplot as plt",
    ]
