// The kernels behind C functions for ctypes, and a program that runs them all under sanitizers.
// Read: problem -> the extern "C" functions -> main.
#include "cuda_runtime_api.h"  // first: it takes CUDA's place in kernels.cu
//
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#define __CUDA_ARCH__ EMULATED_ARCH  // for kernels.cu alone: PyTorch's headers would look for CUDA's functions
#include "../../msda_cuda/csrc/cpu.h"
#include "../../msda_cuda/csrc/kernels.cu"

#include <limits>
#include <random>

using namespace msda;

// sizes = B, M, D, Q, L, P; shapes = h, w of each level.
static Problem problem(const int64_t* sizes, const int64_t* shapes) {
  Problem p{sizes[0], 0, sizes[1], sizes[2], sizes[3], int(sizes[4]), int(sizes[5]), {}, {}, {}};
  for (int level = 0; level < p.L; ++level) {
    p.height[level] = int(shapes[2 * level]), p.width[level] = int(shapes[2 * level + 1]), p.start[level] = p.S;
    p.S += shapes[2 * level] * shapes[2 * level + 1];
  }
  return p;
}

extern "C" int emulated_forward(int type, const int64_t* sizes, const int64_t* shapes, const void* value,
                                const void* locations, const void* weights, void* output) {
  return forward_cuda(Type(type), problem(sizes, shapes), value, locations, weights, output, nullptr);
}

extern "C" int emulated_backward(int type, const int64_t* sizes, const int64_t* shapes, const void* grad_output,
                                 const void* value, const void* locations, const void* weights, void* grad_value,
                                 void* grad_locations, void* grad_weights) {
  return backward_cuda(Type(type), problem(sizes, shapes), grad_output, value, locations, weights, grad_value,
                       grad_locations, grad_weights, nullptr);
}

// How many sectors of 32 bytes the atomic instructions have touched since the last call.
extern "C" int64_t emulated_sectors() { return std::exchange(emulation::sectors, 0); }

// Arrays of exactly the needed size, so that a sanitizer sees the first step outside.
static bool compare(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::abs(a[i] - b[i]) <= 1e-3f * (1 + std::abs(b[i])))) {
      std::printf("%s differs at %zu: %g, %g\n", what, i, a[i], b[i]);
      return false;
    }
  return true;
}

static bool run(const std::vector<int64_t>& sizes, const std::vector<int64_t>& shapes, std::mt19937& random) {
  const Problem p = problem(sizes.data(), shapes.data());
  std::normal_distribution<float> normal;
  const float extremes[] = {NAN, INFINITY, -INFINITY, 1e30f, -3e9f, 0.f, 1.f, std::numeric_limits<float>::max()};
  const size_t points = p.B * p.Q * p.M * p.L * p.P;
  std::vector<float> value(p.B * p.S * p.M * p.D), weights(points), locations(points * 2), grad(p.B * p.Q * p.M * p.D);
  for (auto* array : {&value, &weights, &grad})
    for (float& x : *array) x = normal(random);
  for (float& x : locations) x = random() % 8 ? 0.5f + normal(random) : extremes[random() % 8];
  std::vector<float> out[2], gv[2], gl[2], gw[2];
  for (int i = 0; i < 2; ++i)
    out[i].resize(grad.size()), gv[i].resize(value.size()), gl[i].resize(points * 2), gw[i].resize(points);
  forward_range(p, value.data(), locations.data(), weights.data(), out[0].data(), 0, p.B * p.M * p.Q);
  backward_range(p, grad.data(), value.data(), locations.data(), weights.data(), gv[0].data(), gl[0].data(),
                 gw[0].data(), 0, p.B * p.M);
  emulated_forward(0, sizes.data(), shapes.data(), value.data(), locations.data(), weights.data(), out[1].data());
  emulated_backward(0, sizes.data(), shapes.data(), grad.data(), value.data(), locations.data(), weights.data(),
                    gv[1].data(), gl[1].data(), gw[1].data());
  return compare(out[1], out[0], "output") && compare(gv[1], gv[0], "grad_value") &&
         compare(gl[1], gl[0], "grad_locations") && compare(gw[1], gw[0], "grad_weights");
}

int main() {
  std::mt19937 random(0);
  bool same = true;
  for (const auto& [sizes, shapes] : std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>{
           {{2, 3, 32, 13, 3, 4}, {5, 4, 3, 3, 1, 1}},
           {{1, 2, 7, 5, 1, 2}, {4, 6}},
           {{3, 1, 40, 3, 2, 1}, {1, 1, 2, 9}},
           {{2, 1, 32, 0, 1, 1}, {2, 2}}})
    same &= run(sizes, shapes, random);
  std::printf(same ? "same\n" : "different\n");
  return same ? 0 : 1;
}
