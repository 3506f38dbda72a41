// Launchers of wait_kernel, and the layout of what the host shares with the kernels.
#include "adrenaline/wait.cuh"

#include <tvm/ffi/string.h>

#include <cstddef>
#include <sstream>

#include "adrenaline/attend.cuh"
#include "checks.h"

namespace adrenaline {

void launch_wait(TensorView endpoint, uint32_t layer, uint32_t opens) {
  uint32_t one;
  Endpoint* e = check_endpoints(endpoint, one, 1);
  const DLDevice device = endpoint.device();
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  wait_kernel<<<1, 32, 0, current_stream(device)>>>(e, layer, opens);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

void wait_step(TensorView endpoint) { launch_wait(endpoint, 0, 1); }

void wait_layer(TensorView endpoint, int64_t layer) { launch_wait(endpoint, check_layer(layer), 0); }

// "Endpoint.step:128 ...": byte offsets and how places are made, which kernels.py compares with what Python writes.
tvm::ffi::String layout() {
  std::ostringstream text;
#define ADRENALINE_FIELD(type, field) text << #type "." #field ":" << offsetof(type, field) << ' '
  ADRENALINE_FIELD(Endpoint, connected);
  ADRENALINE_FIELD(Endpoint, num_layers);
  ADRENALINE_FIELD(Endpoint, lanes);
  ADRENALINE_FIELD(Endpoint, num_heads);
  ADRENALINE_FIELD(Endpoint, send_row_bytes);
  ADRENALINE_FIELD(Endpoint, recv_row_bytes);
  ADRENALINE_FIELD(Endpoint, peer_rows);
  ADRENALINE_FIELD(Endpoint, peer_lse);
  ADRENALINE_FIELD(Endpoint, peer_flag);
  ADRENALINE_FIELD(Endpoint, own_rows);
  ADRENALINE_FIELD(Endpoint, own_lse);
  ADRENALINE_FIELD(Endpoint, own_flag);
  ADRENALINE_FIELD(Endpoint, control);
  ADRENALINE_FIELD(Endpoint, status);
  ADRENALINE_FIELD(Endpoint, step);
  ADRENALINE_FIELD(Endpoint, open);
  ADRENALINE_FIELD(Endpoint, launches);
  ADRENALINE_FIELD(Endpoint, error);
  ADRENALINE_FIELD(Endpoint, arrivals);
  ADRENALINE_FIELD(Endpoint, wait_ns);
  ADRENALINE_FIELD(Endpoint, waits);
  ADRENALINE_FIELD(Endpoint, work_from_ns);
  ADRENALINE_FIELD(Endpoint, work_ns);
  ADRENALINE_FIELD(Endpoint, joins);
  ADRENALINE_FIELD(HostControl, abort);
  ADRENALINE_FIELD(HostControl, wait_limit_ns);
  ADRENALINE_FIELD(HostControl, open_limit_ns);
  ADRENALINE_FIELD(HostControl, cancelled_launches);
  ADRENALINE_FIELD(HostStatus, error);
  ADRENALINE_FIELD(HostStatus, error_call);
  ADRENALINE_FIELD(HostStatus, steps_opened);
  ADRENALINE_FIELD(HostStatus, steps_done);
  ADRENALINE_FIELD(HostStatus, launches);
  ADRENALINE_FIELD(HostStatus, wait_ns);
  ADRENALINE_FIELD(HostStatus, waits);
  ADRENALINE_FIELD(HostStatus, work_ns);
#undef ADRENALINE_FIELD
  text << "lane_bits:" << kLaneBits << " attend_columns:" << kAttendColumns << ' ';
  return tvm::ffi::String(text.str());
}

} // namespace adrenaline

TVM_FFI_DLL_EXPORT_TYPED_FUNC(wait_step, adrenaline::wait_step);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(wait_layer, adrenaline::wait_layer);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layout, adrenaline::layout);
