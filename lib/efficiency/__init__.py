"""What encoding costs: counted on paper, and measured on this machine.

Read counts.py first: operations, bytes and weights of M2-BERT and of a Transformer of its size.
Then race.py: encoders timed in interleaved rounds, with their peak memory and the machine's limits.
Notebook 10 shows both; `python tests/bench_encoder.py` measures the published sizes. `estimate`
says how long training takes before its first step. Nothing measured enters the report's tables.
Tests: tests/efficiency.
"""
