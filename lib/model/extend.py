"""A model for longer texts: the same weights, more positions, and filters on a longer time axis."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from lib.operators.long_conv import filter_inputs
from lib.pipeline.errors import require


@torch.no_grad()
def extend(model: nn.Module, new_length: int, filters: str = "stretch") -> nn.Module:
    """A copy of an M2-BERT for texts of up to `new_length` tokens; `model` stays unchanged.

    Positions of a model of length N are tiled, P'[i] = P[i mod N], as in the paper's 32K model.
    Filters, k(i) of a model of length N:

        stretch      k'(i) ≈ k(i (N-1)/(N'-1)): the same shape on a slower time axis; z is
                     interpolated and t rescaled
        tile         z'[i] = z[i mod N], t rescaled: the paper's recipe for positions, applied to z
        extrapolate  k'(i) = k(i) for i < N, and the same formula beyond: the embedding of a short
                     text does not change, unless `pad_to_max_length` now pads the text to N'

    The authors' own code for 8k -> 32k cannot run: it makes 5 N positions and 16 N inputs z, the
    first N of them zero. Its intention is `tile`. `stretch` is the default because it keeps the
    kernels' shape.

    The rotary positions of an attention twin go on as they are, which is `extrapolate`.

    Raises:
        ValueError: new_length is shorter than the model's length, or no whole number; or attention
            with another choice than `extrapolate`.
    """
    config = copy.deepcopy(model.config)
    old = config.max_position_embeddings
    message = f"extend to {new_length!r} tokens: a whole number, and the model already reads {old}"
    require(type(new_length) is int and new_length >= old, message, ValueError)
    message = f"extend_filters: {filters} is for filters, and attention has none: extrapolate"
    require(config.mixer != "attention" or filters == "extrapolate", message, ValueError)
    config.max_position_embeddings = new_length
    if filters == "extrapolate":
        config.filter_length = config.filter_length or old
    elif config.filter_length is not None:
        stretched = (config.filter_length - 1) * (new_length - 1) / max(1, old - 1)
        config.filter_length = round(stretched) + 1
    with torch.random.fork_rng(devices=[]):  # the drawn weights are overwritten
        longer = type(model)(config)
    state = model.state_dict()
    for name, tensor in state.items():
        if not name.endswith(("position_embeddings.weight", "filter.inputs")):
            continue
        if filters == "tile" or not name.endswith("filter.inputs"):
            state[name] = tensor[torch.arange(new_length, device=tensor.device) % old]
        elif filters == "stretch":
            options = dict(size=new_length, mode="linear", align_corners=True)
            state[name] = F.interpolate(tensor.t()[None], **options)[0].t()
        else:
            inputs = filter_inputs(new_length, config.filter_emb_dim, config.filter_length)
            state[name] = torch.cat([tensor, inputs[old:].to(tensor)])
    longer.load_state_dict(state)
    return longer.to(next(model.parameters())).train(model.training)  # model's device and dtype
