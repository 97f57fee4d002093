// The kernels of cuda.cu by the names that NVRTC compiles, run on a CPU: see device.cuh.

#include "cuda.cu"

#include <cstddef>
#include <string>

// As `_Call` in cuda.py.
static_assert(sizeof(Call) == 96 && offsetof(Call, x) == 40 && offsetof(Call, tokens) == 64);
static_assert(offsetof(Call, steps) == 76 && offsetof(Call, flags) == 80 && offsetof(Call, partial) == 88);

#define ENTRY(...) \
  if (name == #__VA_ARGS__) return launch(x, y, threads, shared, cluster, [&] { __VA_ARGS__(call); }), true;
#define PER_SLOTS(BF16, SLOTS, OVERFLOW, PAIRS)                                                \
  ENTRY(gather<BF16,1,SLOTS,OVERFLOW>) ENTRY(gather<BF16,2,SLOTS,OVERFLOW>)                    \
  ENTRY(gather<BF16,4,SLOTS,OVERFLOW>) ENTRY(multiply<BF16,SLOTS,OVERFLOW,PAIRS,1>)            \
  ENTRY(multiply<BF16,SLOTS,OVERFLOW,PAIRS,2>) ENTRY(expand<SLOTS,OVERFLOW>)
#define STREAM(BF16, SLOTS, OVERFLOW, PAIRS)                                                           \
  ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,1,16,false>) ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,1,32,false>)   \
  ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,2,16,false>) ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,4,16,false>)   \
  ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,4,32,false>) ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,5,16,false>)   \
  ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,1,64,false>) ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,4,64,false>)   \
  ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,2,64,false>) ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,2,128,false>)  \
  ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,2,256,false>) ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,2,64,true>)   \
  ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,2,128,true>) ENTRY(stream<BF16,SLOTS,OVERFLOW,PAIRS,4,64,true>)
#define ARRANGE(NEIGHBOURS)                                                                    \
  ENTRY(arrange<64,NEIGHBOURS>) ENTRY(arrange<128,NEIGHBOURS>) ENTRY(arrange<256,NEIGHBOURS>)
#define PER_TYPE(BF16)                                                                         \
  PER_SLOTS(BF16, 16, false, true) PER_SLOTS(BF16, 16, false, false)                           \
  PER_SLOTS(BF16, 24, false, false) PER_SLOTS(BF16, 16, true, false)                           \
  PER_SLOTS(BF16, 4, false, false) PER_SLOTS(BF16, 12, false, false)                           \
  PER_SLOTS(BF16, 24, true, false) PER_SLOTS(BF16, 4, true, false)

// False if there is no kernel of this name.
extern "C" bool emulate(const char* kernel, int x, int y, int threads, int shared, int cluster, const Call& call) {
  const std::string name = kernel;
  STREAM(true, 16, false, false) STREAM(true, 16, true, false) STREAM(true, 4, true, false)
  STREAM(false, 24, false, false) STREAM(true, 16, false, true) STREAM(true, 8, false, false)
  ARRANGE(true) ARRANGE(false)
  PER_TYPE(true)
  PER_SLOTS(true, 8, false, false) PER_SLOTS(true, 8, true, false)
  PER_SLOTS(true, 32, true, false)
  PER_TYPE(false)
  return false;
}
