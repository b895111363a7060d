"""The benchmark: tasks, what ranks their documents, and how good a ranking is.

Read task, sources and locov1 for what a task is; then metrics and statistics
for its scores; then search, encoder and bm25 for how a ranking comes about.
The rest are wings: rankers and hosted (models made elsewhere), runs (TREC
files), needle (the same answer at other depths of a document), binding (two
documents of the same words).
"""
