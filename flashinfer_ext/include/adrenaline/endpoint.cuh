// One end of an `ipc` channel as the kernels see it, and the flag on which they wait. Raw pointers only.
//
// Everything a kernel needs to know about the channel is read from an Endpoint in device memory when the kernel runs,
// so a CUDA graph captured before the channel existed serves every channel that is bound to its endpoint later.
//
// A decode rank has an array of endpoints, one for each link that it may have at a time; an executor has one. Kernels take
// such an array. A row's place names its endpoint and its lane there; links without rows in a step do not take part in it.
//
// A call (step, layer) has the number step * num_layers + layer; steps count 1, 2, ... A flag holds the number of the
// newest call whose data is complete and only grows. Kernels of one end run on one stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace adrenaline {

// Why an end stopped working; stays until the endpoint is bound anew. Mirrored in channel/ipc_words.py.
enum Error : uint64_t { kNoError = 0, kLate = 1, kAborted = 2, kShape = 3 };

// Mapped host memory. Host to kernels: plain 8-byte stores there, ld.relaxed.sys here; nothing is ordered by them.
struct HostControl {
  uint64_t abort;              // nonzero: give up every wait
  uint64_t wait_limit_ns;      // longest wait for a layer; passing it is an error
  uint64_t open_limit_ns;      // longest wait for a step to begin; passing it is none
  uint64_t cancelled_launches; // the waits for a step with a launch number up to this end without one
};

// Mapped host memory. Kernels to host: st.relaxed.sys by one thread here, 8-byte loads there.
struct HostStatus {
  uint64_t error;
  uint64_t error_call;   // number of the call that failed
  uint64_t steps_opened; // newest step that began on this end
  uint64_t steps_done;   // newest step whose last layer passed
  uint64_t launches;     // waits for a step that are over
  uint64_t wait_ns;      // totals of the words below, once a step
  uint64_t waits;
  uint64_t work_ns;
};

// A place is index << kLaneBits | lane; negative: the row goes nowhere. Mirrored in channel/ipc_words.py.
constexpr int kLaneBits = 16;
constexpr uint32_t kMaxLinks = 32; // of a put the first threads of a block each serve a link, all in one warp

struct alignas(128) Endpoint {
  // Written by the host in the order of the end's stream, constant while kernels run. Addresses are of this process.
  uint64_t connected; // 0: every kernel returns at once
  uint64_t num_layers;
  uint64_t lanes;
  uint64_t num_heads;
  uint64_t send_row_bytes; // of a lane in peer_rows
  uint64_t recv_row_bytes; // of a lane in own_rows
  uint64_t peer_rows;      // [2, lanes, send_row_bytes], written by this end's put
  uint64_t peer_lse;       // float [2, lanes, num_heads] or 0, likewise
  uint64_t peer_flag;      // uint64: written by this end alone, st.relaxed.sys behind fence.acq_rel.sys
  uint64_t own_rows;       // [2, lanes, recv_row_bytes], written by the peer
  uint64_t own_lse;        // float [2, lanes, num_heads] or 0, likewise
  uint64_t own_flag;       // uint64: written by the peer alone; read with ld.acquire.sys before own_rows and own_lse
  uint64_t control;        // HostControl
  uint64_t status;         // HostStatus
  uint64_t reserved[2];

  // Written by this end's kernels; the stream orders a kernel after the one before it, except where noted.
  alignas(128) uint64_t step; // newest step that began
  uint64_t open;              // 1: the step under way is this end's, 0: the launch found none, or it has no rows here
  uint64_t launches;          // waits for a step so far
  uint64_t error;             // Error; blocks of one kernel race for it with atomicCAS, the first one stays
  uint64_t arrivals;          // blocks of the running put that are done: atomics at GPU scope, reset by the last one
  uint64_t wait_ns;           // time spent waiting for layers
  uint64_t waits;             // number of such waits
  uint64_t work_from_ns;      // when the work of the layer under way began, see `begin_work`
  uint64_t work_ns;           // time of such work, over all layers
  uint64_t joins;             // 1: a row of layer 0 goes here; set by its block, reset by the put's last one
  uint64_t reserved_too[6];
};
static_assert(sizeof(Endpoint) == 256);

constexpr uint64_t kHostLookNs = 10000; // a look at mapped host memory costs about 1 us, so it is not taken at every turn
constexpr int kSpinsPerTurn = 16;

template <typename T>
__device__ __forceinline__ T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed_sys(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ uint64_t global_timer_ns() {
  uint64_t v;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(v)::"memory");
  return v;
}

// What an end does between its two kernels of a layer is its work: decode's local attention, between the put and the
// merge's wait, and the executor's attention, between the wait and the put. Called by one thread of either kernel. Where a
// step runs as two halves, the put is the other half's, after whose turn this one attends: it is local attention still.
__device__ __forceinline__ void begin_work(Endpoint& e) { e.work_from_ns = global_timer_ns(); }

__device__ __forceinline__ void end_work(Endpoint& e) { e.work_ns += global_timer_ns() - e.work_from_ns; }

__device__ __forceinline__ bool usable(const Endpoint& e) {
  const bool connected = e.connected != 0;
  const bool sound = load_relaxed_sys(&e.error) == kNoError;
  return connected & sound; // not &&: both loads are under way before either is looked at
}

// The endpoint of a place, or null. `lane` may still be beyond its lanes.
__device__ __forceinline__ Endpoint* endpoint_at(Endpoint* endpoints, uint32_t num_links, int32_t place, uint32_t& lane) {
  if (place < 0 || static_cast<uint32_t>(place >> kLaneBits) >= num_links) return nullptr;
  lane = place & ((1 << kLaneBits) - 1);
  return endpoints + (place >> kLaneBits);
}

__device__ __forceinline__ void fail(Endpoint& e, Error error, uint64_t call) {
  auto* word = reinterpret_cast<unsigned long long*>(&e.error);
  if (atomicCAS(word, static_cast<unsigned long long>(kNoError), static_cast<unsigned long long>(error)) == kNoError) {
    auto* status = at<HostStatus>(e.status);
    store_relaxed_sys(&status->error_call, call);
    fence_sys();
    store_relaxed_sys(&status->error, error);
  }
}

// Spins until the peer's flag reaches `call`; true if it did. One thread of a block. Ends at the latest at the limit that
// stands in HostControl, or soon after its abort word is set; both are errors. `waited_ns` is the time from here to there.
//
// Of the blocks that wait for one call exactly one is the `keeper` and looks at host memory; the others learn from it
// through the error word. Looks of hundreds of blocks at once take the bus more than a millisecond, and each block waits
// for its own (seen on an H200: 1.5 ms for every wait longer than kHostLookNs).
__device__ __forceinline__ bool wait_for_call(Endpoint& e, uint64_t call, bool keeper, uint64_t& waited_ns) {
  const auto* flag = at<const uint64_t>(e.own_flag);
  waited_ns = 0;
  if (load_acquire_sys(flag) >= call) return true;
  const auto* control = at<const HostControl>(e.control);
  const uint64_t start = global_timer_ns();
  uint64_t next_look = start + kHostLookNs;
  while (true) {
    for (int i = 0; i < kSpinsPerTurn; ++i) {
      if (load_acquire_sys(flag) >= call) {
        waited_ns = global_timer_ns() - start;
        return true;
      }
    }
    if (!keeper) {
      if (load_relaxed_sys(&e.error) != kNoError) return false;
      continue;
    }
    const uint64_t now = global_timer_ns();
    if (now < next_look) continue;
    next_look = now + kHostLookNs;
    if (load_relaxed_sys(&control->abort) != 0) {
      fail(e, kAborted, call);
      return false;
    }
    if (now - start > load_relaxed_sys(&control->wait_limit_ns)) {
      fail(e, kLate, call);
      return false;
    }
  }
}

// Waits for a layer of the step under way, if there is one, and keeps the end's accounts. One thread of a kernel.
__device__ __forceinline__ void keep_layer(Endpoint& e, uint32_t layer) {
  const bool is_decode = e.own_lse != 0;
  const bool open = (e.open != 0) & (layer < e.num_layers);
  const uint64_t call = e.step * e.num_layers + layer;
  if (!(usable(e) & open)) return;
  if (is_decode) end_work(e);
  uint64_t waited_ns;
  const bool came = wait_for_call(e, call, true, waited_ns);
  e.wait_ns += waited_ns;
  e.waits += 1;
  if (layer + 1 == e.num_layers) {
    auto* status = at<HostStatus>(e.status);
    store_relaxed_sys(&status->wait_ns, e.wait_ns);
    store_relaxed_sys(&status->waits, e.waits);
    if (is_decode) {
      store_relaxed_sys(&status->work_ns, e.work_ns);
      if (came) store_relaxed_sys(&status->steps_done, e.step);
    }
  }
  if (!is_decode) begin_work(e);
}

} // namespace adrenaline
