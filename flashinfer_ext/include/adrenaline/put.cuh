// put_and_signal: rows of a tensor into their lanes of the peer's buffer, then the peer's flag.
#pragma once

#include "endpoint.cuh"

namespace adrenaline {

constexpr int kPutThreads = 256;
constexpr int kPutChunks = 2; // 16-byte chunks of a thread, all loaded before the first is stored
constexpr uint32_t kPutBlockBytes = kPutThreads * kPutChunks * 16;

struct PutParams {
  Endpoint* endpoint;
  const uint8_t* src;       // [src_rows] rows of row_bytes, src_stride_bytes apart; both multiples of 16
  const float* src_lse;     // [src_rows, num_heads] dense, or null
  const int32_t* rows;      // [num_rows] row of src, negative = skip; null = 0, 1, 2, ...
  const int32_t* lanes;     // [num_rows] lane of the peer, negative = skip; null = 0, 1, 2, ...
  int64_t src_stride_bytes;
  uint32_t src_rows;
  uint32_t num_rows;
  uint32_t row_bytes;
  uint32_t num_heads;
  uint32_t layer;
  uint32_t opens; // 1: this is decode's put of layer 0, which begins a step
};

__device__ __forceinline__ void put_row(const PutParams& p, const Endpoint& e, uint32_t row, uint32_t lane) {
  const uint64_t slot = (p.layer & 1) * e.lanes + lane;
  const auto* src = reinterpret_cast<const uint4*>(p.src + row * p.src_stride_bytes);
  auto* dst = at<uint4>(e.peer_rows + slot * p.row_bytes);
  const uint32_t chunks = p.row_bytes / 16;
  const uint32_t first = blockIdx.y * (kPutThreads * kPutChunks) + threadIdx.x;
  uint4 value[kPutChunks];
#pragma unroll
  for (int i = 0; i < kPutChunks; ++i) {
    if (first + i * kPutThreads < chunks) value[i] = src[first + i * kPutThreads];
  }
#pragma unroll
  for (int i = 0; i < kPutChunks; ++i) {
    if (first + i * kPutThreads < chunks) dst[first + i * kPutThreads] = value[i];
  }
  if (p.src_lse != nullptr && blockIdx.y == 0) {
    auto* dst_lse = at<float>(e.peer_lse) + slot * p.num_heads;
    for (uint32_t h = threadIdx.x; h < p.num_heads; h += kPutThreads) {
      dst_lse[h] = p.src_lse[static_cast<uint64_t>(row) * p.num_heads + h];
    }
  }
}

// Grid (max(num_rows, 1), ceil(row_bytes / kPutBlockBytes)). The flag is raised by the block that finishes last:
// every block's stores are made visible by its fence before it counts itself, the last one's second fence orders what
// all of them did before the flag.
__global__ void __launch_bounds__(kPutThreads) put_kernel(const PutParams p) {
  Endpoint& e = *p.endpoint;
  if (!usable(e) || (!p.opens && e.open == 0)) return;
  if (p.row_bytes != e.send_row_bytes || p.layer >= e.num_layers ||
      (p.src_lse != nullptr && (e.peer_lse == 0 || p.num_heads != e.num_heads))) {
    if (threadIdx.x == 0) fail(e, kShape, e.step * e.num_layers + p.layer);
    return;
  }
  if (blockIdx.x < p.num_rows) {
    const int32_t row = p.rows == nullptr ? blockIdx.x : p.rows[blockIdx.x];
    const int32_t lane = p.lanes == nullptr ? blockIdx.x : p.lanes[blockIdx.x];
    if (row >= 0 && row < static_cast<int64_t>(p.src_rows) && lane >= 0 && lane < static_cast<int64_t>(e.lanes)) {
      put_row(p, e, row, lane);
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  fence_sys();
  const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y;
  if (blocks > 1) {
    if (atomicAdd(reinterpret_cast<unsigned long long*>(&e.arrivals), 1ull) != blocks - 1) return;
    e.arrivals = 0;
    fence_sys();
  }
  auto* status = at<HostStatus>(e.status);
  const uint64_t step = e.step + p.opens;
  store_relaxed_sys(at<uint64_t>(e.peer_flag), step * e.num_layers + p.layer);
  if (p.opens) {
    e.step = step;
    e.open = 1;
    store_relaxed_sys(&status->steps_opened, step);
  }
  if (p.src_lse == nullptr) { // decode
    begin_work(e);
  } else {
    end_work(e);
    if (p.layer == e.num_layers - 1) {
      store_relaxed_sys(&status->work_ns, e.work_ns);
      store_relaxed_sys(&status->steps_done, step);
    }
  }
}

} // namespace adrenaline
