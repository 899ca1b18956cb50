// The operator as PyTorch sees it: schema, checks, CPU, CUDA and autocast. Fake and autograd kernels are in ops.py.
// Read: the schema at the end -> problem -> forward_cpu -> forward_cuda -> forward_autocast.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>

#include "cpu.h"
#ifdef MSDA_WITH_CUDA
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels.h"
#endif

namespace msda {
namespace {

using at::IntArrayRef;
using at::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// The type of sums, locations and weights: 16-bit values are added in float.
at::ScalarType precise(const Tensor& value) { return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Sizes that fit each other, or an error: past this point kernels trust them.
Problem problem(const Tensor& value, IntArrayRef shapes, const Tensor& locations, const Tensor& weights,
                const Tensor* grad_output = nullptr) {
  const int64_t levels = shapes.size() / 2;
  TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5 && shapes.size() % 2 == 0,
              "ms_deform_attn: expected value (B,S,M,D), locations (B,Q,M,L,P,2), weights (B,Q,M,L,P), got ",
              value.sizes(), ", ", locations.sizes(), ", ", weights.sizes());
  TORCH_CHECK(levels <= kMaxLevels && locations.size(4) < INT32_MAX, "ms_deform_attn: ", levels, " levels of ",
              locations.size(4), " points; at most ", kMaxLevels, " levels are supported");
  Problem p{value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1),
            static_cast<int>(levels), static_cast<int>(locations.size(4)), {}, {}, {}};
  int64_t rows = 0;
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t h = shapes[2 * level], w = shapes[2 * level + 1];
    TORCH_CHECK(h > 0 && w > 0 && h < (1 << 24) && w < (1 << 24), "ms_deform_attn: level ", level, " is ", h, " x ", w);
    p.height[level] = h, p.width[level] = w, p.start[level] = rows;
    rows += h * w;
  }
  TORCH_CHECK(rows == p.S, "ms_deform_attn: the levels hold ", rows, " positions, value holds ", p.S);
  TORCH_CHECK(locations.sizes() == IntArrayRef({p.B, p.Q, p.M, levels, p.P, 2}) &&
                  weights.sizes() == IntArrayRef({p.B, p.Q, p.M, levels, p.P}),
              "ms_deform_attn: locations ", locations.sizes(), " and weights ", weights.sizes(), " do not fit value ",
              value.sizes(), " and ", levels, " levels");
  for (const Tensor& x : {locations, weights})
    TORCH_CHECK(x.scalar_type() == precise(value) && x.device() == value.device(),
                "ms_deform_attn: with value in ", value.scalar_type(), " on ", value.device(),
                ", locations and weights must be ", precise(value), " there, got ", x.scalar_type(), " on ",
                x.device());
  if (grad_output != nullptr)
    TORCH_CHECK(grad_output->sizes() == IntArrayRef({p.B, p.Q, p.M * p.D}) && grad_output->device() == value.device(),
                "ms_deform_attn: gradient of shape ", grad_output->sizes(), " on ", grad_output->device());
  return p;
}

Tensor forward_cpu(const Tensor& value_, IntArrayRef shapes, const Tensor& locations_, const Tensor& weights_) {
  const Problem p = problem(value_, shapes, locations_, weights_);
  const Tensor value = value_.to(precise(value_)).contiguous(), locations = locations_.contiguous(),
               weights = weights_.contiguous(), output = at::empty({p.B, p.Q, p.M * p.D}, value.options());
  AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "ms_deform_attn", [&] {
    const auto *v = value.const_data_ptr<scalar_t>(), *l = locations.const_data_ptr<scalar_t>(),
               *w = weights.const_data_ptr<scalar_t>();
    auto* out = output.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, p.B * p.M * p.Q, 128,
                     [&](int64_t begin, int64_t end) { forward_range(p, v, l, w, out, begin, end); });
  });
  return output.to(value_.scalar_type());
}

Gradients backward_cpu(const Tensor& grad_, const Tensor& value_, IntArrayRef shapes, const Tensor& locations_,
                       const Tensor& weights_) {
  const Problem p = problem(value_, shapes, locations_, weights_, &grad_);
  const Tensor value = value_.to(precise(value_)).contiguous(), grad = grad_.to(precise(value_)).contiguous(),
               locations = locations_.contiguous(), weights = weights_.contiguous();
  const Tensor grad_value = at::empty_like(value), grad_locations = at::empty_like(locations),
               grad_weights = at::empty_like(weights);
  AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "ms_deform_attn_backward", [&] {
    const auto *g = grad.const_data_ptr<scalar_t>(), *v = value.const_data_ptr<scalar_t>(),
               *l = locations.const_data_ptr<scalar_t>(), *w = weights.const_data_ptr<scalar_t>();
    auto *gv = grad_value.mutable_data_ptr<scalar_t>(), *gl = grad_locations.mutable_data_ptr<scalar_t>(),
         *gw = grad_weights.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, p.B * p.M, 1, [&](int64_t begin, int64_t end) {
      backward_range(p, g, v, l, w, gv, gl, gw, begin, end);
    });
  });
  return {grad_value.to(value_.scalar_type()), grad_locations, grad_weights};
}

#ifdef MSDA_WITH_CUDA
Type type_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case at::kFloat: return Type::kFloat;
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBFloat16;
    default: TORCH_CHECK(false, "ms_deform_attn: no CUDA kernel for ", value.scalar_type());
  }
}

Tensor forward_gpu(const Tensor& value_, IntArrayRef shapes, const Tensor& locations_, const Tensor& weights_) {
  const Problem p = problem(value_, shapes, locations_, weights_);
  const c10::cuda::CUDAGuard guard(value_.device());
  const Tensor value = value_.contiguous(), locations = locations_.contiguous(), weights = weights_.contiguous();
  const Tensor output = at::empty({p.B, p.Q, p.M * p.D}, value.options());
  C10_CUDA_CHECK(forward_cuda(type_of(value), p, value.const_data_ptr(), locations.const_data_ptr(),
                              weights.const_data_ptr(), output.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return output;
}

Gradients backward_gpu(const Tensor& grad_, const Tensor& value_, IntArrayRef shapes, const Tensor& locations_,
                       const Tensor& weights_) {
  at::globalContext().alertNotDeterministic("ms_deform_attn_backward_cuda");  // atomics add in no fixed order
  const Problem p = problem(value_, shapes, locations_, weights_, &grad_);
  const c10::cuda::CUDAGuard guard(value_.device());
  const Tensor value = value_.contiguous(), locations = locations_.contiguous(), weights = weights_.contiguous();
  const Tensor grad = grad_.to(value.scalar_type()).contiguous();
  const Tensor grad_value = at::zeros(value.sizes(), value.options().dtype(precise(value)));
  const Tensor grad_locations = at::empty_like(locations), grad_weights = at::empty_like(weights);
  C10_CUDA_CHECK(backward_cuda(type_of(value), p, grad.const_data_ptr(), value.const_data_ptr(),
                               locations.const_data_ptr(), weights.const_data_ptr(), grad_value.mutable_data_ptr(),
                               grad_locations.mutable_data_ptr(), grad_weights.mutable_data_ptr(),
                               c10::cuda::getCurrentCUDAStream()));
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}
#endif

// Under autocast the value takes the autocast type; where to look, and how much of it, stay in float32.
template <c10::DispatchKey kKey, c10::DeviceType kDevice>
Tensor forward_autocast(const Tensor& value, c10::SymIntArrayRef shapes, const Tensor& locations,
                        const Tensor& weights) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("msda::forward", "")
                             .typed<Tensor(const Tensor&, c10::SymIntArrayRef, const Tensor&, const Tensor&)>();
  const Tensor cast = at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), value, kDevice);
  return op.call(cast, shapes, locations.to(precise(cast)), weights.to(precise(cast)));
}

}  // namespace

TORCH_LIBRARY(msda, m) {
  m.def("forward(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def("backward(Tensor grad_output, Tensor value, SymInt[] shapes, Tensor locations, Tensor weights)"
        " -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(msda, CPU, m) {
  m.impl("forward", forward_cpu);
  m.impl("backward", backward_cpu);
}
#ifdef MSDA_WITH_CUDA
TORCH_LIBRARY_IMPL(msda, CUDA, m) {
  m.impl("forward", forward_gpu);
  m.impl("backward", backward_gpu);
}
#endif
TORCH_LIBRARY_IMPL(msda, AutocastCPU, m) {
  m.impl("forward", forward_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(msda, AutocastCUDA, m) {
  m.impl("forward", forward_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace msda
