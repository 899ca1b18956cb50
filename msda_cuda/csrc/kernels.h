// What the binding calls and kernels.cu defines: launchers that know nothing of PyTorch, so that nvcc takes seconds.
#pragma once

#include <cuda_runtime_api.h>

#include "point.h"

namespace msda {

enum class Type { kFloat, kHalf, kBFloat16 };

// Pointers are to contiguous arrays of the type; locations, weights and every gradient but that of the output are
// float. grad_value comes zeroed. Returns the launch's error.
cudaError_t forward_cuda(Type type, const Problem& p, const void* value, const void* locations, const void* weights,
                         void* output, cudaStream_t stream);
cudaError_t backward_cuda(Type type, const Problem& p, const void* grad_output, const void* value,
                          const void* locations, const void* weights, void* grad_value, void* grad_locations,
                          void* grad_weights, cudaStream_t stream);

}  // namespace msda
