// The package's device.cuh for a CPU: a thread of the GPU is a fiber, and a block's fibers take turns at barriers. Copies land
// and products are made when they are waited for, not before; accesses of shared memory by address are checked, and what was
// never written there is NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

typedef uint16_t u16;
typedef uint32_t u32;
typedef long long i64;
typedef unsigned long long u64;
using std::max;
using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(8) int2 {
  int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
struct Index {
  int x, y;
};

constexpr int LANES = 32;
constexpr u32 ALL = 0xffffffff;

#define INLINE __attribute__((always_inline))  // of a lambda

// ---- fibers

struct Barrier {
  int members = 0, arrived = 0, turn = 0;
};
struct Copy {
  u32 to;
  const void* from;
  u32 bytes;
};
struct Arrivals {  // a barrier in shared memory
  int expected = 0, pending = 0, turn = 0;
  std::vector<Copy> copies;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::deque<std::vector<Copy>> copies{1};  // the last group is not committed
  std::deque<std::vector<std::function<void()>>> products{1};
};
struct Warp {
  Barrier barrier;
  u64 lane[LANES][6];
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier all, groups[5];
  std::map<u32, Arrivals> arrivals;
  std::vector<char> shared;
};

inline Index blockIdx, blockDim, gridDim, threadIdx;
inline Block* block;
inline std::vector<Block>* cluster;  // that it is in
inline Barrier cluster_barrier;
inline ucontext_t scheduler;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block %d %d thread %d: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
  std::abort();
}
inline Fiber& self() { return block->fibers[threadIdx.x]; }
inline Warp& my_warp() { return block->warps[threadIdx.x / LANES]; }
inline void let_others_run() { swapcontext(&self().context, &scheduler); }
inline void wait_at(Barrier& barrier) {
  const int turn = barrier.turn;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    barrier.turn++;
    return;
  }
  while (barrier.turn == turn) let_others_run();
}
inline void enter() {
  body();
  self().done = true;
  let_others_run();
}

// Runs `kernel` for every thread of every block, `together` blocks at a time.
inline void launch(int blocks_x, int blocks_y, int threads, int shared_bytes, int together, std::function<void()> kernel) {
  gridDim = {blocks_x, blocks_y}, blockDim = {threads, 1};
  body = std::move(kernel);
  if (blocks_x % together) fail("blocks that are in no cluster");
  for (blockIdx.y = 0; blockIdx.y < blocks_y; blockIdx.y++)
    for (int first = 0; first < blocks_x; first += together) {
      std::vector<Block> blocks(together);
      cluster = &blocks, cluster_barrier = {threads * together};
      for (Block& here : blocks) {
        here.shared.assign(shared_bytes + 16, (char)0xff);
        here.fibers = std::vector<Fiber>(threads);
        here.warps = std::vector<Warp>(threads / LANES);
        here.all = {threads};
        for (Warp& warp : here.warps) warp.barrier = {LANES};
        for (Fiber& fiber : here.fibers) {
          constexpr size_t STACK = 1 << 16;
          fiber.stack.reset(new char[STACK]);
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.get();
          fiber.context.uc_stack.ss_size = STACK;
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, enter, 0);
        }
      }
      for (int left = threads * together; left;) {
        left = 0;
        for (int number = 0; number < together; number++)
          for (int turns = together > 1 && number == 0 ? 8 : 1; turns; turns--) {  // the first is ahead of its cluster
            block = &blocks[number], blockIdx.x = first + number;
            for (threadIdx = {0, 0}; threadIdx.x < threads; threadIdx.x++) {
              if (self().done) continue;
              const Index mine = threadIdx;
              swapcontext(&scheduler, &self().context);
              threadIdx = mine;
              left += !self().done;
            }
            // What a block that has ended had in shared memory is not there any more.
            auto ended = [](const Fiber& fiber) { return fiber.done; };
            if (std::all_of(block->fibers.begin(), block->fibers.end(), ended))
              std::fill(block->shared.begin(), block->shared.end(), (char)0xff);
          }
      }
    }
}

inline void __syncthreads() { wait_at(block->all); }
inline void __syncwarp() { wait_at(my_warp().barrier); }

// ---- device.cuh

inline char* shared_memory() { return (char*)(((uintptr_t)block->shared.data() + 15) / 16 * 16); }
#define SHARED(name) char* name = shared_memory()
constexpr u32 FIRST = 1024;  // as on Hopper: addresses do not begin with 0
inline char* checked(u32 at, u32 bytes) {
  at -= FIRST;
  if (at % std::min(bytes, 16u)) fail("misaligned access of shared memory");
  if (at + bytes > block->shared.size() - 16) fail("access beyond shared memory");
  return shared_memory() + at;
}

inline u32 dot(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
inline u32 and_xor(u32 a, u32 mask, u32 b) { return a & mask ^ b; }
inline u32 __umulhi(u32 a, u32 b) { return (u64)a * b >> 32; }
inline int highest_bit(u32 word) { return word ? 31 - __builtin_clz(word) : -1; }
inline u32 bit(int number) { return number < 0 ? 0 : 1u << number; }
inline u32 reversed(u32 word) {
  u32 result = 0;
  for (int i = 0; i < 32; i++) result |= (word >> i & 1) << (31 - i);
  return result;
}
inline u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    const u32 digit = selector >> 4 * i & 15, byte = bytes >> 8 * (digit & 7) & 255;
    result |= (digit < 8 ? byte : byte >> 7 ? 255 : 0) << 8 * i;
  }
  return result;
}
inline float __uint_as_float(u32 x) { return *(float*)&x; }
inline u32 __float_as_uint(float x) { return *(u32*)&x; }
template <bool BF16>
inline float to_float(u16 x) {
  if (BF16) return __uint_as_float((u32)x << 16);
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                    : std::ldexp((float)fraction, -24);
  return x >> 15 ? -size : size;
}
template <bool BF16>
inline float low(u32 pair) {
  return to_float<BF16>(pair & 0xffff);
}
template <bool BF16>
inline float high(u32 pair) {
  return to_float<BF16>(pair >> 16);
}
template <bool BF16>
inline u16 rounded(float x) {
  const u32 bits = __float_as_uint(x);
  if (BF16) return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const u16 sign = bits >> 16 & 0x8000;
  if (std::isnan(x)) return 0x7fff;
  if (x == 0) return sign;
  int exponent;
  std::frexp(x, &exponent);
  const int scale = std::max(exponent - 11, -24);  // of the last bit
  const float steps = std::nearbyint(std::ldexp(std::fabs(x), -scale));
  if (std::ldexp(steps, scale) >= 65520) return sign | 0x7c00;
  if (scale == -24) return sign | (u16)steps;  // runs over into the normal numbers as it should
  return sign | (u16)(((scale + 24) << 10) + (u16)steps);
}

template <class T>
inline T load_once(const T* p) {
  if ((uintptr_t)p % sizeof(T)) fail("misaligned load");
  return *p;
}
template <class T>
inline T load(const T* p) {
  return load_once(p);
}
inline u32 address(const void* p) { return (const char*)p - shared_memory() + FIRST; }
inline void store2(u32 at, u16 x) { std::memcpy(checked(at, 2), &x, 2); }
inline void store8(u32 at, u32 x, u32 y) {
  std::memcpy(checked(at, 8), &x, 4);
  std::memcpy(checked(at, 8) + 4, &y, 4);
}
inline void store4(u32 at, u32 x) { std::memcpy(checked(at, 4), &x, 4); }
inline void store16(u32 at, u32 x, u32 y, u32 z, u32 w) {
  const uint4 four = {x, y, z, w};
  std::memcpy(checked(at, 16), &four, 16);
}
inline void store16(u32 at, float x, float y, float z, float w) {
  const float4 four = {x, y, z, w};
  std::memcpy(checked(at, 16), &four, 16);
}
inline u32 load4(u32 at) {
  u32 x;
  std::memcpy(&x, checked(at, 4), 4);
  return x;
}
inline uint2 load8(u32 at) {
  uint2 x;
  std::memcpy(&x, checked(at, 8), 8);
  return x;
}
inline uint4 load16(u32 at) {
  uint4 x;
  std::memcpy(&x, checked(at, 16), 16);
  return x;
}
template <int BYTES>
inline void copy(u32 to, const void* from, bool there = true) {
  if ((uintptr_t)from % BYTES) fail("misaligned copy");
  std::memset(checked(to, BYTES), 0xff, BYTES);  // what was there is lost from now on
  self().copies.back().push_back({to, there ? from : nullptr, BYTES});
}
inline void commit_copies() { self().copies.emplace_back(); }
template <int LATER>
inline void wait_copies() {
  for (auto& copies = self().copies; copies.size() > LATER + 1; copies.pop_front())
    for (const Copy& copy : copies.front()) {
      if (copy.from) std::memcpy(checked(copy.to, copy.bytes), copy.from, copy.bytes);
      else std::memset(checked(copy.to, copy.bytes), 0, copy.bytes);
    }
}

// What each lane of the warp passes, at [lane][i].
template <class... T>
inline u64 (*exchange(T... mine))[6] {
  const u64 values[] = {(u64)mine...};
  __syncwarp();
  std::memcpy(my_warp().lane[threadIdx.x % LANES], values, sizeof values);
  __syncwarp();
  return my_warp().lane;
}
inline float add_up(float x) {
  for (int distance = LANES / 2; distance; distance /= 2)
    x += __uint_as_float(exchange(__float_as_uint(x))[(threadIdx.x % LANES) ^ distance][0]);
  return x;
}
inline int from_lane(int x, int lane) { return (int)exchange(x)[lane][0]; }
inline u32 transposed(u32 pair) {
  auto lanes = exchange(pair);
  const int row = threadIdx.x % LANES / 4, column = threadIdx.x % 4 * 2;
  auto element = [&](int r, int c) { return (u32)(lanes[4 * r + c / 2][0] >> 16 * (c % 2)) & 0xffff; };
  return element(column, row) | element(column + 1, row) << 16;
}
// PTX ISA, stmatrix.x4
inline void store_matrices(u32 at, u32 a, u32 b, u32 c, u32 d) {
  auto lanes = exchange(at, a, b, c, d);
  const int lane = threadIdx.x % LANES;
  for (int i = 0; i < 4; i++)
    store4(lanes[8 * i + lane / 4][0] + lane % 4 * 4, lanes[lane][1 + i]);
}
// PTX ISA, mma.m16n8k16: a0, a1 hold rows r, r + 8 at k = 2q, 2q + 1, a2, a3 the same at k + 8; b0, b1 column r at these.
template <bool BF16>
inline void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  auto lanes = exchange(a0, a1, a2, a3, b0, b1);
  const int lane = threadIdx.x % LANES, r = lane / 4, q = lane % 4;
  auto half = [](u64 pair, int i) { return (double)to_float<BF16>(pair >> 16 * i & 0xffff); };
  for (int j = 0; j < 4; j++) {
    const int row = r, lower = j / 2, column = 2 * q + j % 2;
    double sum = c[j];
    for (int k = 0; k < 16; k++) {
      const u64* a = lanes[4 * row + k % 8 / 2];
      const u64* b = lanes[4 * column + k % 8 / 2];
      sum += half(a[lower + k / 8 * 2], k % 2) * half(b[4 + k / 8], k % 2);
    }
    c[j] = sum;
  }
}

// ---- Hopper

inline int blocks_of_cluster() { return cluster->size(); }
inline int rank_in_cluster() { return blockIdx.x % cluster->size(); }
inline void meet_cluster(int) { wait_at(cluster_barrier); }
template <class Load>
inline auto of_cluster(int rank, Load load) {
  Block* const own = block;
  block = &(*cluster)[rank];
  const auto x = load();
  block = own;
  return x;
}
inline float load_of_cluster(u32 at, int rank) {
  return __uint_as_float(of_cluster(rank, [=] { return load4(at); }));
}
inline float4 load4_of_cluster(u32 at, int rank) {
  const uint4 x = of_cluster(rank, [=] { return load16(at); });
  return {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
}
inline void start_barrier(u32 at, int arrivals) {
  checked(at, 8);
  block->arrivals[at] = {arrivals, arrivals};
}
inline void publish_writes() {}
inline Arrivals& arrivals_at(u32 at) {
  auto found = block->arrivals.find(at);
  if (found == block->arrivals.end()) fail("no barrier here");
  return found->second;
}
inline void arrive(u32 at) {
  Arrivals& barrier = arrivals_at(at);
  if (!barrier.pending--) fail("more arrivals than expected");
}
inline void wait_barrier(u32 at, int turn) {
  Arrivals& barrier = arrivals_at(at);
  while (true) {
    if (!barrier.pending) {
      for (const Copy& copy : barrier.copies) std::memcpy(checked(copy.to, copy.bytes), copy.from, copy.bytes);
      barrier.copies.clear();
      barrier.pending = barrier.expected;
      barrier.turn++;
    }
    if (barrier.turn % 2 != turn) return;
    let_others_run();
  }
}
inline void copy_many(u32 to, const void* from, int bytes, u32 barrier) {
  if ((uintptr_t)from % 16 || bytes % 16) fail("misaligned copy");
  checked(to, bytes);
  arrivals_at(barrier).copies.push_back({to, from, (u32)bytes});
  arrive(barrier);
}
// Blocks run one after the other: none waits for one that comes later.
inline void meet(int number) {
  Barrier& group = block->groups[number];
  group.members = 128;
  wait_at(group);
}
inline void raise_flag(int* flag, int number) {
  meet(number);
  *flag = 1;
}
inline void take_flag(int* flag) {
  if (*flag != 1) fail("waits for a flag that an earlier block did not raise");
  *flag = 0;
}
inline float4 load_shared_by_all(const float4* p) { return load_once(p); }
inline void let_next_kernel_begin() {}
inline void wait_for_kernel_before() {}
inline void prefetch(const void*) {}
inline void begin_products() {}
inline void commit_products() { self().products.emplace_back(); }
inline void wait_products() {
  for (auto& products = self().products; products.size() > 1; products.pop_front())
    for (auto& product : products.front()) product();
}
template <class T, int N>
inline void keep(T (&)[N]) {}
inline u64 described(u32 at, int across, int down) { return (u64)(across / 16) << 16 | (u64)(down / 16) << 32 | at / 16; }
inline u64 further(u64 matrix, int bytes) { return matrix + bytes / 16; }
// PTX ISA, wgmma: a and the accumulator of a lane, and b in shared memory without swizzling, K-major.
template <bool BF16, int TOKENS>
inline void multiply_rows(float (&c)[TOKENS / 2], const u32 (&a)[4], u64 b) {
  auto lanes = exchange(a[0], a[1], a[2], a[3]);
  const int lane = threadIdx.x % LANES, r = lane / 4, q = lane % 4 * 2;
  std::vector<double> rows(32);
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k++)
      rows[16 * half + k] = to_float<BF16>(lanes[4 * r + k % 8 / 2][half + k / 8 * 2] >> 16 * (k % 2) & 0xffff);
  float* sum = c;
  self().products.back().push_back([=] {
    auto element = [](u64 matrix, int row, int k) {
      const u32 at = (matrix & 0x3fff) * 16, across = (matrix >> 16 & 0x3fff) * 16, down = (matrix >> 32 & 0x3fff) * 16;
      return (double)to_float<BF16>(*(u16*)checked(at + row / 8 * down + row % 8 * 16 + k / 8 * across + k % 8 * 2, 2));
    };
    for (int i = 0; i < TOKENS / 2; i++)
      for (int k = 0; k < 16; k++) sum[i] += rows[16 * (i % 4 / 2) + k] * element(b, i / 4 * 8 + q + i % 2, k);
  });
}
