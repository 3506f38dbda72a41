// wait: holds the stream until the peer's call is there; the executor's side of a layer,
// or decode's where the answer is not merged by wait_and_merge.
#pragma once

#include "endpoint.cuh"

namespace adrenaline {

// Waits for the step after the newest one, which need not come: then `open` becomes 0 and the rest of the launch does
// nothing. Ends at the open limit, when the launch is cancelled, or with an error when it is aborted.
__device__ __forceinline__ void wait_for_step(Endpoint& e) {
  const auto* flag = at<const uint64_t>(e.own_flag);
  const auto* control = at<const HostControl>(e.control);
  auto* status = at<HostStatus>(e.status);
  const uint64_t call = (e.step + 1) * e.num_layers;
  const uint64_t launch = e.launches + 1;
  const uint64_t start = global_timer_ns();
  uint64_t next_look = start;
  bool came = false;
  while (!(came = load_acquire_sys(flag) >= call)) {
    const uint64_t now = global_timer_ns();
    if (now < next_look) continue;
    next_look = now + kHostLookNs;
    if (load_relaxed_sys(&control->abort) != 0) {
      fail(e, kAborted, call);
      break;
    }
    if (load_relaxed_sys(&control->cancelled_launches) >= launch) break;
    if (now - start > load_relaxed_sys(&control->open_limit_ns)) break;
  }
  e.launches = launch;
  e.open = came;
  if (came) {
    e.step += 1;
    store_relaxed_sys(&status->steps_opened, e.step);
    begin_work(e);
  }
  fence_sys(); // a host that sees the launch over sees whether it opened a step
  store_relaxed_sys(&status->launches, launch);
}

// One thread. `opens`: wait for a new step (layer 0), else for `layer` of the step under way.
__global__ void __launch_bounds__(32) wait_kernel(Endpoint* endpoint, uint32_t layer, uint32_t opens) {
  Endpoint& e = *endpoint;
  if (threadIdx.x != 0) return;
  if (!opens) {
    keep_layer(e, layer);
  } else if (usable(e)) {
    wait_for_step(e);
  } else {
    e.open = 0;
  }
}

} // namespace adrenaline
