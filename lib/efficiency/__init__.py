"""What encoding costs: counted on paper, and measured by a clock.

Read `counts` first, which says what any implementation of M2-BERT and of its Transformer twin has
to do; `race` measures several implementations in turns on this machine. Nothing in lib/ needs
this room: notebooks 02 and 10 and the benchmarks in tests/ do.
"""
