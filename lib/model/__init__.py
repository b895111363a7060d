"""The encoder, from its configuration to its files; it computes with lib/operators and lib/kernels.

Read m2bert.py first: configuration, sequence mixer, MLP, encoder and heads. Then extend.py, a model
for longer texts; tokens.py, texts to ids; checkpoint.py, our models on disk; published.py, the
authors' files as our model; device.py, device and number of threads of a process; and hub.py, the
models as transformers and sentence-transformers want them.
Tests: tests/model.
"""
