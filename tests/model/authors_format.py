"""A model in the authors' format: what `load_published` must read back."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.model.checkpoint import CheckpointError, writing
from lib.model.m2bert import M2BertForMaskedLM, M2BertForRetrieval
from lib.model.published import constants, from_authors, infer_config, infer_filter_length
from lib.pipeline import files

# All of a config that changes what `forward` computes.
ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
    "mlp_blocks",
    "filter_order",
    "filter_emb_dim",
    "filter_length",
    "bidirectional",
    "residual_long_conv",
    "mixer_layer_norm",
    "mask_padding",
    "pad_to_max_length",
    "pooling",
)


def save_published(model: M2BertForRetrieval | M2BertForMaskedLM, path: str | Path) -> None:
    """Write the weights as the authors do, whole or not at all.

    A retriever becomes the flat dict of their retrieval files, a masked language model Composer's
    ['state']['model'] with its prefix `model.`; safetensors cannot nest and has no outer dicts.

    Args:
        path: ….safetensors, or ….bin or ….pt for torch's format.

    Raises:
        CheckpointError: the authors' code cannot compute the embedding, or another suffix.
    """
    path, state = Path(path), to_authors(model)
    if path.suffix not in (".safetensors", ".bin", ".pt"):
        raise CheckpointError(f"{path}: one of .safetensors, .bin or .pt")
    # The file says nothing but weights: what they would be taken for must be what they are.
    weights, stored = from_authors(state)
    theirs = infer_config(weights, filter_length=infer_filter_length(stored))
    for name in ARCHITECTURE:
        ours, there = (
            getattr(config, name) or config.max_position_embeddings
            if name == "filter_length"
            else getattr(config, name)
            for config in (model.config, theirs)
        )
        if ours != there:
            raise CheckpointError(
                f"{name}={ours!r}: the file cannot say so, and the authors' code would compute "
                f"another embedding from these weights, with {there!r}; "
                f"set model.config.{name} = {there!r} first if that is what you want"
            )
    if isinstance(model, M2BertForMaskedLM):
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    with files.replacing_file(path) as draft, writing(path):
        if path.suffix == ".safetensors":
            save_file(state, draft)
        else:
            torch.save(
                {"state": {"model": state}} if isinstance(model, M2BertForMaskedLM) else state,
                draft,
            )


def to_authors(model: M2BertForRetrieval | M2BertForMaskedLM) -> dict[str, Tensor]:
    """The inverse: every key of the authors' state dict, constants and copies included.

    Each is a tensor of its own.
    """
    renames = [
        (r"^model\.layers\.(\d+)\.mixer\.", r"bert.encoder.layer.\1.attention."),
        (r"^model\.layers\.(\d+)\.mlp\.", r"bert.encoder.layer.\1.mlp."),
        (r"^model\.pooler\.", "bert.pooler.dense."),
        (r"^model\.", "bert."),
        (r"^dense\.", "cls.predictions.transform.dense."),
        (r"^layernorm\.", "cls.predictions.transform.LayerNorm."),
        (r"^decoder\.", "cls.predictions.decoder."),
        (r"\.gated_filter\.", ".filter_fn."),
        (r"\.residual_filter\.", ".filter_fn2."),
        (r"\.inputs$", ".pos_emb.z"),
        *(
            (rf"\.{ours}\.{depth}\.", f".{theirs}.{2 * depth}.")
            for ours, theirs in (("back", "implicit_filter"), ("ahead", "implicit_filter_rev"))
            for depth in range(4)
        ),
    ]
    shapes = {
        ".freq": (1, -1),
        ".pos_emb.z": (1, -1, model.config.filter_emb_dim),
        ".pos_emb.t": (1, -1, 1),
        ".deltas": (1, 1, -1),
        ".position_ids": (1, -1),
    }
    directions = (
        ("implicit_filter", "implicit_filter_rev")
        if model.config.bidirectional
        else ("implicit_filter",)
    )
    theirs = {}
    for name, tensor in (model.state_dict() | constants(model)).items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        tensor = tensor.reshape(
            next((shape for end, shape in shapes.items() if name.endswith(end)), tensor.shape)
        )
        copies = (
            [
                f"{name.removesuffix('freq')}{direction}.{depth}.freq"
                for direction in directions
                for depth in (1, 3, 5)
            ]
            if name.endswith(".freq")
            else [name]
        )
        theirs |= {copy: tensor.detach().clone() for copy in copies}
    return theirs
