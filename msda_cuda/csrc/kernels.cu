// CUDA kernels, free of PyTorch, so nvcc takes seconds. Read: forward_kernel -> backward_kernel -> launch -> choose.
//
// One group of lanes serves one (image, query, head). With 32 channels, as in every released model, a lane takes 16
// bytes of them: 8 lanes in float, 4 in 16-bit types. Any other width takes a whole warp, one channel a lane and turn.
// Sums, locations and weights are float, whatever the values. All lanes of a group see the same points, so the
// loads of a location are one broadcast and no lane leaves before the shuffles.
#ifndef MSDA_LAUNCH  // the tests define it to run these kernels on the host
#include <cuda_runtime.h>
#define MSDA_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "kernels.h"

namespace msda {
namespace {

constexpr int kThreads = 256, kBlocks = 4;  // four blocks share a multiprocessor: at most 64 registers a thread
constexpr unsigned kWarp = 0xffffffffu;

// Aligned to its size, so that it moves in one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <typename T, int N>
__device__ Vector<T, N> load(const T* source) {
  return *reinterpret_cast<const Vector<T, N>*>(source);
}

// target[i] += scale * x[i], against all other groups, in one instruction: of four floats from sm_90 on.
template <typename T>
__device__ void add(float* target, float scale, const Vector<T, 1>& x) {
  atomicAdd(target, scale * static_cast<float>(x.at[0]));
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kWide = 4;
template <typename T>
__device__ void add(float* target, float scale, const Vector<T, 4>& x) {
  atomicAdd(reinterpret_cast<float4*>(target),
            make_float4(scale * static_cast<float>(x.at[0]), scale * static_cast<float>(x.at[1]),
                        scale * static_cast<float>(x.at[2]), scale * static_cast<float>(x.at[3])));
}
#else
constexpr int kWide = 1;
#endif

// The sum over a group of lanes, in all of them.
template <int kLanes>
__device__ float group_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

// Group `row` of (B, Q, M); value's row s of the same head lies at value + s * M * D.
__device__ int64_t head_start(const Problem& p, int64_t row) {
  return (row / (p.Q * p.M) * p.S * p.M + row % p.M) * p.D;
}

template <typename T, int N, int kLanes, int kChannels>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const __grid_constant__ Problem p, const T* __restrict__ value,
                   const float* __restrict__ locations, const float* __restrict__ weights,
                   T* __restrict__ output) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes, D = kChannels ? kChannels : p.D;
  if (row >= p.B * p.Q * p.M) return;
  value += head_start(p, row);
  locations += row * p.L * p.P * 2;
  weights += row * p.L * p.P;
  for (int64_t c = threadIdx.x % kLanes * N; c < D; c += kLanes * N) {
    float sum[N] = {};
    for (int level = 0, i = 0; level < p.L; ++level) {
      const T* map = value + p.start[level] * p.M * D + c;
      for (int k = 0; k < p.P; ++k, ++i) {
        const Point<float> point(locations[2 * i], locations[2 * i + 1], p.width[level], p.height[level]);
        const float weight = weights[i];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (!point.has(corner)) continue;
          const auto pixel = load<T, N>(map + point.row(corner) * p.M * D);
          const float share = weight * point.share(corner);
#pragma unroll
          for (int j = 0; j < N; ++j) sum[j] += share * static_cast<float>(pixel.at[j]);
        }
      }
    }
    Vector<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.at[j] = static_cast<T>(sum[j]);
    *reinterpret_cast<Vector<T, N>*>(output + row * D + c) = result;
  }
}

template <typename T, int N, int kLanes, int kChannels>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const __grid_constant__ Problem p, const T* __restrict__ grad_output, const T* __restrict__ value,
                    const float* __restrict__ locations, const float* __restrict__ weights,
                    float* __restrict__ grad_value, float* __restrict__ grad_locations,
                    float* __restrict__ grad_weights) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, rows = p.B * p.Q * p.M;
  const int64_t D = kChannels ? kChannels : p.D;
  // The memory serves atomics by sectors of 32 bytes, so neighbouring lanes add to neighbouring channels: kAtOnce with
  // one instruction, kStep further with the next. The dot products take N neighbours a lane: two sets of channels.
  constexpr int kAtOnce = N < kWide ? N : kWide, kParts = N / kAtOnce, kStep = kLanes * kAtOnce;
  // Groups past the end share a warp with others: they compute a row again for the shuffles' sake, and store nothing.
  const bool counts = thread / kLanes < rows;
  const int64_t row = counts ? thread / kLanes : rows - 1, head = head_start(p, row);
  const int lane = threadIdx.x % kLanes, shift = lane * (kAtOnce - N);  // from one set to the other
  grad_value += shift;
  for (int level = 0; level < p.L; ++level) {
    for (int k = 0; k < p.P; ++k) {
      const int64_t i = (row * p.L + level) * p.P + k;
      const Point<float> point(locations[2 * i], locations[2 * i + 1], p.width[level], p.height[level]);
      const float weight = weights[i];
      float grad_u = 0, grad_v = 0, grad_weight = 0;
      for (int64_t c = lane * N; c < D; c += kLanes * N) {
        const T* source = grad_output + row * D + c;
        const auto grad = load<T, N>(source);
        Vector<T, kAtOnce> part[kParts];
#pragma unroll
        for (int j = 0; j < kParts; ++j) part[j] = load<T, kAtOnce>(source + shift + j * kStep);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (!point.has(corner)) continue;
          const int64_t offset = head + (p.start[level] + point.row(corner)) * p.M * D + c;
          const auto pixel = load<T, N>(value + offset);
          float dot = 0;
#pragma unroll
          for (int j = 0; j < N; ++j) dot += static_cast<float>(grad.at[j]) * static_cast<float>(pixel.at[j]);
          if (counts) {
            const float scale = weight * point.share(corner);
#pragma unroll
            for (int j = 0; j < kParts; ++j) add(grad_value + offset + j * kStep, scale, part[j]);
          }
          grad_weight += point.share(corner) * dot;
          grad_u += point.slope_u(corner) * dot;
          grad_v += point.slope_v(corner) * dot;
        }
      }
      grad_weight = group_sum<kLanes>(grad_weight);
      grad_u = group_sum<kLanes>(grad_u);
      grad_v = group_sum<kLanes>(grad_v);
      if (counts && lane == 0) {  // this group owns the row: plain stores
        grad_weights[i] = grad_weight;
        grad_locations[2 * i] = weight * grad_u;
        grad_locations[2 * i + 1] = weight * grad_v;
      }
    }
  }
}

template <typename T, int N, int kLanes, int kChannels>
cudaError_t launch(const Problem& p, const void* grad_output, const void* value, const void* locations,
                   const void* weights, void* output, void* grad_locations, void* grad_weights, cudaStream_t stream) {
  const int64_t blocks = (p.B * p.Q * p.M * kLanes + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;  // an empty grid is an error to CUDA
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto *l = static_cast<const float*>(locations), *w = static_cast<const float*>(weights);
  if (grad_output == nullptr) {
    MSDA_LAUNCH((forward_kernel<T, N, kLanes, kChannels>), static_cast<unsigned>(blocks), kThreads, stream, p,
                static_cast<const T*>(value), l, w, static_cast<T*>(output));
  } else {
    MSDA_LAUNCH((backward_kernel<T, N, kLanes, kChannels>), static_cast<unsigned>(blocks), kThreads, stream, p,
                static_cast<const T*>(grad_output), static_cast<const T*>(value), l, w, static_cast<float*>(output),
                static_cast<float*>(grad_locations), static_cast<float*>(grad_weights));
  }
  return cudaGetLastError();
}

// 32 channels on 16-byte boundaries take the fast kernels; a view may start anywhere, and then goes the general way.
template <typename T, typename... Rest>
cudaError_t choose(const Problem& p, const void* grad_output, const void* value, Rest... rest) {
  constexpr int N = 16 / sizeof(T);
  const bool aligned = (reinterpret_cast<uintptr_t>(grad_output) | reinterpret_cast<uintptr_t>(value)) % 16 == 0;
  if (p.D == 32 && aligned) return launch<T, N, 32 / N, 32>(p, grad_output, value, rest...);
  return launch<T, 1, 32, 0>(p, grad_output, value, rest...);
}

template <typename... Rest>
cudaError_t dispatch(Type type, Rest... rest) {
  switch (type) {
    case Type::kFloat: return choose<float>(rest...);
    case Type::kHalf: return choose<c10::Half>(rest...);
    case Type::kBFloat16: return choose<c10::BFloat16>(rest...);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t forward_cuda(Type type, const Problem& p, const void* value, const void* locations, const void* weights,
                         void* output, cudaStream_t stream) {
  const void* no_gradient = nullptr;
  void* none = nullptr;
  return dispatch(type, p, no_gradient, value, locations, weights, output, none, none, stream);
}

cudaError_t backward_cuda(Type type, const Problem& p, const void* grad_output, const void* value,
                          const void* locations, const void* weights, void* grad_value, void* grad_locations,
                          void* grad_weights, cudaStream_t stream) {
  return dispatch(type, p, grad_output, value, locations, weights, grad_value, grad_locations, grad_weights, stream);
}

}  // namespace msda
