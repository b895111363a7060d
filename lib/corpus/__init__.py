"""The benchmark that is made here: tasks, pretraining text and a tokenizer in one folder.

Read `build` first, which puts everything together. `packages` reads the documentation of the
installed packages, `documents` packs it into long documents, `tasks` asks for places in them,
`pretraining` and `tokenizer` make the rest. `preflight` looks for what a later stage would refuse.
"""
