// wait_and_merge: waits for the peers' answers, then joins them with rows of the batch, in place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "endpoint.cuh"

namespace adrenaline {

constexpr int kMergeThreads = 128;
constexpr int kMergeVec = 8; // elements of a thread: 16 bytes

struct MergeParams {
  Endpoint* endpoints;   // [num_links]
  void* o;               // [batch, num_heads, head_dim], rows o_stride elements apart
  float* lse;            // [batch, num_heads] dense, base 2
  const int32_t* rows;   // [num_rows] row of o, distinct, negative = skip
  const int32_t* places; // [num_rows] where its answer comes from, negative = skip
  int64_t o_stride;
  uint32_t num_links;
  uint32_t batch;
  uint32_t num_rows;
  uint32_t num_heads;
  uint32_t layer;
};

struct Pair16Bit {
  __device__ static float2 widen(__nv_bfloat162 v) { return __bfloat1622float2(v); }
  __device__ static float2 widen(__half2 v) { return __half22float2(v); }
  __device__ static void narrow(float2 v, __nv_bfloat162& to) { to = __float22bfloat162_rn(v); }
  __device__ static void narrow(float2 v, __half2& to) { to = __float22half2_rn(v); }
};

// Eight elements of two partial results, weighted; T2 is a pair of them.
template <typename T2>
__device__ __forceinline__ uint4 blend(uint4 a, uint4 b, float weight_a, float weight_b) {
  const auto* pa = reinterpret_cast<const T2*>(&a);
  const auto* pb = reinterpret_cast<const T2*>(&b);
  uint4 out;
  auto* po = reinterpret_cast<T2*>(&out);
#pragma unroll
  for (int i = 0; i < kMergeVec / 2; ++i) {
    const float2 x = Pair16Bit::widen(pa[i]);
    const float2 y = Pair16Bit::widen(pb[i]);
    Pair16Bit::narrow(make_float2(weight_a * x.x + weight_b * y.x, weight_a * x.y + weight_b * y.y), po[i]);
  }
  return out;
}

// Grid (num_links + num_rows, ceil(num_heads / heads of a block)). The first blocks keep a link each: its accounts, and
// the limits of its waits (see wait_for_call). Each other one merges heads of a row as soon as that row's answer is there;
// a head belongs to kHeadDim / 8 neighbouring threads, which fetch the local part before the wait.
template <typename T2, int kHeadDim>
__global__ void __launch_bounds__(kMergeThreads) wait_and_merge_kernel(const MergeParams p) {
  constexpr int kHeadThreads = kHeadDim / kMergeVec;
  constexpr int kBlockHeads = kMergeThreads / kHeadThreads;
  __shared__ bool ready;
  if (blockIdx.x < p.num_links) {
    if (blockIdx.y == 0 && threadIdx.x == 0) keep_layer(p.endpoints[blockIdx.x], p.layer);
    return;
  }
  const int32_t row = p.rows[blockIdx.x - p.num_links];
  uint32_t lane = 0;
  Endpoint* link = endpoint_at(p.endpoints, p.num_links, p.places[blockIdx.x - p.num_links], lane);
  if (link == nullptr || row < 0 || row >= static_cast<int64_t>(p.batch)) return;

  const uint32_t head = blockIdx.y * kBlockHeads + threadIdx.x / kHeadThreads;
  const bool active = head < p.num_heads;
  const uint32_t inner = (threadIdx.x % kHeadThreads) * kMergeVec;
  using T = decltype(T2::x);
  auto* o = reinterpret_cast<uint4*>(static_cast<T*>(p.o) + row * p.o_stride + head * kHeadDim + inner);
  float* lse = p.lse + static_cast<int64_t>(row) * p.num_heads + head;
  uint4 local_o = {};
  float local_lse = 0.f;
  if (active) {
    local_o = *o;
    local_lse = *lse;
  }

  Endpoint& e = *link;
  if (threadIdx.x == 0) {
    const uint64_t call = e.step * e.num_layers + p.layer;
    const bool fits = (e.recv_row_bytes == p.num_heads * kHeadDim * sizeof(T)) & (e.own_lse != 0) &
                      (p.num_heads == e.num_heads) & (p.layer < e.num_layers);
    const bool open = (e.open != 0) & (lane < e.lanes);
    ready = false;
    if (usable(e) & open) {
      uint64_t waited_ns;
      if (fits) {
        ready = wait_for_call(e, call, false, waited_ns);
      } else {
        fail(e, kShape, call);
      }
    }
  }
  __syncthreads(); // also hands thread 0's acquire on to the block
  if (!ready || !active) return;

  const uint64_t slot = ((p.layer & 1) * e.lanes + lane) * e.num_heads + head;
  const float remote_lse = at<const float>(e.own_lse)[slot];
  if (remote_lse == -INFINITY) return; // an empty prefix; its o may hold anything
  const uint4 remote_o = *at<const uint4>(e.own_rows + (slot * kHeadDim + inner) * sizeof(T));
  const float top = fmaxf(local_lse, remote_lse);
  const float local_weight = exp2f(local_lse - top);
  const float remote_weight = exp2f(remote_lse - top);
  const float sum = local_weight + remote_weight;
  if (local_weight == 0.f) {
    *o = remote_o;
  } else {
    *o = blend<T2>(local_o, remote_o, local_weight / sum, remote_weight / sum);
  }
  if (inner == 0) *lse = top + log2f(sum);
}

} // namespace adrenaline
