"""What a layer computes: the operators of M2-BERT in plain torch. Read this room first.

long_conv.py   the long convolution: its definition, the same by FFT, and the implicit filter
shared.py      what all forward passes of a training step share
monarch.py     block-diagonal and Monarch matrices, and the linear layer made of them
Then read lib/model/m2bert.py, which builds the encoder from them. Tests: tests/operators.
"""
