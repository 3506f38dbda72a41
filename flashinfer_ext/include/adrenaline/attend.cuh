// attend: attention of one query a lane over slots of the KV pool, with its lse. What lanes share is read once.
//
// The host cuts the work into pieces (attention/lane_plan.py): a run of slots, and the lanes that attend to it. Warps draw
// (piece, KV head) tickets and each works alone, so a launch fits any number of SMs that happen to be free. A warp streams
// 16 tokens at a time through a ring in shared memory, from one piece into the next without a pause, and multiplies on
// tensor cores with the tokens as rows: scores^T = K Q^T and o^T += V^T P^T. The columns, up to 16, are the query heads
// of all lanes of the piece, so a key that is read serves all of them.
//
// A lane that lies in several pieces gets partial results, which merge_partials_kernel joins.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace adrenaline {

constexpr int kAttendWarps = 4;                  // most of a block; they share nothing
constexpr int kAttendTile = 16;                  // tokens of a stage
constexpr int kAttendColumns = 16;               // most query heads of a piece's lanes together
constexpr int kAttendParts = kAttendColumns / 8; // products have eight columns
constexpr uint32_t kWhole = 0xffffffff;          // row of a member that has the whole answer of its lane

struct AttendPiece {
  uint32_t slots; // index of its first slot
  uint32_t tokens;
  uint32_t members; // index of its first member
  uint32_t num_members;
};

struct AttendMember {
  uint32_t lane;
  uint32_t row; // of the partial results, or kWhole; those of a lane follow each other
};

struct AttendMerge {
  uint32_t lane;
  uint32_t row; // first of its partial results
  uint32_t rows;
  uint32_t unused;
};

// The plan's first words; the arrays begin so many words behind its start. Mirrored in attention/lane_plan.py.
struct AttendPlan {
  uint32_t num_pieces;
  uint32_t pieces;
  uint32_t members;
  uint32_t num_merges;
  uint32_t merges;
  uint32_t unused[3];
};

struct AttendParams {
  const void* q;         // [lanes, num_kv_heads * group, head_dim] dense
  const void* k;         // [num_slots, num_kv_heads, head_dim], slots kv_stride elements apart
  const void* v;         // likewise
  void* o;               // as q
  float* lse;            // [lanes, num_kv_heads * group] dense, base 2
  const int32_t* slots;  // of all pieces
  const uint32_t* plan;  // AttendPlan
  float* partial_o;      // [rows, num_kv_heads * group, head_dim], elements where `partial_element` says
  float* partial_lse;    // [rows, num_kv_heads * group]
  uint32_t* tickets;     // drawn ones, warps that are done. 0 between launches
  int64_t kv_stride;
  uint32_t num_kv_heads;
  uint32_t group;        // query heads of a KV head
  float scale_log2;      // of the scores, times log2(e)
};

template <int kHeadDim>
constexpr int kAttendStages = kHeadDim <= 64 ? 6 : 3;

template <int kHeadDim>
struct AttendStage {
  uint4 k[kAttendTile * kHeadDim / 8]; // 16-byte chunks of a token, those of a row of tokens swizzled
  uint4 v[kAttendTile * kHeadDim / 8];
};

struct AttendTile {
  uint32_t tokens; // of this tile; 0: there is no more work
  uint32_t head;   // KV head
  uint32_t num_members;
  uint32_t ends; // bit 0: the piece's first tile, bit 1: its last one
};

// What belongs to a warp in shared memory. Aligned to a token's bytes, so that a swizzled chunk's address is an XOR.
template <int kHeadDim>
struct alignas(512) AttendRing {
  AttendStage<kHeadDim> stages[kAttendStages<kHeadDim>];
  AttendMember members[kAttendStages<kHeadDim>][kAttendColumns]; // of the piece that begins in this stage
  AttendTile tiles[kAttendStages<kHeadDim>];
};

// Blocks of an SM that registers allow, which are as many as fit into the shared memory of an H100.
template <int kHeadDim>
constexpr int kAttendBlocks = kHeadDim <= 128 ? 2 : 1;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers, one 16-byte row from each thread.
__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&a)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ uint32_t transpose(uint32_t a) {
  uint32_t b;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a));
  return b;
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t pack(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }

// Over the eight rows of an accumulator: threads with the same columns differ in the upper bits of their number.
__device__ __forceinline__ float max_over_rows(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float sum_over_rows(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Where a warp's copies have got to: fetches tiles, drawing tickets as it goes.
template <typename T, int kHeadDim>
struct AttendSource {
  static constexpr uint32_t kChunks = kHeadDim / 8;
  static constexpr uint32_t kTokens = 32 / kChunks; // of one copy instruction
  static constexpr uint32_t kTokenBytes = kHeadDim * sizeof(T);

  const AttendParams& p;
  AttendRing<kHeadDim>& ring;
  const AttendPiece* pieces;
  const AttendMember* members;
  uint32_t num_tickets;
  uint32_t thread;
  uint32_t kv_stride_bytes;
  uint32_t to; // shared address of this thread's chunk in the first stage's first tokens

  AttendPiece piece = {}; // the one at work
  uint32_t head = 0;
  const uint8_t* k = nullptr; // this thread's chunk of that head in slot 0
  const uint8_t* v = nullptr;
  uint32_t done = 0; // tokens of the piece that are on their way
  int32_t slot = 0;  // of the next tile's token with this thread's number
  bool over = false;

  enum Ahead { kNothing, kDrawn, kLooked } ahead = kNothing; // what is known of the piece after this one
  uint32_t ticket = 0;                                       // of thread 0, once drawn
  AttendPiece next = {};
  uint32_t next_head = 0;
  bool next_over = false;

  __device__ AttendSource(const AttendParams& params, AttendRing<kHeadDim>& ring, uint32_t thread)
      : p(params), ring(ring), thread(thread) {
    const auto& plan = *reinterpret_cast<const AttendPlan*>(p.plan);
    pieces = reinterpret_cast<const AttendPiece*>(p.plan + plan.pieces);
    members = reinterpret_cast<const AttendMember*>(p.plan + plan.members);
    num_tickets = plan.num_pieces * p.num_kv_heads;
    kv_stride_bytes = static_cast<uint32_t>(p.kv_stride * sizeof(T));
    const uint32_t token = thread / kChunks;
    to = shared_address(&ring) + token * kTokenBytes + ((thread % kChunks) ^ token) * 16;
    begin_next();
  }

  __device__ void draw() {
    if (thread == 0) ticket = atomicAdd(p.tickets, 1u);
    ahead = kDrawn;
  }

  __device__ void look() {
    const uint32_t drawn = __shfl_sync(~0u, ticket, 0);
    next_over = drawn >= num_tickets;
    if (!next_over) {
      const uint4 words = *reinterpret_cast<const uint4*>(pieces + drawn / p.num_kv_heads);
      next = {words.x, words.y, words.z, words.w};
      next_head = drawn % p.num_kv_heads;
    }
    ahead = kLooked;
  }

  __device__ void begin_next() {
    if (ahead == kNothing) draw();
    if (ahead == kDrawn) look();
    ahead = kNothing;
    over = next_over;
    if (over) return;
    piece = next;
    head = next_head;
    done = 0;
    const uint32_t offset = (head * kHeadDim + (thread % kChunks) * 8) * sizeof(T);
    k = static_cast<const uint8_t*>(p.k) + offset;
    v = static_cast<const uint8_t*>(p.v) + offset;
    next_slots();
  }

  // Behind the end of a piece its last token again, so that what is multiplied by zero is finite.
  __device__ void next_slots() {
    slot = p.slots[piece.slots + min(done + (thread % kAttendTile), piece.tokens - 1)];
  }

  __device__ void fetch(int stage) {
    if (over) {
      if (thread == 0) ring.tiles[stage].tokens = 0;
      commit_copies();
      return;
    }
    const uint32_t base = to + stage * sizeof(AttendStage<kHeadDim>);
#pragma unroll
    for (uint32_t first = 0; first < kAttendTile; first += kTokens) {
      const uint32_t from = __shfl_sync(~0u, slot, first + thread / kChunks);
      const uint32_t at = (base ^ ((first & 7) * 16)) + first * kTokenBytes;
      copy_16(at, k + static_cast<uint64_t>(from) * kv_stride_bytes);
      copy_16(at + kAttendTile * kTokenBytes, v + static_cast<uint64_t>(from) * kv_stride_bytes);
    }
    const bool first = done == 0;
    if (first && thread < piece.num_members) copy_8(&ring.members[stage][thread], members + piece.members + thread);
    commit_copies();
    const uint32_t tokens = min(piece.tokens - done, static_cast<uint32_t>(kAttendTile));
    done += tokens;
    const uint32_t left = piece.tokens - done;
    if (thread == 0) ring.tiles[stage] = {tokens, head, piece.num_members, (first ? 1u : 0u) | (left == 0 ? 2u : 0u)};
    if (left == 0) {
      begin_next();
      return;
    }
    next_slots();
    // A tile ahead each, so that nobody waits for them.
    if (ahead == kNothing && left <= 2 * kAttendTile) {
      draw();
    } else if (ahead == kDrawn) {
      look();
    }
  }
};

__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One tile more for the first kActive parts of the columns. No branch within, so that loads and products overlap.
template <typename T, int kHeadDim, int kActive>
__device__ __forceinline__ void attend_tile(uint32_t stage, uint32_t tokens, float scale_log2, uint32_t thread,
                                            const uint32_t (&q)[kAttendParts][kHeadDim / 16][2],
                                            float (&o)[kAttendParts][kHeadDim / 16][4], float (&top)[kAttendParts][2],
                                            float (&sum)[kAttendParts][2]) {
  constexpr int kSteps = kHeadDim / 16;
  constexpr uint32_t kTokenBytes = kHeadDim * sizeof(T);
  // Rows of the 8x8 matrices that this thread points at: of K (tokens x elements) and of V (to be transposed).
  const uint32_t k_token = thread % 16, v_token = thread % 8 + (thread / 16) * 8;
  const uint32_t k_row = stage + k_token * kTokenBytes + ((thread / 16) ^ (k_token & 7)) * 16;
  const uint32_t v_row =
      stage + (kAttendTile + v_token) * kTokenBytes + (((thread / 8) % 2) ^ (v_token & 7)) * 16;

  float scores[2][kActive][4] = {}; // of even and of odd steps, so that every other product can go on
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[4];
    load_matrices(a, k_row ^ (step * 32));
#pragma unroll
    for (int part = 0; part < kActive; ++part) {
      multiply_add(scores[step % 2][part], a, q[part][step][0], q[part][step][1], T{});
    }
  }

  uint32_t weights[kActive][2];
#pragma unroll
  for (int part = 0; part < kActive; ++part) {
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = scores[0][part][i] + scores[1][part][i];
    if (tokens < kAttendTile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] = thread / 4 + (i / 2) * 8 < tokens ? s[i] : -INFINITY;
    }
    const float now[2] = {max_over_rows(fmaxf(s[0], s[2])) * scale_log2, max_over_rows(fmaxf(s[1], s[3])) * scale_log2};
    if (__any_sync(~0u, now[0] > top[part][0] || now[1] > top[part][1])) {
      float keep[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float higher = fmaxf(top[part][i], now[i]);
        keep[i] = power_of_2(top[part][i] - higher);
        sum[part][i] *= keep[i];
        top[part][i] = higher;
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[part][step][i] *= keep[i % 2];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = power_of_2(fmaf(s[i], scale_log2, -top[part][i % 2]));
      sum[part][i % 2] += s[i];
    }
    weights[part][0] = transpose(pack(s[0], s[1], T{}));
    weights[part][1] = transpose(pack(s[2], s[3], T{}));
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[4];
    load_matrices_transposed(a, v_row ^ (step * 32));
#pragma unroll
    for (int part = 0; part < kActive; ++part) {
      multiply_add(o[part][step], a, weights[part][0], weights[part][1], T{});
    }
  }
}

// Which of a piece's members a column belongs to, and which query head of the group it is.
struct AttendColumns {
  uint32_t group;
  uint32_t reciprocal; // times 2^16, the next whole number: exact for the few columns there are

  __device__ explicit AttendColumns(uint32_t group) : group(group), reciprocal((1u << 16) / group + 1) {}
  __device__ uint32_t member(uint32_t column) const { return (column * reciprocal) >> 16; }
  __device__ uint32_t head(uint32_t column) const { return column - member(column) * group; }
};

// Partial results lie as the threads of a warp have them: which element of a head the i-th number of row thread / 4 is.
__device__ __forceinline__ uint32_t partial_element(uint32_t row, uint32_t i) { return i / 2 * 16 + i % 2 * 8 + row; }

// What a warp has for the members of a piece: to o, or to the partial results.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_answers(const AttendParams& p, const float (&o)[kAttendParts][kHeadDim / 16][4],
                                              const float (&top)[kAttendParts][2], const float (&sum)[kAttendParts][2],
                                              const AttendMember& member, const AttendTile& tile,
                                              const AttendColumns& columns, uint32_t thread) {
  constexpr int kSteps = kHeadDim / 16;
  const uint32_t row = thread / 4, pair = (thread % 4) * 2;
  const uint32_t num_heads = p.num_kv_heads * p.group, used = tile.num_members * p.group;
  const bool any_whole = __any_sync(~0u, thread < tile.num_members && member.row == kWhole);
#pragma unroll
  for (int part = 0; part < kAttendParts; ++part) {
    if (part * 8 >= used) break;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t column = part * 8 + pair + i;
      const uint32_t lane = __shfl_sync(~0u, member.lane, columns.member(column));
      const uint32_t partial = __shfl_sync(~0u, member.row, columns.member(column));
      const float total = sum_over_rows(sum[part][i]);
      inverse[i] = 1.f / total;
      if (column >= used) continue;
      const bool whole = partial == kWhole;
      const uint32_t head = tile.head * p.group + columns.head(column);
      const int64_t at = static_cast<int64_t>(whole ? lane : partial) * num_heads + head;
      if (row == 0) (whole ? p.lse : p.partial_lse)[at] = top[part][i] + log2f(total);
      if (whole) continue;
      auto* to = reinterpret_cast<float4*>(p.partial_o + at * kHeadDim + row * (kHeadDim / 8));
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        to[step / 2] = {o[part][step][i] * inverse[i], o[part][step][2 + i] * inverse[i],
                        o[part][step + 1][i] * inverse[i], o[part][step + 1][2 + i] * inverse[i]};
      }
    }
    if (!any_whole) continue;
    const uint32_t column = part * 8 + row; // of the transposed answers
    const uint32_t lane = __shfl_sync(~0u, member.lane, columns.member(column));
    const uint32_t partial = __shfl_sync(~0u, member.row, columns.member(column));
    const bool is_ours = column < used && partial == kWhole;
    const int64_t at = static_cast<int64_t>(lane) * num_heads + tile.head * p.group + columns.head(column);
    auto* to = reinterpret_cast<uint32_t*>(static_cast<T*>(p.o) + at * kHeadDim + pair);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const auto& x = o[part][step];
      const uint32_t low = transpose(pack(x[0] * inverse[0], x[1] * inverse[1], T{}));
      const uint32_t high = transpose(pack(x[2] * inverse[0], x[3] * inverse[1], T{}));
      if (is_ours) {
        to[step * 8] = low;
        to[step * 8 + 4] = high;
      }
    }
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttendWarps * 32, kAttendBlocks<kHeadDim>) attend_kernel(const AttendParams p) {
  constexpr int kStages = kAttendStages<kHeadDim>;
  constexpr int kSteps = kHeadDim / 16; // of 16 elements
  constexpr int kParts = kAttendParts;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t thread = threadIdx.x % 32;
  const uint32_t row = thread / 4;        // of accumulators, and the column of what they are multiplied by
  const uint32_t pair = (thread % 4) * 2; // first of two columns of accumulators
  auto& ring = reinterpret_cast<AttendRing<kHeadDim>*>(shared)[threadIdx.x / 32];
  const uint32_t num_heads = p.num_kv_heads * p.group;
  const AttendColumns columns(p.group);

  AttendSource<T, kHeadDim> source(p, ring, thread);
  for (int stage = 0; stage < kStages - 1; ++stage) source.fetch(stage);

  uint32_t q[kParts][kSteps][2]; // queries^T: columns as above
  float o[kParts][kSteps][4];    // o^T: rows are elements of a head, not yet divided by the sum
  float top[kParts][2];          // of the scores so far, times scale_log2
  float sum[kParts][2];          // of this thread's rows
  AttendMember member = {};      // the piece's one with this thread's number
  for (int stage = 0;; stage = stage + 1 == kStages ? 0 : stage + 1) {
    await_copies<kStages - 2>();
    __syncwarp();
    const AttendTile tile = ring.tiles[stage];
    if (tile.tokens == 0) break;
    source.fetch(stage == 0 ? kStages - 1 : stage - 1); // into the stage of the tile before this one
    const uint32_t used = tile.num_members * p.group; // columns

    if (tile.ends & 1) {
      member = ring.members[stage][thread % kAttendColumns];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t column = part * 8 + row;
        const uint32_t lane = __shfl_sync(~0u, member.lane, columns.member(column));
        const int64_t head = static_cast<int64_t>(lane) * num_heads + tile.head * p.group + columns.head(column);
        const auto* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.q) + head * kHeadDim + pair);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          q[part][step][0] = column < used ? from[step * 8] : 0;
          q[part][step][1] = column < used ? from[step * 8 + 4] : 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) o[part][step][i] = 0.f;
        }
        top[part][0] = top[part][1] = -INFINITY;
        sum[part][0] = sum[part][1] = 0.f;
      }
    }

    const uint32_t at = shared_address(&ring.stages[stage]);
    if (used > 8) {
      attend_tile<T, kHeadDim, 2>(at, tile.tokens, p.scale_log2, thread, q, o, top, sum);
    } else {
      attend_tile<T, kHeadDim, 1>(at, tile.tokens, p.scale_log2, thread, q, o, top, sum);
    }
    if (tile.ends & 2) store_answers<T, kHeadDim>(p, o, top, sum, member, tile, columns, thread);
  }
  if (thread == 0 && atomicAdd(p.tickets + 1, 1u) == gridDim.x * (blockDim.x / 32) - 1) {
    p.tickets[0] = p.tickets[1] = 0; // all others have drawn their last
  }
}

constexpr int kAttendMergeWarps = 4;

// A warp takes a lane's query head at a time, until all that have partial results are merged into o and lse.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttendMergeWarps * 32) merge_partials_kernel(const AttendParams p) {
  constexpr int kOwn = kHeadDim / 32; // neighbouring numbers of a thread
  constexpr int kAhead = 4;           // rows at a time
  const auto& plan = *reinterpret_cast<const AttendPlan*>(p.plan);
  const auto* merges = reinterpret_cast<const AttendMerge*>(p.plan + plan.merges);
  const uint32_t num_heads = p.num_kv_heads * p.group;
  const uint32_t thread = threadIdx.x % 32;
  for (uint32_t i = blockIdx.x * kAttendMergeWarps + threadIdx.x / 32; i < plan.num_merges * num_heads;
       i += gridDim.x * kAttendMergeWarps) {
    const AttendMerge merge = merges[i / num_heads];
    const uint32_t head = i % num_heads;
    const int64_t first = static_cast<int64_t>(merge.row) * num_heads + head;
    const float* lse = p.partial_lse + first;
    const float2* o = reinterpret_cast<const float2*>(p.partial_o + first * kHeadDim + thread * kOwn);
    float top = -INFINITY;
    float total = 0.f;
    float sum[kOwn] = {};
    for (uint32_t begin = 0; begin < merge.rows; begin += kAhead) {
      float level[kAhead];
      float2 x[kAhead][kOwn / 2];
#pragma unroll
      for (int r = 0; r < kAhead; ++r) { // all loads before the first use
        const int64_t row = static_cast<int64_t>(min(begin + r, merge.rows - 1)) * num_heads;
        level[r] = begin + r < merge.rows ? lse[row] : -INFINITY;
#pragma unroll
        for (int k = 0; k < kOwn / 2; ++k) x[r][k] = o[row * (kHeadDim / 2) + k];
      }
      float higher = top;
#pragma unroll
      for (int r = 0; r < kAhead; ++r) higher = fmaxf(higher, level[r]);
      const float keep = power_of_2(top - higher);
      top = higher;
      total *= keep;
#pragma unroll
      for (int k = 0; k < kOwn; ++k) sum[k] *= keep;
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const float weight = power_of_2(level[r] - top);
        total += weight;
#pragma unroll
        for (int k = 0; k < kOwn / 2; ++k) {
          sum[2 * k] += weight * x[r][k].x;
          sum[2 * k + 1] += weight * x[r][k].y;
        }
      }
    }
    const int64_t to = static_cast<int64_t>(merge.lane) * num_heads + head;
    T* out = static_cast<T*>(p.o) + to * kHeadDim;
    const float inverse = 1.f / total;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      narrow(sum[k] * inverse, out[partial_element(thread / 4, thread % 4 * kOwn + k)]);
    }
    if (thread == 0) p.lse[to] = top + log2f(total);
  }
}

} // namespace adrenaline
