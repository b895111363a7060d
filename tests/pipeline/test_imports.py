"""What a module imports: a stage waits for it before its first cell."""

import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib.model import checkpoint
from lib.pipeline import notebook

ROOT = Path(__file__).parents[2]
STAGE = {"IPython", "dvc", "nbconvert", "nbformat", "papermill"}
PLOTS = {"matplotlib.pyplot", "pandas", "scipy", "sklearn"}
MODELS = {"datasets", "huggingface_hub", "tokenizers", "transformers"}


def modules(room: str) -> list[str]:
    names = sorted(path.stem for path in (ROOT / "lib" / room).glob("[!_]*.py"))
    return [f"lib.{room}.{name}" for name in names if name != "triton_kernels"]  # needs triton


def imported(statements: str) -> set[str]:
    """The modules of a fresh process after these statements."""
    code = f"import os, sys\n{statements}\nprint(*sys.modules, flush=True)\nos._exit(0)"
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
            [*(name for name in modules("model") if name != "lib.model.hub"), "lib.report.card"],
            {"sympy", "torch._dynamo", *MODELS, *PLOTS, *STAGE},
        ),
        (["lib.efficiency.estimate"], {*MODELS, *PLOTS, *STAGE}),
    ],
    ids="scores pipeline report benchmark kernels training model estimate".split(),
)
def test_a_module_imports_only_what_it_uses(names, absent):
    assert not absent & imported(f"import {', '.join(names)}")


CELLS = """
import torch
from lib.benchmark.encoder import Encoder
from lib.model import checkpoint
from lib.training import finetune, optim, pretrain

model, tokenizer = checkpoint.load({folder!r})
ids = torch.tensor(tokenizer(["red fox runs", "owl sleeps by"])["input_ids"])
optimizer = optim.optimizer(model, lr=1e-3, weight_decay=0.0)
model.train()(ids).pooler_output.sum().backward()
optimizer.step()
Encoder(model, tokenizer).encode(["red fox"], show_progress=False)
checkpoint.save(model, tokenizer, {folder!r}, {{}}, "text")
"""


def test_to_load_train_encode_and_save_a_model_needs_no_modelling_code(tiny, tokenizer, tmp_path):
    """transformers' takes 4 s of each stage; its tokenizers are what is needed."""
    checkpoint.save(tiny(), tokenizer, tmp_path / "model")
    modules = imported(CELLS.format(folder=str(tmp_path / "model")))
    heavy = {"transformers.modeling_utils", "transformers.models.auto", "datasets", "pandas"}
    assert "transformers" in modules and not heavy & modules


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
