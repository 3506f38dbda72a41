// Checks and helpers shared by the launchers.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/base.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "adrenaline/endpoint.cuh"

namespace adrenaline {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr DLDataType kInt32 = {kDLInt, 32, 1};
constexpr DLDataType kInt64 = {kDLInt, 64, 1};
constexpr DLDataType kFloat32 = {kDLFloat, 32, 1};
constexpr DLDataType kFloat16 = {kDLFloat, 16, 1};
constexpr DLDataType kBFloat16 = {kDLBfloat, 16, 1};

inline bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

#define ADRENALINE_CHECK(condition, message)             \
  if (!(condition)) {                                    \
    TVM_FFI_THROW(ValueError) << message; /* NOLINT */   \
  }

// A dense CUDA tensor of `ndim` dimensions and this dtype, on the endpoint's device.
inline void check_dense(const char* name, TensorView t, int ndim, DLDataType dtype, DLDevice device) {
  ADRENALINE_CHECK(t.ndim() == ndim, name << ": expected " << ndim << " dimensions, got " << t.ndim());
  ADRENALINE_CHECK(same(t.dtype(), dtype), name << ": unexpected dtype");
  ADRENALINE_CHECK(t.device().device_type == device.device_type && t.device().device_id == device.device_id,
                   name << ": not on the endpoint's device");
  ADRENALINE_CHECK(t.IsContiguous(), name << ": not contiguous");
}

// [rows, heads, head_dim], 16-bit, heads of a row dense, rows at any stride; all on 16-byte boundaries.
inline void check_rows(const char* name, TensorView t, DLDevice device) {
  ADRENALINE_CHECK(t.ndim() == 3, name << ": expected 3 dimensions, got " << t.ndim());
  ADRENALINE_CHECK(same(t.dtype(), kFloat16) || same(t.dtype(), kBFloat16), name << ": expected float16 or bfloat16");
  ADRENALINE_CHECK(t.device().device_type == device.device_type && t.device().device_id == device.device_id,
                   name << ": not on the endpoint's device");
  ADRENALINE_CHECK(t.size(2) % 8 == 0, name << ": head_dim " << t.size(2) << " is not a multiple of 8");
  ADRENALINE_CHECK((t.stride(2) == 1 || t.size(2) == 1) && (t.stride(1) == t.size(2) || t.size(1) == 1),
                   name << ": the heads of a row must be dense");
  ADRENALINE_CHECK(t.size(0) <= 1 || t.stride(0) % 8 == 0, name << ": rows must start on 16-byte boundaries");
  ADRENALINE_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name << ": not on a 16-byte boundary");
}

// As many endpoints as the tensor holds, at most `most`; their number goes to `num_links`.
inline Endpoint* check_endpoints(TensorView t, uint32_t& num_links, uint32_t most = kMaxLinks) {
  constexpr int64_t kWords = sizeof(Endpoint) / 8;
  ADRENALINE_CHECK(t.device().device_type == kDLCUDA, "endpoint: not a CUDA tensor");
  check_dense("endpoint", t, 1, kInt64, t.device());
  ADRENALINE_CHECK(t.size(0) % kWords == 0 && t.size(0) >= kWords && t.size(0) <= kWords * most,
                   "endpoint: expected 1 to " << most << " times " << kWords << " words, got " << t.size(0));
  num_links = static_cast<uint32_t>(t.size(0) / kWords);
  return static_cast<Endpoint*>(t.data_ptr());
}

inline const int32_t* check_index(const char* name, TensorView t, int64_t size, DLDevice device) {
  check_dense(name, t, 1, kInt32, device);
  ADRENALINE_CHECK(t.size(0) == size, name << ": expected " << size << " entries, got " << t.size(0));
  return static_cast<const int32_t*>(t.data_ptr());
}

inline uint32_t check_layer(int64_t layer) {
  ADRENALINE_CHECK(layer >= 0 && layer < (1 << 16), "layer: " << layer << " is out of range");
  return static_cast<uint32_t>(layer);
}

inline cudaStream_t current_stream(DLDevice device) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

} // namespace adrenaline
