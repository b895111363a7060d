"""How the experiment runs: the ground that every other room stands on, and that imports none.

Read `params.py` (what params.yaml says) and `settings.py` (what it may say), then `notebook.py`
(a notebook as a stage) and `profile.py` (all stages at a profile). `python -m lib.pipeline` is
the command; `files.py`, `errors.py` and `progress.py` are tools.
"""
