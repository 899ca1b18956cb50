"""Multi-scale deformable attention: the function, the layer around it, its PyTorch text and its C++/CUDA operator.

Reading order: reference.py (the algorithm in 20 lines) -> module.py (the layer) -> ops.py (the choice between PyTorch
text and operator) -> csrc/point.h (the arithmetic of one point) -> csrc/cpu.h -> csrc/kernels.cu -> csrc/msda.cpp
(binding) -> build.py -> cache.py. `python -m msda_cuda` says which of the two is active here, and tests it.
"""

from .module import MSDeformAttn, reference_points
from .ops import active_path, ms_deform_attn
from .reference import ms_deform_attn_torch

__all__ = ["MSDeformAttn", "active_path", "ms_deform_attn", "ms_deform_attn_torch", "reference_points"]
