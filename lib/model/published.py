"""The authors' weights as a row of the pipeline.

    python -m lib.model.published laptop published_32k      the row of `published` in params.yaml, into data/models/published_32k

A folder like any trained model's, in safetensors, with the tokenizer the weights were trained with: what lies beside
the weight file, or the row's `tokenizer`, or bert-base-uncased. After that `evaluate@published_32k` runs like any other.
"""

import sys
from pathlib import Path

from lib.model import checkpoint
from lib.model.checkpoint import CheckpointError
from lib.model.m2bert import M2BertForRetrieval
from lib.model.tokens import given_tokenizer
from lib.pipeline import params
from lib.pipeline.errors import CorpusError


def fetch(profile: str, row: str) -> Path:
    """Load the row's checkpoint and save it as data/models/<row>; that folder.

    Raises:
        CheckpointError: the checkpoint cannot be had or trusted, is no retriever, or does not fit its tokenizer.
        CorpusError: the tokenizer cannot be had.
        ParamsError: there is no such row.
    """
    rows = params.rows(profile, "published")
    params.known(row, rows, f"row of published at {profile}")
    own = rows[row]
    source = checkpoint.find_weights(own["checkpoint"])
    tokenizer = given_tokenizer(own.get("tokenizer") or beside(source) or "bert-base-uncased")
    model = checkpoint.load_published(source, own.get("max_length"))
    if not isinstance(model, M2BertForRetrieval):
        raise CheckpointError(
            f"{own['checkpoint']} has no pooler: a masked language model is no retriever"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{own['checkpoint']} has {model.config.vocab_size:,} words, its tokenizer {len(tokenizer):,}: name the right one as `tokenizer` of the row"
        )
    if tokenizer.pad_token_id != model.config.pad_token_id:
        raise CheckpointError(
            f"{own['checkpoint']} pads with id {model.config.pad_token_id}, its tokenizer with {tokenizer.pad_token_id}: name the right one as `tokenizer` of the row"
        )
    folder = params.data(profile) / "models" / row
    checkpoint.save(
        model,
        tokenizer,
        folder,
        {
            "stage": "published",
            "row": row,
            "profile": profile,
            "settings": own,
            "trained_on": {
                "Published by": "the authors of the paper",
                "Checkpoint": own["checkpoint"],
            },
        },
    )
    return folder


def beside(weights: Path) -> str | None:
    """The folder of the weights, where it holds a tokenizer too."""
    return (
        str(weights.parent)
        if any((weights.parent / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
        else None
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lib.model.published PROFILE ROW")
    try:
        fetch(*sys.argv[1:])
    except (CheckpointError, CorpusError, params.ParamsError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
