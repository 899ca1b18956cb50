// The arithmetic of one sampling point, the same text for the CPU and the CUDA kernels. Read: Problem -> Point.
//
// B batch, Q queries, M heads, D channels of a head, L levels, P points of a level, S = sum of h * w over levels.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MSDA_INLINE __host__ __device__ __forceinline__
#else
#define MSDA_INLINE inline __attribute__((always_inline))
#endif

namespace msda {

constexpr int kMaxLevels = 16;

// All sizes, passed to kernels by value: nothing about shapes lies on the device, so nothing waits for it.
struct Problem {
  int64_t B, S, M, D, Q;
  int L, P;
  int height[kMaxLevels], width[kMaxLevels];
  int64_t start[kMaxLevels];  // first row of each level in S
};

// Where a point falls on one level, and what its four corners share. Corner 0..3 = (top, bottom) x (left, right).
template <typename A>
struct Point {
  int x, y;      // the pixel up and left of the point; -1 lies just off the map
  int w, h;
  A fx, fy;      // the way from there to the next pixel, in [0, 1)
  bool touches;  // any corner on the map?

  // (u, v) in [0, 1] spans the map, so pixel centres lie at (i + 1/2) / w.
  MSDA_INLINE Point(A u, A v, int width, int height) : w(width), h(height) {
    A px = u * static_cast<A>(w) - A(0.5), py = v * static_cast<A>(h) - A(0.5);
    // False for NaN and for points far out, which must not reach the conversion to int: it would overflow.
    touches = px > A(-1) && px < static_cast<A>(w) && py > A(-1) && py < static_cast<A>(h);
    if (!touches) px = py = A(0);
    const A left = std::floor(px), top = std::floor(py);
    x = static_cast<int>(left);
    y = static_cast<int>(top);
    fx = px - left;
    fy = py - top;
  }

  MSDA_INLINE bool has(int corner) const {
    const int cx = x + (corner & 1), cy = y + (corner >> 1);
    return touches && cx >= 0 && cx < w && cy >= 0 && cy < h;
  }
  MSDA_INLINE int64_t row(int corner) const { return int64_t(y + (corner >> 1)) * w + x + (corner & 1); }
  // The corner's share of the sample, and the share's slopes along u and v.
  MSDA_INLINE A share_x(int corner) const { return corner & 1 ? fx : A(1) - fx; }
  MSDA_INLINE A share_y(int corner) const { return corner >> 1 ? fy : A(1) - fy; }
  MSDA_INLINE A share(int corner) const { return share_x(corner) * share_y(corner); }
  MSDA_INLINE A slope_u(int corner) const { return (corner & 1 ? w : -w) * share_y(corner); }
  MSDA_INLINE A slope_v(int corner) const { return (corner >> 1 ? h : -h) * share_x(corner); }
};

}  // namespace msda
