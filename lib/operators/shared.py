"""Values that all forward passes of a training step share, such as long filters and spectra.

The weights do not change within a step, but a step may take many passes.

    with step():
        for texts in passes:
            loss(model(texts)).backward()    `once` computes each value for the first pass; the
                                             gradients of all passes add up in it
    # at the end of the block the sum goes through the computation of each value, once

Outside of `step`, `once` computes.
"""

from collections.abc import Callable, Hashable
from contextlib import contextmanager

import torch
from torch import Tensor

Values = tuple[Tensor | None, ...]
_steps: list[dict[Hashable, tuple[Values, Values]]] = []


@contextmanager
def step():
    """A training step: the block computes each value of `once` one time, and its gradient too."""
    _steps.append({})
    try:
        yield
        for values, leaves in reversed(_steps[-1].values()):  # a value may use earlier ones
            pairs = [(value, leaf.grad) for value, leaf in zip(values, leaves) if leaf is not None]
            pairs = [(value, grad) for value, grad in pairs if grad is not None]
            if pairs:
                torch.autograd.backward(*zip(*pairs))
    finally:
        _steps.pop()


def active() -> bool:
    """Whether a step is under way."""
    return bool(_steps)


def put(key: Hashable, leaves: Values) -> None:
    """Have `once` return these leaves, parts of another value, for this key."""
    _steps[-1][key] = (), leaves


def once(key: Hashable, compute: Callable[[], Values]) -> Values:
    """compute(), or in a step the value that the first call with this key computed.

    The tensors of a step are leaves: they collect the gradients of all passes.
    """
    if not _steps:
        return compute()
    if key not in _steps[-1]:
        with torch.enable_grad():  # a pass without gradients may come first
            values = compute()
        leaves = (None if x is None else x.detach().requires_grad_(x.requires_grad) for x in values)
        _steps[-1][key] = values, tuple(leaves)
    return _steps[-1][key][1]
