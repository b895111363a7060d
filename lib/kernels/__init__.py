"""The front door of the kernels: faster versions of what a layer computes.

    sequence_mixer(layer, u, mask)   y of a `SequenceMixer`; None: the layer follows its definition
    gated_mlp(mlp, h)                y of an `MLP`; None: the MLP follows its definition
    use("definition")                a context in which no kernel runs; "torch": no compiled code

The definitions are in lib/model/m2bert.py; nobody has to read further than this file. A back end is
a function of the same arguments that returns None for what it cannot compute here; the first result
counts, and caches live with the back end. To read on: support.py asks what this machine can do,
tiles.py is torch in less memory, cpu.py is C++ (mixer.cpp), gpu.py and gpu_mlp.py are Triton
(triton_kernels.py), and engine.py is the encoder for a CPU.
"""

from torch import Tensor

from lib.kernels import cpu, gpu, gpu_mlp, support, tiles
from lib.kernels.support import use

__all__ = ["gated_mlp", "sequence_mixer", "use"]

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
