// Enough of CUDA to run kernels.cu, unchanged, on a host without a GPU. It lies before the real header on the include
// path. Read: run_warp -> __shfl_xor_sync -> atomicAdd -> MSDA_LAUNCH.
//
// Warps run one after another; the 32 lanes of a warp are fibers that take turns, and stop at each shuffle until all
// have arrived. A lane that left, or stands at another shuffle, ends the program: on a GPU that is undefined.
// The n-th atomics of all lanes count as one instruction. That is exact where no lane skips a corner.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <set>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace emulation {

constexpr int kLanes = 32;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
  unsigned thread = 0;
  int64_t shuffles = 0, atomics = 0;
  double offered = 0;
};
inline Lane lanes[kLanes];
inline ucontext_t scheduler;
inline int running = 0;
inline std::function<void()> body;
inline std::set<std::pair<int64_t, uintptr_t>> touched;  // by a warp: (its n-th atomic, sector of 32 bytes)
inline int64_t sectors = 0;                              // the sum of all warps

inline void yield() {
  const int me = running;
  swapcontext(&lanes[me].context, &scheduler);
}

inline void enter() {
  body();
  lanes[running].done = true;
  yield();
}

inline void run_warp(unsigned first_thread) {
  for (int i = 0; i < kLanes; ++i) {
    Lane& lane = lanes[i];
    lane.done = false, lane.shuffles = lane.atomics = 0, lane.thread = first_thread + i;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, enter, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (running = 0; running < kLanes; ++running) {
      if (lanes[running].done) continue;
      any = true;
      threadIdx.x = lanes[running].thread;
      swapcontext(&scheduler, &lanes[running].context);
    }
  }
  sectors += touched.size();
  touched.clear();
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, Arguments... arguments) {
  body = [=] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (unsigned thread = 0; thread < threads; thread += kLanes) run_warp(thread);
}

}  // namespace emulation

template <typename A>
A __shfl_xor_sync(unsigned mask, A x, int step) {
  using namespace emulation;
  Lane& me = lanes[running];
  Lane& other = lanes[running ^ step];
  me.offered = x;  // a double holds every float
  ++me.shuffles;
  yield();  // all have offered
  if (mask != 0xffffffffu || other.done || other.shuffles != me.shuffles) {
    std::fprintf(stderr, "emulation: lanes of a warp disagree at a shuffle\n");
    std::abort();
  }
  const A result = static_cast<A>(other.offered);
  yield();  // all have read
  return result;
}

inline void atomicAdd(float* target, float x) {
  using namespace emulation;
  touched.emplace(lanes[running].atomics++, reinterpret_cast<uintptr_t>(target) / 32);
  *target += x;
}

inline void atomicAdd(float4* target, float4 x) {
  using namespace emulation;
  touched.emplace(lanes[running].atomics++, reinterpret_cast<uintptr_t>(target) / 32);
  *target = make_float4(target->x + x.x, target->y + x.y, target->z + x.z, target->w + x.w);
}

#define MSDA_LAUNCH(kernel, blocks, threads, stream, ...) emulation::launch(kernel, blocks, threads, __VA_ARGS__)
