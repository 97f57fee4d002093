// What cuda.cu needs of a GPU beyond C++, each in a word. The tests have their own version of this file, which runs the
// kernels on a CPU. NVRTC compiles it and sees no headers: hence the typedefs.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

constexpr int LANES = 32;
constexpr u32 ALL = 0xffffffff;

#define INLINE __attribute__((always_inline))  // of a lambda

#define SHARED(name) extern __shared__ __align__(16) char name[]

// ---- bits and numbers

// The number of the highest bit, and -1 if there is no bit.
__device__ __forceinline__ int highest_bit(u32 word) {
  int number;
  asm("bfind.u32 %0, %1;" : "=r"(number) : "r"(word));
  return number;
}
__device__ __forceinline__ u32 bit(int number) {  // none for -1
  u32 bit;
  asm("shl.b32 %0, %1, %2;" : "=r"(bit) : "r"(1), "r"(number));
  return bit;
}
__device__ __forceinline__ u32 reversed(u32 word) { return __brev(word); }  // the highest bit first becomes the lowest

// Four of the eight bytes of b:a, one for each of the lower four hexadecimal digits of `selector`; where a digit has 8 added,
// the byte's highest bit eight times. (__byte_perm would spend an instruction on taking that off.)
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// a & mask ^ b, in one instruction: the compiler finds two where it sees that `mask` and b have no bit in common.
__device__ __forceinline__ u32 and_xor(u32 a, u32 mask, u32 b) {
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(a), "r"(mask), "r"(b));
  return result;
}

// Each byte of a times that of b, all added to c.
__device__ __forceinline__ u32 dot(u32 a, u32 b, u32 c) {
  u32 result;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
template <bool BF16>
__device__ __forceinline__ float to_float(u16 x) {
  if (BF16) return __uint_as_float((u32)x << 16);
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
template <bool BF16>
__device__ __forceinline__ float low(u32 pair) {
  return to_float<BF16>(pair & 0xffff);
}
template <bool BF16>
__device__ __forceinline__ float high(u32 pair) {
  return BF16 ? __uint_as_float(pair & 0xffff0000) : to_float<BF16>(pair >> 16);
}
template <bool BF16>
__device__ __forceinline__ u16 rounded(float x) {
  u16 bits;
  if (BF16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// ---- global memory

// None of these is a load of constants (`.nc`, __ldg): that promises memory which nothing writes while the kernel runs, and
// ptxas then loads from it before the wait for the kernel before.
template <class T>
__device__ __forceinline__ T load(const T* p) {
  return *p;
}
// Weights are read once: they need no room in L1.
__device__ __forceinline__ u32 load_once(const u32* p) {
  u32 x;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ uint2 load_once(const uint2* p) {
  uint2 x;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
  return x;
}

// ---- shared memory, by its own 32-bit addresses: tiles are written as halves and read as words, which C++ forbids

__device__ __forceinline__ u32 address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }
__device__ __forceinline__ void store2(u32 at, u16 x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(x) : "memory");
}
__device__ __forceinline__ void store8(u32 at, u32 x, u32 y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store4(u32 at, u32 x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void store16(u32 at, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ __forceinline__ void store16(u32 at, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
__device__ __forceinline__ u32 load4(u32 at) {
  u32 x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ uint2 load8(u32 at) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  return x;
}

__device__ __forceinline__ uint4 load16(u32 at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
  return x;
}

// 4, 8 or 16 bytes from global to shared memory, past the registers, without waiting; zeros if they are not there.
template <int BYTES>
__device__ __forceinline__ void copy(u32 to, const void* from, bool there = true) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(to), "l"(from), "n"(BYTES), "r"(there ? BYTES : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATER>  // for all of this thread but the last LATER commits
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

// ---- warps

__device__ __forceinline__ float add_up(float x) {
#pragma unroll
  for (int distance = LANES / 2; distance; distance /= 2) x += __shfl_xor_sync(ALL, x, distance);
  return x;
}
__device__ __forceinline__ int from_lane(int x, int lane) { return __shfl_sync(ALL, x, lane); }

// 8 x 8 numbers of 16 bits, of which each lane has two of row lane / 4: the same of the transposed matrix.
__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}
// c [16, 8] += a [16, 16] b [16, 8] on tensor cores: PTX ISA, mma.m16n8k16.
template <bool BF16>
__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- from one kernel to the next

// From Hopper on, a kernel may begin before the one that it is launched after has ended, if that allows it; then it waits
// for its results. What it only prefetches it may ask for before that.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- Hopper: clusters, blocks that read one another's shared memory

__device__ __forceinline__ int blocks_of_cluster() {
  int blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return blocks;
}
__device__ __forceinline__ int rank_in_cluster() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ void meet_cluster(int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}
// What the block of a rank has at an address of its shared memory.
__device__ __forceinline__ float load_of_cluster(u32 at, int rank) {
  float x;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.f32 %0, [there]; }"
               : "=f"(x) : "r"(at), "r"(rank) : "memory");
#else
  x = __uint_as_float(load4(at));
#endif
  return x;
}

__device__ __forceinline__ float4 load4_of_cluster(u32 at, int rank) {
  float4 x;
  asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there]; }"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at), "r"(rank) : "memory");
  return x;
}

// ---- Hopper: barriers in shared memory, copies that arrive at them, warpgroups

// A barrier turns when `arrivals` have come, and the bytes that were announced.
__device__ __forceinline__ void start_barrier(u32 at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
// What this thread has written to shared memory is there for wgmma and for copies.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void arrive(u32 at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// Until turn `turn % 2` is over: 0 for the first; 1 does not wait before that.
__device__ __forceinline__ void wait_barrier(u32 at, int turn) {
  int over;
  do asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
      : "=r"(over) : "r"(at), "r"(turn) : "memory");
  while (!over);
}
// Announces `bytes` to a barrier, arrives, and starts a copy that brings them.
__device__ __forceinline__ void copy_many(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Four times 8 rows of 16 bytes, at addresses that lanes bring, 8 lanes for each; of each a lane has 4 bytes of row lane / 4.
__device__ __forceinline__ void store_matrices(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// The threads of a warpgroup, the `number`th of the block, wait for one another.
__device__ __forceinline__ void meet(int number) { asm volatile("bar.sync %0, 128;" ::"r"(number + 1) : "memory"); }
// What they wrote to global memory is there for the warpgroup that takes the flag.
__device__ __forceinline__ void raise_flag(int* flag, int number) {
  meet(number);
  if (threadIdx.x % 128 == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ void take_flag(int* flag) {  // and lower it
  int raised;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  while (!raised);
  *flag = 0;
}
__device__ __forceinline__ float4 load_shared_by_all(const float4* p) { return __ldcg(p); }  // past L1

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
template <int N>  // the compiler reads `c` no earlier than here
__device__ __forceinline__ void keep(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

#define D4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D64(i) D32(i), D32(i + 32)
#define D128(i) D64(i), D64(i + 64)
#define WGMMA(N, TYPE, NUMBERS, D, A0, A1, A2, A3, B)                                                       \
  asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0;\n"                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NUMBERS "}, {%" A0 ",%" A1 \
               ",%" A2 ",%" A3 "}, %" B ", p, 1, 1, 0; }"                                                    \
               : D : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39," \
  "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define R128 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39," \
  "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99," \
  "%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119," \
  "%120,%121,%122,%123,%124,%125,%126,%127"

// A matrix in shared memory in blocks of 8 rows by 8 columns, 128 bytes each: `across` bytes to the next 8 columns, `down`
// to the next 8 rows. PTX ISA, matrix descriptor of wgmma.
__device__ __forceinline__ u64 described(u32 at, int across, int down) {
  return (u64)(across / 16) << 16 | (u64)(down / 16) << 32 | (at & 0x3ffff) / 16;
}
__device__ __forceinline__ u64 further(u64 matrix, int bytes) { return matrix + bytes / 16; }
// c [64, TOKENS] += a [64, 16] b [token][column] [TOKENS, 16], a warpgroup together: PTX ISA, wgmma.mma_async. Warps have 16
// rows each, of a and of c, as of `mma`.
template <bool BF16, int TOKENS>
__device__ __forceinline__ void multiply_rows(float (&c)[TOKENS / 2], const u32 (&a)[4], u64 b) {
#define PRODUCT(N, COUNT, A0, A1, A2, A3, B)                                           \
  if constexpr (TOKENS == N) {                                                         \
    if constexpr (BF16) WGMMA(N, "bf16", R##COUNT, D##COUNT(0), A0, A1, A2, A3, B);    \
    else WGMMA(N, "f16", R##COUNT, D##COUNT(0), A0, A1, A2, A3, B);                    \
  }
  PRODUCT(16, 8, "8", "9", "10", "11", "12")
  PRODUCT(32, 16, "16", "17", "18", "19", "20")
  PRODUCT(64, 32, "32", "33", "34", "35", "36")
  PRODUCT(128, 64, "64", "65", "66", "67", "68")
  PRODUCT(256, 128, "128", "129", "130", "131", "132")
}
