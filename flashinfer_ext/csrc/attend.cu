// Launcher of attend_kernel and merge_partials_kernel, and what the host needs to know to plan for it.
#include "adrenaline/attend.cuh"

#include <algorithm>

#include "checks.h"

namespace adrenaline {

struct AttendFit {
  int warps;  // of a block
  int blocks; // of an SM
};

// What the device's shared memory holds. GPUs with less of it than an H100 get fewer warps.
template <int kHeadDim>
AttendFit fit(DLDevice device) {
  constexpr int kRing = static_cast<int>(sizeof(AttendRing<kHeadDim>));
  constexpr int kReserved = 1024; // by CUDA, of each block
  int of_block, of_sm;
  TVM_FFI_CHECK_CUDA_ERROR(
      cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.device_id));
  TVM_FFI_CHECK_CUDA_ERROR(
      cudaDeviceGetAttribute(&of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.device_id));
  const int warps = std::min(kAttendWarps, of_block / kRing);
  ADRENALINE_CHECK(warps > 0, "the GPU's blocks have " << of_block << " bytes of shared memory, a warp needs " << kRing);
  return {warps, std::clamp(of_sm / (warps * kRing + kReserved), 1, kAttendBlocks<kHeadDim>)};
}

template <typename T, int kHeadDim>
void launch(const AttendParams& p, uint32_t sms, DLDevice device) {
  const AttendFit fits = fit<kHeadDim>(device);
  const int bytes = fits.warps * static_cast<int>(sizeof(AttendRing<kHeadDim>));
  TVM_FFI_CHECK_CUDA_ERROR(
      cudaFuncSetAttribute(attend_kernel<T, kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  attend_kernel<T, kHeadDim><<<sms * fits.blocks, fits.warps * 32, bytes, current_stream(device)>>>(p);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
  constexpr uint32_t kMergeBlocks = 12; // of an SM
  merge_partials_kernel<T, kHeadDim><<<sms * kMergeBlocks, kAttendMergeWarps * 32, 0, current_stream(device)>>>(p);
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

template <typename T>
void launch(const AttendParams& p, int64_t head_dim, uint32_t sms, DLDevice device) {
  switch (head_dim) {
    case 64:
      return launch<T, 64>(p, sms, device);
    case 128:
      return launch<T, 128>(p, sms, device);
    case 256:
      return launch<T, 256>(p, sms, device);
    default:
      TVM_FFI_THROW(ValueError) << "q: expected head_dim 64, 128 or 256, got " << head_dim;
  }
}

// [num_slots, kv_heads, head_dim] of the queries' dtype; heads of a slot dense, slots at any stride.
void check_pool(const char* name, TensorView t, TensorView q) {
  check_rows(name, t, q.device());
  ADRENALINE_CHECK(same(t.dtype(), q.dtype()), name << ": not of the queries' dtype");
  ADRENALINE_CHECK(t.size(2) == q.size(2), name << ": head_dim " << t.size(2) << ", the queries' is " << q.size(2));
}

// q, o [lanes, heads, head_dim] 16-bit dense; lse float32 [lanes, heads]; k, v [num_slots, kv_heads, head_dim];
// slots int32 [n]; plan int32 (AttendPlan); partial_o float32 [rows, heads, head_dim], partial_lse [rows, heads];
// tickets int32 [2], zero.
void attend(TensorView q, TensorView k, TensorView v, TensorView o, TensorView lse, TensorView slots, TensorView plan,
            TensorView partial_o, TensorView partial_lse, TensorView tickets, double sm_scale,
            int64_t sms) {
  const DLDevice device = q.device();
  check_rows("q", q, device);
  ADRENALINE_CHECK(q.IsContiguous(), "q: not contiguous");
  check_pool("k", k, q);
  check_pool("v", v, q);
  ADRENALINE_CHECK(k.size(1) == v.size(1) && k.size(0) == v.size(0) && k.stride(0) == v.stride(0),
                   "v: not of the shape of k");
  ADRENALINE_CHECK(k.stride(0) * 2 < (int64_t{1} << 31), "k: slots are " << k.stride(0) << " elements apart");
  ADRENALINE_CHECK(sm_scale > 0, "sm_scale: " << sm_scale << " is not positive");
  const int64_t lanes = q.size(0), heads = q.size(1), kv_heads = k.size(1);
  ADRENALINE_CHECK(heads % kv_heads == 0 && heads / kv_heads <= kAttendColumns,
                   "q: " << heads << " heads for " << kv_heads << " KV heads, at most " << kAttendColumns << " each");
  check_dense("o", o, 3, q.dtype(), device);
  check_dense("lse", lse, 2, kFloat32, device);
  check_dense("partial_o", partial_o, 3, kFloat32, device);
  check_dense("partial_lse", partial_lse, 2, kFloat32, device);
  ADRENALINE_CHECK(o.size(0) == lanes && o.size(1) == heads && o.size(2) == q.size(2), "o: not of the shape of q");
  ADRENALINE_CHECK(lse.size(0) == lanes && lse.size(1) == heads, "lse: not of the shape of q");
  ADRENALINE_CHECK(partial_o.size(1) == heads && partial_o.size(2) == q.size(2), "partial_o: not of the shape of q");
  ADRENALINE_CHECK(partial_lse.size(0) == partial_o.size(0) && partial_lse.size(1) == heads,
                   "partial_lse: not of the shape of partial_o");
  ADRENALINE_CHECK(sms > 0 && sms <= 4096, "sms: " << sms << " is out of range");
  AttendParams p = {};
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.o = o.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.slots = check_index("slots", slots, slots.size(0), device);
  p.plan = reinterpret_cast<const uint32_t*>(check_index("plan", plan, plan.size(0), device));
  p.partial_o = static_cast<float*>(partial_o.data_ptr());
  p.partial_lse = static_cast<float*>(partial_lse.data_ptr());
  p.tickets = reinterpret_cast<uint32_t*>(const_cast<int32_t*>(check_index("tickets", tickets, 2, device)));
  p.kv_stride = k.stride(0);
  p.num_kv_heads = static_cast<uint32_t>(kv_heads);
  p.group = static_cast<uint32_t>(heads / kv_heads);
  p.scale_log2 = static_cast<float>(sm_scale * 1.4426950408889634);
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  if (same(q.dtype(), kBFloat16)) {
    launch<__nv_bfloat16>(p, q.size(2), static_cast<uint32_t>(sms), device);
  } else {
    launch<__half>(p, q.size(2), static_cast<uint32_t>(sms), device);
  }
}

// Warps that work on an SM of the device at a time.
int64_t attend_warps(int64_t head_dim, int64_t device_id) {
  const DLDevice device = {kDLCUDA, static_cast<int32_t>(device_id)};
  const AttendFit fits = head_dim <= 64 ? fit<64>(device) : head_dim <= 128 ? fit<128>(device) : fit<256>(device);
  return fits.warps * fits.blocks;
}

} // namespace adrenaline

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attend, adrenaline::attend);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attend_warps, adrenaline::attend_warps);
