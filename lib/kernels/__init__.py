"""The front door of the kernels: faster versions of what a layer computes.

    sequence_mixer(layer, u, mask)   y of a `SequenceMixer`; None: the layer follows its definition
    gated_mlp(mlp, h)                y of an `MLP`; None: the MLP follows its definition
    use("definition")                a context in which no kernel runs; "torch": no compiled code
    warm_up(model, lengths, dtype)   a GPU's kernels, compiled, compared and timed before training
    keep_tokens(mask, tokens)        tells the number of tokens of each text; kept_tokens asks

The definitions are in lib/model/m2bert.py; nobody has to read further than this file. A back end is
a function of the same arguments that returns None for what it cannot compute here; the first result
counts, and caches live with the back end. To read on: support.py asks what this machine can do and
choices.py keeps the answers, tiles.py is torch in less memory, cpu.py is C++ (mixer.cpp), gpu.py
and gpu_mlp.py are Triton (triton_kernels.py), and engine.py is the encoder for a CPU.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lib.kernels import choices, cpu, gpu, gpu_mlp, support, tiles
from lib.kernels.support import keep_tokens, kept_tokens, use

__all__ = ["gated_mlp", "keep_tokens", "kept_tokens", "sequence_mixer", "use", "warm_up"]

MIXERS = {
    "auto": (gpu.sequence_mixer, cpu.sequence_mixer, tiles.sequence_mixer),
    "torch": (tiles.sequence_mixer,),
    "definition": (),
}
MLPS = {
    "auto": (gpu_mlp.gated_mlp, cpu.gated_mlp, tiles.gated_mlp),
    "torch": (tiles.gated_mlp,),
    "definition": (),
}


def sequence_mixer(layer, u: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """y (B, L, D) of `layer` for u (B, L, D), mask (B, 1, L) of 0 and 1; None: no kernel fits."""
    results = (mixer(layer, u, mask) for mixer in MIXERS[support.back_end()])
    return next((y for y in results if y is not None), None)


def gated_mlp(mlp, h: Tensor) -> Tensor | None:
    """y (B, L, D) of `mlp` for h (B, L, D); None: no kernel fits."""
    results = (kernel(mlp, h) for kernel in MLPS[support.back_end()])
    return next((y for y in results if y is not None), None)


def warm_up(model: nn.Module, lengths: Iterable[int], dtype: torch.dtype) -> None:
    """Compile the GPU kernels that a model needs, compare them with torch and time them.

    Otherwise the first pass of each length does so. The answers are kept on disk. Processes of
    torch.distributed call this together; the first one decides. On a CPU nothing happens.

    Args:
        lengths: in tokens, of the texts of a batch with their padding.
        dtype: of matrix multiplications.
    """
    weight = next(model.parameters())
    if not support.runs_triton(weight):
        return

    def ask() -> None:
        for layer in model.modules():
            if hasattr(layer, "gated_filter"):
                for length in lengths:
                    for gradients in (False, True):
                        gpu.serves(layer, length, dtype, gradients)
            elif hasattr(layer, "gated_layers"):
                gpu_mlp.tile(layer, dtype, weight.device)
                gpu_mlp.gate_is_supported(dtype, weight.device)

    lengths = sorted({*lengths})
    choices.first_process_first(weight.device, ask)
