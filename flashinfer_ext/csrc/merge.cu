// Launcher of wait_and_merge_kernel.
#include "adrenaline/merge.cuh"

#include "checks.h"

namespace adrenaline {

template <typename T2, int kHeadDim>
void launch(const MergeParams& p, DLDevice device) {
  constexpr uint32_t kBlockHeads = kMergeThreads / (kHeadDim / kMergeVec);
  const dim3 grid(p.num_links + p.num_rows, (p.num_heads + kBlockHeads - 1) / kBlockHeads);
  wait_and_merge_kernel<T2, kHeadDim><<<grid, kMergeThreads, 0, current_stream(device)>>>(p);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

template <typename T2>
void launch(const MergeParams& p, int64_t head_dim, DLDevice device) {
  switch (head_dim) {
    case 64:
      return launch<T2, 64>(p, device);
    case 128:
      return launch<T2, 128>(p, device);
    case 256:
      return launch<T2, 256>(p, device);
    default:
      TVM_FFI_THROW(ValueError) << "o: expected head_dim 64, 128 or 256, got " << head_dim;
  }
}

// o [batch, heads, head_dim] 16-bit and lse float32 [batch, heads], both in place; rows, places int32 [num_rows].
void wait_and_merge(TensorView endpoints, TensorView o, TensorView lse, TensorView rows, TensorView places,
                    int64_t layer) {
  const DLDevice device = endpoints.device();
  MergeParams p = {};
  p.endpoints = check_endpoints(endpoints, p.num_links);
  check_rows("o", o, device);
  check_dense("lse", lse, 2, kFloat32, device);
  ADRENALINE_CHECK(lse.size(0) == o.size(0) && lse.size(1) == o.size(1),
                   "lse: expected [" << o.size(0) << ", " << o.size(1) << "], got [" << lse.size(0) << ", "
                                     << lse.size(1) << "]");
  p.num_rows = static_cast<uint32_t>(rows.size(0));
  p.rows = check_index("rows", rows, p.num_rows, device);
  p.places = check_index("places", places, p.num_rows, device);
  p.o = o.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.o_stride = o.stride(0);
  p.batch = static_cast<uint32_t>(o.size(0));
  p.num_heads = static_cast<uint32_t>(o.size(1));
  p.layer = check_layer(layer);
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  if (same(o.dtype(), kBFloat16)) {
    launch<__nv_bfloat162>(p, o.size(2), device);
  } else {
    launch<__half2>(p, o.size(2), device);
  }
}

} // namespace adrenaline

TVM_FFI_DLL_EXPORT_TYPED_FUNC(wait_and_merge, adrenaline::wait_and_merge);
