"""The fast text beside the plain one: the same numbers sooner and from less memory, switched on by one visible line.

    with fast.training(model):      around forward and backward pass of a step
    with fast.inference(model):     around evaluation and prediction

Reading order: training.py and inference.py (the two lines, and which parts of a model have another text) -> swap.py (a
text that has been changed wins) -> operators.py, attention.py, convolutions.py (PyTorch's functions by quicker ways) ->
launches.py (fewer kernels on a GPU) -> recompute.py (less kept for the backward pass) -> losses.py (all matchings and
losses at once) -> allocator.py.

This package imports the core. The core does not know of it: one line each in train.py, evaluate.py and predict.py
switches it on. Delete it and the numbers stay.
"""

from fast.allocator import keep_freed_memory
from fast.inference import inference
from fast.training import training

__all__ = ["inference", "keep_freed_memory", "training"]
