"""The front door of the kernels: what a layer computes, faster. Nobody has to read further.

    sequence_mixer(layer, u, mask)   y of a `SequenceMixer`, or None: the layer follows its definition
    gated_mlp(mlp, h)                y of an `MLP`, or None likewise
    use("definition")                a context without any of this; "torch": without compiled code

The definitions are in lib/model/m2bert.py. A back end is a function of the same arguments that
returns None for what it cannot do here; the first result counts. `gpu` and `gpu_mlp` are Triton
(triton_kernels.py), `cpu` is C++ (mixer.cpp), `tiles` is torch in less memory; caches live with the
back end. engine.py is the encoder for a CPU, support.py asks what this machine can do.
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
    """y (B, L, D) of `layer` for u (B, L, D) and mask (B, 1, L) of 0 and 1; None: no kernel fits."""
    results = (mixer(layer, u, mask) for mixer in MIXERS[support.back_end()])
    return next((y for y in results if y is not None), None)


def gated_mlp(mlp, h: Tensor) -> Tensor | None:
    """y (B, L, D) of `mlp` for h (B, L, D); None: no kernel fits."""
    results = (kernel(mlp, h) for kernel in MLPS[support.back_end()])
    return next((y for y in results if y is not None), None)
