"""How results become tables, figures, verdicts and pages; nothing here changes a number.

Read results (numbers written and read) and display (their look) first, then comparison (two rows),
claims (the paper's, with verdicts) and audit (each printed number); overview is notebook 11.
card writes the model card; site makes the report, with safe for harmless HTML.
"""
