// put_and_signal: rows of a tensor into their lanes of their peers' buffers, then the flags of these peers.
#pragma once

#include "endpoint.cuh"

namespace adrenaline {

constexpr int kPutThreads = 256;
constexpr int kPutChunks = 2; // 16-byte chunks of a thread, all loaded before the first is stored
constexpr uint32_t kPutBlockBytes = kPutThreads * kPutChunks * 16;

struct PutParams {
  Endpoint* endpoints;      // [num_links]
  const uint8_t* src;       // [src_rows] rows of row_bytes, src_stride_bytes apart; both multiples of 16
  const float* src_lse;     // [src_rows, num_heads] dense, or null
  const int32_t* rows;      // [num_rows] row of src, negative = skip; null = 0, 1, 2, ...
  const int32_t* places;    // [num_rows] where each goes, negative = skip; null = lanes 0, 1, 2, ...
  int64_t src_stride_bytes;
  uint32_t num_links;
  uint32_t src_rows;
  uint32_t num_rows;
  uint32_t row_bytes;
  uint32_t num_heads;
  uint32_t layer;
  uint32_t opens; // 1: this is decode's put of layer 0, which begins a step on each link that has a row
};

// Whether a put may send to this link. Rows of another size than the channel's are an error.
__device__ __forceinline__ bool sends(const PutParams& p, Endpoint& e) {
  // No && here: each would be a load that waits for the one before it.
  const bool lse_fits = (e.peer_lse != 0) & (p.num_heads == e.num_heads);
  const bool fits = (p.row_bytes == e.send_row_bytes) & (p.layer < e.num_layers) & (p.src_lse == nullptr | lse_fits);
  const bool open = p.opens | (e.open != 0);
  if (!(usable(e) & open)) return false;
  if (!fits) fail(e, kShape, e.step * e.num_layers + p.layer);
  return fits;
}

// One row, by the blocks of one x. Fetched before its link is looked at, so that the two loads do not wait for each other.
__device__ __forceinline__ void put_row(const PutParams& p, uint32_t row, int32_t place) {
  uint32_t lane = 0;
  Endpoint* e = endpoint_at(p.endpoints, p.num_links, place, lane);
  if (e == nullptr) return;
  const auto* src = reinterpret_cast<const uint4*>(p.src + row * p.src_stride_bytes);
  const uint32_t chunks = p.row_bytes / 16;
  const uint32_t first = blockIdx.y * (kPutThreads * kPutChunks) + threadIdx.x;
  uint4 value[kPutChunks];
#pragma unroll
  for (int i = 0; i < kPutChunks; ++i) {
    if (first + i * kPutThreads < chunks) value[i] = src[first + i * kPutThreads];
  }
  if (!sends(p, *e) || lane >= e->lanes) return;
  const uint64_t slot = (p.layer & 1) * e->lanes + lane;
  auto* dst = at<uint4>(e->peer_rows + slot * p.row_bytes);
#pragma unroll
  for (int i = 0; i < kPutChunks; ++i) {
    if (first + i * kPutThreads < chunks) dst[first + i * kPutThreads] = value[i];
  }
  if (p.src_lse != nullptr && blockIdx.y == 0) {
    auto* dst_lse = at<float>(e->peer_lse) + slot * p.num_heads;
    for (uint32_t h = threadIdx.x; h < p.num_heads; h += kPutThreads) {
      dst_lse[h] = p.src_lse[static_cast<uint64_t>(row) * p.num_heads + h];
    }
  }
  if (p.opens && blockIdx.y == 0 && threadIdx.x == 0) store_relaxed_sys(&e->joins, 1);
}

// Raises the flag of one link, all of whose rows are there. One thread. What the flag needs is fetched at once.
__device__ __forceinline__ void signal(const PutParams& p, Endpoint& e) {
  const uint64_t step = e.step + p.opens;
  const uint64_t last_layer = e.num_layers - 1;
  auto* flag = at<uint64_t>(e.peer_flag);
  auto* status = at<HostStatus>(e.status);
  if (p.opens) {
    const bool joins = load_relaxed_sys(&e.joins) != 0;
    e.joins = 0;
    e.open = joins;
    if (!joins) return;
  }
  if (!sends(p, e)) return;
  store_relaxed_sys(flag, step * (last_layer + 1) + p.layer);
  if (p.opens) {
    e.step = step;
    store_relaxed_sys(&status->steps_opened, step);
  }
  if (p.src_lse == nullptr) { // decode
    begin_work(e);
  } else {
    end_work(e);
    if (p.layer == last_layer) {
      store_relaxed_sys(&status->work_ns, e.work_ns);
      store_relaxed_sys(&status->steps_done, step);
    }
  }
}

// Grid (max(num_rows, 1), ceil(row_bytes / kPutBlockBytes)). Thread i of each block counts for link i; the link's flag is
// raised by the block that finishes last: every block's stores are made visible by its fence before it counts itself,
// the last one's second fence orders what all of them did before the flag.
__global__ void __launch_bounds__(kPutThreads) put_kernel(const PutParams p) {
  const bool counts = threadIdx.x < p.num_links && p.endpoints[threadIdx.x].connected != 0;
  if (blockIdx.x < p.num_rows) {
    const int32_t row = p.rows == nullptr ? blockIdx.x : p.rows[blockIdx.x];
    const int32_t place = p.places == nullptr ? blockIdx.x : p.places[blockIdx.x];
    if (row >= 0 && row < static_cast<int64_t>(p.src_rows)) put_row(p, row, place);
  }
  __syncthreads();
  if (!counts) return;
  Endpoint& e = p.endpoints[threadIdx.x];
  fence_sys();
  const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y;
  if (blocks > 1) {
    if (atomicAdd(reinterpret_cast<unsigned long long*>(&e.arrivals), 1ull) != blocks - 1) return;
    e.arrivals = 0;
    fence_sys();
  }
  signal(p, e);
}

} // namespace adrenaline
