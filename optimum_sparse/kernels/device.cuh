// What cuda.cu needs of a GPU beyond C++, each in a word. The tests have their own version of this file, which runs the
// kernels on a CPU. NVRTC compiles it and sees no headers: hence the typedefs.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

constexpr int LANES = 32;
constexpr u32 ALL = 0xffffffff;

#define SHARED(name) extern __shared__ __align__(16) char name[]

// ---- bits and numbers

// Zeros above the highest bit; -1 if there is no bit.
__device__ __forceinline__ int leading_zeros(u32 word) {
  int zeros;
  asm("bfind.shiftamt.u32 %0, %1;" : "=r"(zeros) : "r"(word));
  return zeros;
}

// The bit that has so many zeros above it; none for -1: shifts end at 32 here, and C++ does not say so.
__device__ __forceinline__ u32 bit_after(int zeros) {
  u32 bit;
  asm("shr.u32 %0, %1, %2;" : "=r"(bit) : "r"(0x80000000), "r"(zeros));
  return bit;
}

// Four of the eight bytes of b:a, one for each hexadecimal digit of `selector`.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

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

// Weights are read once: they need no room in L1.
__device__ __forceinline__ u32 load_once(const u32* p) {
  u32 x;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
__device__ __forceinline__ uint2 load_once(const uint2* p) {
  uint2 x;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
  return x;
}
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}

// ---- shared memory, by its own 32-bit addresses: strips are written as halves and read as words, which C++ forbids

__device__ __forceinline__ u32 address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }
__device__ __forceinline__ void store2(u32 at, u16 x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(x) : "memory");
}
__device__ __forceinline__ void store8(u32 at, u32 x, u32 y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store16(u32 at, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
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

// 16 bytes from global to shared memory, past the registers, without waiting.
__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
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
