"""What a process frees, kept for its next layer: a seventh off a training step on a CPU."""

from contextlib import suppress
from functools import cache


@cache  # once for the life of the process
def keep_freed_memory() -> None:
    """Have the C library keep what this process frees, where it can.

    Large tensors come and go in every layer; by default each is mapped anew, at a page fault for every 4 kB. Not for
    single huge pictures: between tensors of many sizes the heap frays, and its peak is more than twice as high (4.2
    for 1.8 GB).
    """
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    with suppress(ImportError, OSError, AttributeError, TypeError):  # another system, another C library
        import ctypes  # not every Python has it

        ctypes.CDLL(None).mallopt(mmap_max, 0)
        ctypes.CDLL(None).mallopt(trim_threshold, -1)
