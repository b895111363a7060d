"""The model card: what a stranger who finds the folder needs to know, as its README.md.

    card(model, about)      Markdown, its head as the Hugging Face hub reads it

Made from the model's own config and the record that goes into training.json
(see `checkpoint.save`), so it cannot say anything else than these two.
"""

import json

from lib.model.checkpoint import fingerprint
from lib.model.m2bert import M2BertForMaskedLM

PAPER = "[arXiv 2402.07440](https://arxiv.org/abs/2402.07440)"
USE = {
    True: """import lib.model.m2bert                                   # registers the architecture: no remote code
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
vectors = model.encode(["a text", "another"])      # unit norm: a dot product is the cosine""",
    False: """from lib.model import checkpoint

model, tokenizer = checkpoint.load("path/to/this/folder")
logits = model(**tokenizer(["a [MASK] text"], return_tensors="pt")).logits""",
}


def card(model, about: dict) -> str:
    """README.md of a saved model.

    Args:
        about: any of `row`, `profile`, `stage`; `starts_from`; `trained_on` and `metrics` (name: value each); `settings`.
            What is absent is said to be unknown.
    """
    c, retrieves = model.config, not isinstance(model, M2BertForMaskedLM)
    head = [
        "library_name: " + ("sentence-transformers" if retrieves else "transformers"),
        "pipeline_tag: " + ("sentence-similarity" if retrieves else "fill-mask"),
        "tags: [m2-bert, monarch-mixer, long-context, retrieval]",
    ]
    padding = (
        "masked: an embedding does not depend on its batch"
        if c.mask_padding
        else f"every text is padded to {c.max_position_embeddings:,} tokens inside `forward`, as the weights were trained"
        if c.pad_to_max_length
        else "leaks into the embedding: pad as in training"
    )
    facts = {
        "Reads": f"up to {c.max_position_embeddings:,} tokens",
        **(
            {
                "Embedding": f"{c.hidden_size} numbers, compared by cosine; tanh pooling of {'the first token' if c.pooling == 'cls' else 'the mean over tokens'}; not normalised in `pooler_output`"
            }
            if retrieves
            else {}
        ),
        "Layers": f"{c.num_hidden_layers}, width {c.hidden_size}, {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {c.vocab_size:,}",
        "Padding": padding,
    }
    lineage = {"Starts from": about.get("starts_from"), **about.get("trained_on", {})}
    settings = about.get("settings")
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# {about.get('row', 'M2-BERT')}{f' ({profile})' if (profile := about.get('profile')) else ''}",
            "",
            f"An M2-BERT {'text encoder for retrieval' if retrieves else 'masked language model'}: attention replaced by gated long convolutions, the MLP block-diagonal ({PAPER}).",
            "",
            "With `loco-workbench` installed, whose `lib` is imported here:",
            "",
            "```python",
            USE[retrieves],
            "```",
            "",
            "## What it is",
            "",
            *table(facts),
            "## Trained on",
            "",
            *table({name: value for name, value in lineage.items() if value is not None}),
            "## Measured",
            "",
            *table(about.get("metrics", {})),
            "## Settings",
            "",
            *(
                [
                    f"sha256 `{fingerprint(settings)}`",
                    "",
                    "```json",
                    json.dumps(settings, indent=1, sort_keys=True),
                    "```",
                    "",
                ]
                if settings
                else ["Unknown.", ""]
            ),
        ]
    )


def table(rows: dict) -> list[str]:
    if not rows:
        return ["Unknown.", ""]
    return [
        "| | |",
        "|---|---|",
        *(f"| {written(name)} | {written(value)} |" for name, value in rows.items()),
        "",
    ]


def written(value) -> str:
    text = (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )
    return text.replace("|", "\\|").replace("\n", " ")
