"""The model card: README.md of a saved model, for a stranger who finds the folder.

    card(model, about)      Markdown, its head as the Hugging Face hub reads it

Everything comes from the model's config and from the record that goes into training.json
(see `checkpoint.save`), so the card cannot say anything else than these two.
"""

import json

from lib.model.checkpoint import fingerprint
from lib.model.m2bert import M2BertForMaskedLM

PAPER = "[arXiv 2402.07440](https://arxiv.org/abs/2402.07440)"
RETRIEVER = """import lib.model.m2bert  # registers the architecture: no remote code
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
vectors = model.encode(["a text", "another"])      # unit norm: a dot product is the cosine"""
MASKED_LM = """from lib.model import checkpoint

model, tokenizer = checkpoint.load("path/to/this/folder")
logits = model(**tokenizer(["a [MASK] text"], return_tensors="pt")).logits"""
CARD = """---
library_name: {library}
pipeline_tag: {task}
tags: [m2-bert, monarch-mixer, long-context, retrieval]
---

# {title}

An M2-BERT {kind}: attention replaced by gated long convolutions, the MLP block-diagonal ({paper}).

With `loco-workbench` installed, whose `lib` is imported here:

```python
{use}
```

## What it is

{facts}

## Trained on

{lineage}

## Measured

{metrics}

## Settings

{settings}
"""


def card(model, about: dict) -> str:
    """README.md of a saved model.

    Args:
        about: any of `row`, `profile`, `starts_from`, `trained_on` and `metrics` (name: value
            each), `settings`; what is absent is called unknown.
    """
    retrieves = not isinstance(model, M2BertForMaskedLM)
    profile = f" ({about['profile']})" if about.get("profile") else ""
    lineage = {"Starts from": about.get("starts_from"), **about.get("trained_on", {})}
    settings = about.get("settings")
    return CARD.format(
        library="sentence-transformers" if retrieves else "transformers",
        task="sentence-similarity" if retrieves else "fill-mask",
        title=about.get("row", "M2-BERT") + profile,
        kind="text encoder for retrieval" if retrieves else "masked language model",
        paper=PAPER,
        use=RETRIEVER if retrieves else MASKED_LM,
        facts=table(facts(model, retrieves)),
        lineage=table({name: value for name, value in lineage.items() if value is not None}),
        metrics=table(about.get("metrics", {})),
        settings="Unknown."
        if not settings
        else f"sha256 `{fingerprint(settings)}`\n\n```json\n"
        f"{json.dumps(settings, indent=1, sort_keys=True)}\n```",
    )


def facts(model, retrieves: bool) -> dict[str, str]:
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    pooled = "the first token" if c.pooling == "cls" else "the mean over tokens"
    embedding = (
        f"{c.hidden_size} dimensions, compared by cosine; tanh pooling of {pooled};"
        " not normalised in `pooler_output`"
    )
    padding = "leaks into the embedding: pad as in training"
    if c.pad_to_max_length:
        padding = f"every text is padded to {c.max_position_embeddings:,} tokens inside `forward`,"
        padding += " as the weights were trained"
    if c.mask_padding:
        padding = "masked: an embedding does not depend on its batch"
    return {
        "Context length": f"up to {c.max_position_embeddings:,} tokens",
        **({"Embedding": embedding} if retrieves else {}),
        "Layers": f"{c.num_hidden_layers}, width {c.hidden_size}, {parameters:,} parameters,"
        f" vocabulary {c.vocab_size:,}",
        "Padding": padding,
    }


def table(rows: dict) -> str:
    """A table of two columns without a head."""
    lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else "Unknown."


def cell(value) -> str:
    if isinstance(value, float):
        value = f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
