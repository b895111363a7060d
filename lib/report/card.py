"""The model card: README.md of a saved model, for a stranger who finds the folder.

    card(model, about)      Markdown, its head as the Hugging Face hub reads it

Everything comes from the model's config and from the record that goes into training.json
(see `checkpoint.save`).
"""

import json

from lib.model.checkpoint import fingerprint
from lib.model.m2bert import M2BertForMaskedLM

PAPER = "[arXiv 2402.07440](https://arxiv.org/abs/2402.07440)"
RETRIEVER = """import lib.model.hub  # registers the architecture: no remote code
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
vectors = model.encode(["a text", "another"])      # unit norm: a dot product is the cosine"""
MASKED_LM = """from lib.model import checkpoint

model, tokenizer = checkpoint.load("path/to/this/folder")
logits = model(**tokenizer(["a [MASK] text"], return_tensors="pt")).logits"""
MIXERS = {
    "long_conv": "attention replaced by gated long convolutions",
    "ungated": "its long convolutions without gates, for a comparison",
    "short_conv": "its long convolutions taken out, for a comparison",
    "attention": "attention in the place of its long convolutions, for a comparison",
    "none": "its long convolutions taken out and nothing in their place, for a comparison",
}
CARD = """---
library_name: {library}
pipeline_tag: {task}
tags: [m2-bert, monarch-mixer, long-context, retrieval]
---

# {title}

An M2-BERT {kind}: {mixer}, the MLP block-diagonal ({paper}).

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
        about: any of `row`, `profile`, `starts_from`, `start` (the weights before any training),
            `trained_on` and `metrics` (name: value each), `settings`; what is absent is called
            unknown.
    """
    retrieves = not isinstance(model, M2BertForMaskedLM)
    profile = f" ({about['profile']})" if about.get("profile") else ""
    lineage = {"Starts from": about.get("starts_from"), "First weights": about.get("start")}
    lineage |= about.get("trained_on", {})
    settings = "Unknown."
    if about.get("settings"):
        text = json.dumps(about["settings"], indent=1, sort_keys=True)
        settings = f"sha256 `{fingerprint(about['settings'])}`\n\n```json\n{text}\n```"
    return CARD.format(
        library="sentence-transformers" if retrieves else "transformers",
        task="sentence-similarity" if retrieves else "fill-mask",
        title=about.get("row", "M2-BERT") + profile,
        kind="text encoder for retrieval" if retrieves else "masked language model",
        mixer=MIXERS[model.config.mixer],
        paper=PAPER,
        use=RETRIEVER if retrieves else MASKED_LM,
        facts=table(facts(model, retrieves)),
        lineage=table({name: value for name, value in lineage.items() if value is not None}),
        metrics=table(about.get("metrics", {})),
        settings=settings,
    )


def facts(model, retrieves: bool) -> dict[str, str]:
    config, length = model.config, f"{model.config.max_position_embeddings:,} tokens"
    pooled = "the first token" if config.pooling == "cls" else "the mean over tokens"
    embedding = f"{config.hidden_size} dimensions, compared by cosine; tanh pooling of {pooled};"
    embedding += " not normalised in `pooler_output`"
    padding = "leaks into the embedding: pad as in training"
    if config.pad_to_max_length:
        padding = f"every text is padded to {length} inside `forward`, as the weights were trained"
    if config.mask_padding:
        padding = "masked: an embedding does not depend on its batch"
    parameters = sum(weight.numel() for weight in model.parameters())
    layers = f"{config.num_hidden_layers}, width {config.hidden_size}, {parameters:,} parameters,"
    return {
        "Context length": f"up to {length}",
        **({"Embedding": embedding} if retrieves else {}),
        "Layers": f"{layers} vocabulary {config.vocab_size:,}",
        "Padding": padding,
    }


def table(rows: dict) -> str:
    """A table of two columns without a head."""

    def cell(value) -> str:
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        return str(value).replace("|", "\\|").replace("\n", " ")

    lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else "Unknown."
