// The CPU kernels for a range of work, free of PyTorch. Read: pack -> forward_rows -> backward_head -> the ranges.
//
// Arrays are (B, S, M, D) and (B, Q, M, ...), as the caller has them. The rows of one head lie M * D apart, often a
// power of two, so they would evict each other from the cache; each thread therefore works on a packed copy of one
// head, (S, D): 600 KB for a 480-pixel image, which stays in its own cache.
#pragma once

#include <algorithm>
#include <vector>

#include "point.h"

// One copy of the loops for each generation of x86, chosen when the library is loaded: a build cache on a shared disk
// then serves all machines. (The loader's choice runs before a sanitizer is ready, so those builds go without.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define MSDA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MSDA_CLONES
#endif

namespace msda {

// One head of one image, head = b * M + m: (S, M, D) <-> (S, D).
template <typename A>
MSDA_INLINE void pack(const Problem& p, const A* value, A* map, int64_t head) {
  const A* source = value + (head / p.M * p.S * p.M + head % p.M) * p.D;
  for (int64_t s = 0; s < p.S; ++s) std::copy(source + s * p.M * p.D, source + s * p.M * p.D + p.D, map + s * p.D);
}
template <typename A>
MSDA_INLINE void unpack(const Problem& p, const A* map, A* value, int64_t head) {
  A* target = value + (head / p.M * p.S * p.M + head % p.M) * p.D;
  for (int64_t s = 0; s < p.S; ++s) std::copy(map + s * p.D, map + s * p.D + p.D, target + s * p.M * p.D);
}

// This head's next query lies M * L * P entries on, too far for the hardware to guess.
template <typename A>
MSDA_INLINE void prefetch(const A* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(A)) __builtin_prefetch(row + i);
}
constexpr int64_t kAhead = 8;

// Rows [begin, end) of (B, M, Q). kChannels = 32 lets the compiler unroll the channel loop; 0 reads D.
template <typename A, int kChannels>
MSDA_INLINE void forward_rows(const Problem& p, const A* value, const A* locations, const A* weights, A* output,
                              int64_t begin, int64_t end) {
  const int64_t D = kChannels ? kChannels : p.D, LP = int64_t(p.L) * p.P;
  const std::vector<A> nothing(D);
  std::vector<A> map(p.S * D), sums(D);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t q = row % p.Q, head = row / p.Q;
    if (q == 0 || row == begin) pack(p, value, map.data(), head);
    const int64_t place = (head / p.M * p.Q + q) * p.M + head % p.M;  // in (B, Q, M)
    const A *location = locations + place * LP * 2, *weight = weights + place * LP;
    if (q + kAhead < p.Q) {
      prefetch(location + kAhead * p.M * LP * 2, LP * 2);
      prefetch(weight + kAhead * p.M * LP, LP);
    }
    A local[kChannels ? kChannels : 1] = {};
    A* sum = kChannels ? local : sums.data();
    if (!kChannels) std::fill(sum, sum + D, A(0));
    for (int level = 0, i = 0; level < p.L; ++level) {
      for (int k = 0; k < p.P; ++k, ++i) {
        const Point<A> point(location[2 * i], location[2 * i + 1], p.width[level], p.height[level]);
        if (!point.touches) continue;
        const A* pixel[4];
        A share[4];
        for (int corner = 0; corner < 4; ++corner) {  // off the map: zeros instead of a branch
          pixel[corner] = point.has(corner) ? map.data() + (p.start[level] + point.row(corner)) * D : nothing.data();
          share[corner] = weight[i] * point.share(corner);
        }
#pragma omp simd
        for (int64_t c = 0; c < D; ++c)
          sum[c] += share[0] * pixel[0][c] + share[1] * pixel[1][c] + share[2] * pixel[2][c] + share[3] * pixel[3][c];
      }
    }
    std::copy(sum, sum + D, output + place * D);
  }
}

// One head of one image, all its queries: grad_value then belongs to one thread, needs no atomics and has one order.
template <typename A, int kChannels>
MSDA_INLINE void backward_head(const Problem& p, const A* grad_output, const A* value, const A* locations,
                               const A* weights, A* grad_value, A* grad_locations, A* grad_weights, int64_t head) {
  const int64_t D = kChannels ? kChannels : p.D, LP = int64_t(p.L) * p.P;
  std::vector<A> map(p.S * D), grad_map(p.S * D);
  pack(p, value, map.data(), head);
  for (int64_t q = 0; q < p.Q; ++q) {
    const int64_t place = (head / p.M * p.Q + q) * p.M + head % p.M, ahead = place + kAhead * p.M;
    const A* grad = grad_output + place * D;
    if (q + kAhead < p.Q) {
      prefetch(locations + ahead * LP * 2, LP * 2);
      prefetch(weights + ahead * LP, LP);
      prefetch(grad_output + ahead * D, D);
    }
    int64_t at = place * LP;
    for (int level = 0; level < p.L; ++level) {
      for (int k = 0; k < p.P; ++k, ++at) {
        const Point<A> point(locations[2 * at], locations[2 * at + 1], p.width[level], p.height[level]);
        const A weight = weights[at];
        A grad_u = 0, grad_v = 0, grad_weight = 0;
        for (int corner = 0; corner < 4; ++corner) {
          if (!point.has(corner)) continue;
          const int64_t offset = (p.start[level] + point.row(corner)) * D;
          const A* pixel = map.data() + offset;
          A *target = grad_map.data() + offset, share = point.share(corner), scale = weight * share, dot = 0;
#pragma omp simd reduction(+ : dot)
          for (int64_t c = 0; c < D; ++c) {
            dot += grad[c] * pixel[c];
            target[c] += scale * grad[c];
          }
          grad_weight += share * dot;
          grad_u += point.slope_u(corner) * dot;
          grad_v += point.slope_v(corner) * dot;
        }
        grad_weights[at] = grad_weight;
        grad_locations[2 * at] = weight * grad_u;
        grad_locations[2 * at + 1] = weight * grad_v;
      }
    }
  }
  unpack(p, grad_map.data(), grad_value, head);
}

// The compiled ranges. A clone cannot be a template, hence the macro; the loops above are inlined into each.
#define MSDA_CPU_RANGES(A)                                                                                            \
  MSDA_CLONES inline void forward_range(const Problem& p, const A* value, const A* locations, const A* weights,       \
                                        A* output, int64_t begin, int64_t end) {                                      \
    if (p.D == 32) return forward_rows<A, 32>(p, value, locations, weights, output, begin, end);                      \
    forward_rows<A, 0>(p, value, locations, weights, output, begin, end);                                             \
  }                                                                                                                   \
  MSDA_CLONES inline void backward_range(const Problem& p, const A* grad, const A* value, const A* locations,         \
                                         const A* weights, A* grad_value, A* grad_locations, A* grad_weights,         \
                                         int64_t begin, int64_t end) {                                                \
    for (int64_t head = begin; head < end; ++head)                                                                    \
      if (p.D == 32)                                                                                                  \
        backward_head<A, 32>(p, grad, value, locations, weights, grad_value, grad_locations, grad_weights, head);     \
      else                                                                                                            \
        backward_head<A, 0>(p, grad, value, locations, weights, grad_value, grad_locations, grad_weights, head);      \
  }

MSDA_CPU_RANGES(float)
MSDA_CPU_RANGES(double)

}  // namespace msda
