// Launcher of put_kernel.
#include "adrenaline/put.cuh"

#include <algorithm>

#include "checks.h"

namespace adrenaline {

void launch(const PutParams& p, DLDevice device) {
  const dim3 grid(std::max(p.num_rows, 1u), (p.row_bytes + kPutBlockBytes - 1) / kPutBlockBytes);
  put_kernel<<<grid, kPutThreads, 0, current_stream(device)>>>(p);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

// src [batch, heads, head_dim] 16-bit; rows, places int32 [num_rows]. Decode's queries.
void put_queries(TensorView endpoints, TensorView src, TensorView rows, TensorView places, int64_t layer) {
  const DLDevice device = endpoints.device();
  PutParams p = {};
  p.endpoints = check_endpoints(endpoints, p.num_links);
  check_rows("q", src, device);
  p.num_rows = static_cast<uint32_t>(rows.size(0));
  p.rows = check_index("rows", rows, p.num_rows, device);
  p.places = check_index("places", places, p.num_rows, device);
  p.src = static_cast<const uint8_t*>(src.data_ptr());
  p.src_stride_bytes = src.stride(0) * 2;
  p.src_rows = static_cast<uint32_t>(src.size(0));
  p.row_bytes = static_cast<uint32_t>(src.size(1) * src.size(2) * 2);
  p.num_heads = static_cast<uint32_t>(src.size(1));
  p.layer = check_layer(layer);
  p.opens = layer == 0;
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  launch(p, device);
}

// o [lanes, heads, head_dim] 16-bit, lse float32 [lanes, heads]: row i is lane i, or lanes[i] where lanes are given.
void put_answers(TensorView endpoint, TensorView o, TensorView lse, Optional<TensorView> lanes, int64_t layer) {
  const DLDevice device = endpoint.device();
  PutParams p = {};
  p.endpoints = check_endpoints(endpoint, p.num_links, 1);
  check_rows("o", o, device);
  check_dense("lse", lse, 2, kFloat32, device);
  ADRENALINE_CHECK(lse.size(0) == o.size(0) && lse.size(1) == o.size(1),
                   "lse: expected [" << o.size(0) << ", " << o.size(1) << "], got [" << lse.size(0) << ", "
                                     << lse.size(1) << "]");
  p.num_rows = p.src_rows = static_cast<uint32_t>(o.size(0));
  if (lanes.has_value()) p.places = check_index("lanes", lanes.value(), p.num_rows, device);
  p.src = static_cast<const uint8_t*>(o.data_ptr());
  p.src_lse = static_cast<const float*>(lse.data_ptr());
  p.src_stride_bytes = o.stride(0) * 2;
  p.row_bytes = static_cast<uint32_t>(o.size(1) * o.size(2) * 2);
  p.num_heads = static_cast<uint32_t>(o.size(1));
  p.layer = check_layer(layer);
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  launch(p, device);
}

} // namespace adrenaline

TVM_FFI_DLL_EXPORT_TYPED_FUNC(put_queries, adrenaline::put_queries);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(put_answers, adrenaline::put_answers);
