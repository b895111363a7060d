"""Training: from random weights to an encoder, and from an encoder to a retriever.

Start with `losses`, the equations. `text` and `pairs` hold what a step learns from
(`duplicates` finds texts that must not be negatives, `negatives` documents that are hard
ones), `optim` what every step does, `steps` and `gradients` what a fine-tuning step does.
`pretrain` and `finetune` put them together; `resume` keeps checkpoints, and `ranks` shares
a step among processes. `bound_pairs` trains on documents of the same words. A step depends
on its seed and number alone, and budgets are counts (tokens, documents), never seconds.
"""
