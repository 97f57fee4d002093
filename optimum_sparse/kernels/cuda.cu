// y = x W^T for few tokens, straight from a compressed W: kept values in column order, and one bit per weight.
//
// Decoding waits for memory, and W has about 0.56 of its dense bytes: what keeps up with memory is free, and that is
// some ten instructions for each kept weight. A mask word stands for 32 columns of a row. Its highest bit is the column
// of its last value; take both away, and the same holds for what is left: a walk that brings values and columns together.
//
//   gather    few tokens. A lane holds a word and its values, walks it, and reads x at the columns it meets.
//   multiply  more tokens. A lane brings its word's columns to registers, and tensor cores multiply: `lay_out`, `pairs_of`. Two
//             values in four columns have six arrangements; where each value has a slot, as many bits as there are up to a
//             column say which value is its; else a walk writes the values to their columns in shared memory. On Hopper,
//             blocks of a cluster may share out the columns.
//   stream    more tokens yet, on Hopper: as `multiply`, by warpgroups, for all of which x is in shared memory: one warpgroup
//             brings it, or, of many tokens, `arrange` has written it in order. All steps of the whole product are shared
//             out evenly; or clusters, each with 64 rows, share out the columns.
//   expand    writes the dense W.
//
// The layout is that of formats/slots.py: SLOTS values per word, and what a word has more in a list: OVERFLOW.
// For 4:8, 8:16 and the like that is the disk format, for nothing is left over. Whatever bits and columns a
// damaged W holds, kernels touch no memory but its own, though y may be anything then; `starts` are made by this package, and
// trusted.

#include <device.cuh>

struct Matrix {
  const u16* values;    // [rows, columns / 32, SLOTS]
  const u32* mask;      // [rows, columns / 32]
  const u32* overflow;  // column << 16 | value, by row and column, and four more, so that fours can be read
  const int* starts;    // [rows / ROWS][columns / SPAN + 1][ROWS], rounded up: where the overflow of a span of a row begins
  int rows, columns;
};

struct Call {
  Matrix w;
  const u16* x;     // [tokens, columns]
  const u16* bias;  // [rows] or null
  u16* y;           // [tokens, rows]; `expand`: the dense W
  int tokens;
  int each, rest;  // `multiply` only: how many times 8 rows a cluster has; the first `rest` clusters have one more
  // What follows is for `stream` only.
  u32 steps;       // a span of a tile of y each; times blocks that is less than 2^32
  // And, if not ACROSS:
  int* flags;      // [blocks, GROUPS], all 0 before and after
  float* partial;  // [blocks, GROUPS, ...]
};
__device__ __forceinline__ int first_of(const Call& call, int cluster) { return cluster * call.each + min(cluster, call.rest); }

constexpr int ROWS = 8, SPAN = 128;  // of a tile of W: rows, columns
__device__ __forceinline__ const int* start_of(const Matrix& w, int row, int span) {
  return w.starts + ((i64)(row / ROWS) * ((w.columns + SPAN - 1) / SPAN + 1) + span) * ROWS + row % ROWS;
}

// A kernel begins when the one before ends on some processors (see `_config` in cuda.py), and waits for its results before
// it reads anything; `stream` says when it need not for W. Until then memory would be idle: `gather`, `multiply`, and
// `stream` of up to DIRECT tokens, fetch their first weights to L2, so many steps or pairs of tiles a warp.
constexpr int EARLY = 2;

// ---- the bits of a word, from the highest down

// FLOAT: of the upper 24 bits, as a float, whose exponent is the highest one's number: subtracting that power of two takes the
// bit off. What finds a bit of an integer waits in one queue with shared memory, and is slow there. The scale makes the
// exponent FIRST for bit 0; it is 0 when there is none.
template <bool FLOAT, int FIRST>
__device__ __forceinline__ u32 walk(u32 word) {
  return FLOAT ? __float_as_uint((float)(word & 0xffffff00) * __uint_as_float(FIRST << 23)) : word;
}
// The number of the next bit, counted from FIRST, at bit 23: where a float has its exponent. 0 if there is none; without FLOAT,
// FIRST is 1.
template <bool FLOAT, int FIRST>
__device__ __forceinline__ u32 next_bit(u32& left) {
  if (!FLOAT) {
    const int number = highest_bit(left);
    left -= bit(number);
    return (number + FIRST) << 23;
  }
  const u32 power = left & 0x7f800000;
  left = __float_as_uint(__uint_as_float(left) - __uint_as_float(power));
  return power;
}
__device__ __forceinline__ u32 bits_left(u32 left) { return (u32)(__uint_as_float(left) * 0x1p126f); }  // with FLOAT, from 1

// ---- gather

// Of 16 bits or more the upper half is among the upper 24, and the lower half among the lower 24. With OVERFLOW slots have
// values of these alone.
template <int SLOTS, bool OVERFLOW>
constexpr bool BY_FLOAT = OVERFLOW || SLOTS >= 16;

constexpr int STEP = 32;  // words of a row, one per lane, that a warp takes at a time: 1,024 columns

// x in shared memory as `gather` reads it: of 1,024 columns at a time, for each column of a word STEP_ROW times the numbers of
// all tokens, one of each word. So a lane, whose words are the same of every step, reads from banks of its own, whatever its
// columns are. There are zeros before the first column and after the last: there is where a walk is that found no bit. All
// as fp32: to make that of 16 bits each time takes as many instructions as to multiply.
constexpr int STEP_ROW = LANES, STAGED = 34 * STEP_ROW;  // columns of a step

// Where a column of a word is, from -1 to 32.
__device__ __forceinline__ int place(int word, int column) {
  return word / STEP * STAGED + (column + 1) * STEP_ROW + word % STEP;
}

template <int TOKENS>
__device__ __forceinline__ void store_numbers(float* to, const float (&x)[TOKENS]) {
  if constexpr (TOKENS == 1) *to = x[0];
  else if constexpr (TOKENS == 2) *(float2*)to = make_float2(x[0], x[1]);
  else *(float4*)to = make_float4(x[0], x[1], x[2], x[3]);
}

template <bool BF16, int TOKENS>
__device__ void spread_x(const Call& call, float* staged) {
  const int columns = call.w.columns, words = (columns / 32 + STEP - 1) / STEP * STEP;
  for (int i = threadIdx.x; i < words; i += blockDim.x) {
    const float zeros[TOKENS] = {};
    store_numbers<TOKENS>(staged + TOKENS * place(i, -1), zeros);
    store_numbers<TOKENS>(staged + TOKENS * place(i, 32), zeros);
  }
  for (int i = threadIdx.x; i < 4 * words; i += blockDim.x) {  // the lanes of a warp write to different words
    const int word = i / (4 * LANES) * LANES + i % LANES, quarter = i / LANES % 4;
    if (word >= columns / 32) continue;
    u32 tokens[TOKENS][4];
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      const bool there = token < call.tokens;
      const uint4* from = (const uint4*)(call.x + (i64)token * columns) + 4 * word + quarter;
      const uint4 eight = there ? load(from) : make_uint4(0, 0, 0, 0);
      tokens[token][0] = eight.x, tokens[token][1] = eight.y, tokens[token][2] = eight.z, tokens[token][3] = eight.w;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float x[TOKENS];
#pragma unroll
      for (int k = 0; k < TOKENS; k++) x[k] = j % 2 ? high<BF16>(tokens[k][j / 2]) : low<BF16>(tokens[k][j / 2]);
      store_numbers<TOKENS>(staged + TOKENS * place(word, 8 * quarter + j), x);
    }
  }
}

// Adds value * x of one column, whose numbers are at `x` in shared memory.
template <int TOKENS>
__device__ __forceinline__ void add(float value, u32 x, float (&sum)[TOKENS]) {
  auto number = [](u32 bits) { return __uint_as_float(bits); };
  if constexpr (TOKENS == 1) {
    sum[0] += value * number(load4(x));
  } else if constexpr (TOKENS == 2) {
    const uint2 two = load8(x);
    sum[0] += value * number(two.x), sum[1] += value * number(two.y);
  } else {
    const uint4 four = load16(x);
    sum[0] += value * number(four.x), sum[1] += value * number(four.y);
    sum[2] += value * number(four.z), sum[3] += value * number(four.w);
  }
}

template <int SLOTS>
__device__ __forceinline__ void load_values(u32 (&values)[SLOTS / 2], const u16* from) {
  if constexpr (SLOTS % 8 == 0) {
#pragma unroll
    for (int i = 0; i < SLOTS / 8; i++) {
      const uint4 four = load_once((const uint4*)from + i);
      values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < SLOTS / 4; i++) {
      const uint2 two = load_once((const uint2*)from + i);
      values[2 * i] = two.x, values[2 * i + 1] = two.y;
    }
  }
}

// A warp takes every n-th row, a step at a time; the next step is on its way meanwhile.
template <bool BF16, int TOKENS, int SLOTS, bool OVERFLOW>
__global__ void __launch_bounds__(1024) gather(const Call call) {
  SHARED(memory);
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, stride = gridDim.x * (blockDim.x / LANES);
  const u32 words = w.columns / 32, steps = (words + STEP - 1) / STEP;
  constexpr int CELL = 4 * TOKENS, ROUNDS = 2;           // bytes; how many of its row's overflow a lane takes in a step
  const u32 staged = from_lane(address(memory), 0);      // from a register: else the compiler works it out for each entry
  const u32 last_column = (u32)(w.columns - 1) << 16 | 0xffff;
  struct Step {  // what a lane has of one
    u32 bits, values[SLOTS / 2], entries[ROUNDS];
    int entry, end;  // where the entries are, and where the row's end
  };
  Step ahead;
  int row = blockIdx.x * (blockDim.x / LANES) + warp, next_entry = 0, next_end = 0;  // the latter two of the row after
  u32 step = 0;
  auto advance = [&](int& row, u32& step) INLINE {
    if (++step == steps) step = 0, row += stride;
  };
  auto seek = [&](int row) INLINE {
    if (!OVERFLOW || row >= w.rows) return;
    next_entry = load(start_of(w, row, 0)), next_end = load(start_of(w, row, (w.columns + SPAN - 1) / SPAN));
  };
  auto ask_words = [&]() INLINE {
    const u32 word = step * STEP + lane;
    if (row >= w.rows || word >= words) return;
    const u64 index = (u64)(u32)row * words + word;
    ahead.bits = load_once(w.mask + index);
    load_values<SLOTS>(ahead.values, w.values + SLOTS * index);
  };
  auto ask_entries = [&]() INLINE {  // whose columns may be anywhere: a row's are one sequence
    if (!OVERFLOW) return;
    ahead.entry += ROUNDS * LANES;
    if (step == 0) {
      ahead.entry = next_entry + lane, ahead.end = row < w.rows ? next_end : 0;
      seek(row + stride);  // which the next row must not wait for
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; i++)
      if (ahead.entry + LANES * i < ahead.end) ahead.entries[i] = load_once(w.overflow + ahead.entry + LANES * i);
  };
  let_next_kernel_begin();
  int early = row;
  u32 early_step = 0;
#pragma unroll
  for (int i = 0; i < EARLY; i++) {
    const u32 word = early_step * STEP + lane;
    const u64 index = (u64)(u32)early * words + word;
    if (early < w.rows && word < words) {
      prefetch(w.values + SLOTS * index);
      if (lane % 8 == 0) prefetch(w.mask + index);
    }
    advance(early, early_step);
  }
  wait_for_kernel_before();
  seek(row);
  ask_words();  // before x is staged: the first weights take longest
  spread_x<BF16, TOKENS>(call, (float*)memory);
  ask_entries();  // after that: where they are had to come first
  __syncthreads();

  float sum[TOKENS] = {};
  while (row < w.rows) {
    // To other registers: it has arrived before more is asked for. Without, each step would wait for all that is on its way.
    const Step now = ahead;
    const int here = row;
    const u32 word = step * STEP + lane, below = staged + CELL * (step * STAGED + lane), above = below + 33 * CELL * STEP_ROW;
    advance(row, step);
    ask_words();
    ask_entries();
    if (word < words) {  // a branch, before which the compiler has to ask for the next words
      auto value = [&](int i) { return i % 2 ? high<BF16>(now.values[i / 2]) : low<BF16>(now.values[i / 2]); };
      constexpr bool FLOAT = BY_FLOAT<SLOTS, OVERFLOW>;  // from both ends
      constexpr int HALF = FLOAT ? SLOTS / 2 : 0, SHIFT = TOKENS == 4 ? 14 : TOKENS == 2 ? 15 : 16;  // to a column's bytes
      u32 left = walk<FLOAT, 1>(now.bits);
#pragma unroll
      for (int i = SLOTS - 1; i >= HALF; i--) add<TOKENS>(value(i), below + (next_bit<FLOAT, 1>(left) >> SHIFT), sum);
      // Some are in both halves.
      left = walk<FLOAT, 1>(reversed(OVERFLOW ? bits_left(left) | now.bits & 0xff : now.bits));
#pragma unroll
      for (int i = 0; i < HALF; i++) add<TOKENS>(value(i), above - (next_bit<FLOAT, 1>(left) >> SHIFT), sum);
    }
    if constexpr (OVERFLOW) {
      auto add_entry = [&](u32 entry) {
        if (entry > last_column) return;
        // That is place(column / 32, column % 32).
        const u32 cell = (entry >> 21) + (entry >> 26) * (STAGED - STEP) + (entry >> 11 & 31 * STEP_ROW) + STEP_ROW;
        add<TOKENS>(low<BF16>(entry), staged + CELL * cell, sum);
      };
#pragma unroll
      for (int i = 0; i < ROUNDS; i++)
        if (now.entry + LANES * i < now.end) add_entry(now.entries[i]);
      if (!step)  // the row's last
#pragma unroll 1
        for (int i = now.entry + ROUNDS * LANES; i < now.end; i += LANES) add_entry(load_once(w.overflow + i));
    }
    if (step) continue;
    const float bias = call.bias ? to_float<BF16>(call.bias[here]) : 0.0f;
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      sum[token] = add_up(sum[token]);
      if (lane == 0 && token < call.tokens) call.y[(i64)token * w.rows + here] = rounded<BF16>(sum[token] + bias);
      sum[token] = 0;
    }
  }
}

// ---- tiles: a lane has one word of each, word lane % 4 of row lane / 4

constexpr int BLOCK = 128, TILE = 16 * BLOCK;  // bytes

template <int SLOTS, bool OVERFLOW>
struct Words {
  static constexpr int ENTRIES = 3;  // of its row's overflow that each lane has: there are rarely more
  u32 bits, values[SLOTS / 2], entries[ENTRIES];
  int count;  // of the row's overflow

  // Tiles come through shared memory, past the registers: any number of them may be on their way, where to wait for one
  // load to a register is to wait for all. Lanes ask for whole rows together, for what they ask for one by one comes in
  // sectors of 32 bytes, the same ones again and again.
  static constexpr int PIECE = SLOTS % 8 ? 8 : 16, PIECES = 8 * SLOTS / PIECE;  // bytes; of a row
  static constexpr int MASK = 8 * ROWS * SLOTS, EXTRA = MASK + 4 * LANES, ROOM = EXTRA + (OVERFLOW ? 20 * LANES : 0);

  // Where a piece of a tile is in its room: in order, so that (of 16 and 32 slots) what is one line of 128 bytes in W is one
  // line here, or to copy it takes more than twice as long. In a line, pieces change places so that those that lanes read at the
  // same time have banks of their own; of other numbers of slots they have that in order.
  static __device__ __forceinline__ u32 in_room(int piece) {
    constexpr int WORD = PIECES / 4, EVEN = (WORD & -WORD) - 1;
    return PIECE * (piece ^ piece >> 3 & EVEN);
  }

  // What a lane copies of a tile: how many bytes after the tile's first it is, and where it goes; and what it takes later.
  // That is the same for all, and to work it out each time takes longer than to multiply.
  struct Pieces {
    u32 from[PIECES / 4], mask, to, taken[PIECES / 4];
    __device__ __forceinline__ Pieces(const Matrix& w, int lane) {
      const u32 words = w.columns / 32;
#pragma unroll
      for (int i = 0; i < PIECES / 4; i++) {
        const int piece = LANES * i + lane;
        from[i] = piece / PIECES * words * (2 * SLOTS) + piece % PIECES * PIECE;
        taken[i] = in_room(PIECES / 4 * lane + i);
      }
      mask = (lane / 4 * words + lane % 4) * 4;
      to = in_room(lane);  // of the first piece; others are PIECE * LANES behind one another
    }
  };

  // Where the overflow of a lane's row begins and ends: `ask` of that tile comes later, and must not wait for it.
  static __device__ __forceinline__ int2 seek(const Matrix& w, int group, int span, bool there) {
    return seek(start_of(w, ROWS * group + threadIdx.x % LANES / 4, span), there);
  }
  static __device__ __forceinline__ int2 seek(const int* start, bool there) {
    if (!OVERFLOW || !there) return make_int2(0, 0);
    return make_int2(load(start), load(start + ROWS));
  }
  static __device__ __forceinline__ void prefetch_tile(const Matrix& w, int group, int span, int groups) {
    const int lane = threadIdx.x % LANES, words = w.columns / 32, row = ROWS * group + lane / 4;
    const u64 index = (u64)(u32)row * (u32)words + 4 * span + lane % 4;
    if (group >= groups || row >= w.rows || 4 * span + lane % 4 >= words) return;
    prefetch(w.values + SLOTS * index);
    if (lane % 4 == 0) prefetch(w.mask + index);
  }
  // `rows` are there; columns beyond the end and missing rows are zeros.
  static __device__ __forceinline__ void ask(u32 room, const Matrix& w, const Pieces& mine, int group, int span, int rows,
                                             int2 overflow) {
    const int lane = threadIdx.x % LANES, words = w.columns / 32, columns = words - 4 * span;  // words that are there
    const u64 index = (u64)(u32)(ROWS * group) * (u32)words + 4 * (u32)span;  // of unsigned ones, which is one instruction
    const char* values = (const char*)(w.values + SLOTS * index);
#pragma unroll
    for (int i = 0; i < PIECES / 4; i++) {
      const int r = (LANES * i + lane) / PIECES, piece = (LANES * i + lane) % PIECES;
      copy<PIECE>(room + mine.to + PIECE * LANES * i, values + mine.from[i], r < rows && piece * 4 / PIECES < columns);
    }
    copy<4>(room + MASK + 4 * lane, (const char*)(w.mask + index) + mine.mask, lane / 4 < rows && lane % 4 < columns);
    if constexpr (OVERFLOW) {
      const int from = overflow.x / 4 * 4 + lane % 4 * 4;  // four for each lane, 13 or more of the row's
      copy<16>(room + EXTRA + 16 * lane, w.overflow + from, from < overflow.y);
      store4(room + EXTRA + 16 * LANES + 4 * lane, overflow.x % 4 | overflow.y - overflow.x << 2);
    }
  }
  __device__ __forceinline__ void take(u32 room, const Pieces& mine) {
    const int lane = threadIdx.x % LANES;
    bits = load4(room + MASK + 4 * lane);
#pragma unroll
    for (int i = 0; i < PIECES / 4; i++) {
      const u32 at = room + mine.taken[i];
      if constexpr (PIECE == 16) {
        const uint4 four = load16(at);
        values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
      } else {
        const uint2 two = load8(at);
        values[2 * i] = two.x, values[2 * i + 1] = two.y;
      }
    }
    if constexpr (OVERFLOW) {
      const int range = load4(room + EXTRA + 16 * LANES + 4 * lane);
      count = range >> 2;
#pragma unroll
      for (int i = 0; i < ENTRIES; i++)
        entries[i] = load4(room + EXTRA + lane / 4 * 64 + (range % 4 + lane % 4 + 4 * i) * 4);
    }
  }
};

// For words with values that have no slot, or with more than 16 slots: a dense tile in shared memory, columns t and 16 + t of a
// lane's word at BLOCK * t + 4 * lane. So each lane has a bank of its own, and no walk gets into another's way. Columns that W
// does not keep have what was there before: who reads a pair masks it, which is faster than to write zeros first.
__device__ __forceinline__ u32 inside(int column) { return column << 7 & 0x780 | column >> 3 & 2; }  // of a word
// The address of a column, whose number is at bit 23, in a word at `own`; with `own ^ inside(31)`, of 31 minus that. Any number
// is safe.
__device__ __forceinline__ u32 cell(u32 number, u32 own) { return and_xor(__umulhi(number, (128 << 9) + (1 << 6)), 0x782, own); }

// Pair t of a lane's word at `own`. A selector's digits from 8 on are a byte's highest bit, eight times.
__device__ __forceinline__ u32 read_pair(u32 bits, u32 own, int t) {
  return load4(own + BLOCK * t) & permute(bits << (7 - t % 8), 0, t < 8 ? 0xaa88 : 0xbb99);
}

// A warp writes its words of N tiles, the `groups`th eight rows of a span, to `tiles`, whose addresses TILE divides. A word is
// walked from both ends, which are two chains of instructions that do not wait for each other. Where a walk finds no bit, it
// writes to column 0 (from the highest bit down) or 31, and the value is what belongs there: see formats/slots.py. Without
// OVERFLOW each lane's cells are its own, before and after.
template <int N, int SLOTS, bool OVERFLOW>
__device__ __forceinline__ void spread(const Matrix& w, const Words<SLOTS, OVERFLOW> (&words)[N], const int (&groups)[N],
                                       int span, const u32 (&tiles)[N]) {
  const int lane = threadIdx.x % LANES;
  u32 down[N], up[N];
#pragma unroll
  for (int k = 0; k < N; k++) down[k] = walk<true, 128>(words[k].bits), up[k] = walk<true, 128>(reversed(words[k].bits));
  auto half = [&](u32 pair, int i) { return i % 2 ? pair >> 16 : pair; };
#pragma unroll
  for (int n = 0; n < SLOTS / 2; n++)
#pragma unroll
    for (int k = 0; k < N; k++) {
      const u32 last = next_bit<true, 128>(down[k]), first = next_bit<true, 128>(up[k]), own = tiles[k] | 4 * lane;
      constexpr int LAST = SLOTS - 1;
      store2(cell(last, own), half(words[k].values[(LAST - n) / 2], LAST - n));
      store2(cell(first, own ^ inside(31)), half(words[k].values[n / 2], n));
    }
  if constexpr (OVERFLOW) {  // four lanes share a row's
    constexpr int ENTRIES = Words<SLOTS, OVERFLOW>::ENTRIES;
#pragma unroll
    for (int k = 0; k < N; k++) {
      const u32 row = tiles[k] | lane / 4 * 16;
      auto put = [&](u32 entry) { store2(row | entry >> 19 & 12 | inside(entry >> 16), entry); };
#pragma unroll
      for (int i = 0; i < ENTRIES; i++)
        if (lane % 4 + 4 * i < words[k].count) put(words[k].entries[i]);
      if (words[k].count <= 4 * ENTRIES) continue;
      const int begin = load(start_of(w, ROWS * groups[k] + lane / 4, span));
#pragma unroll 1
      for (int i = 4 * ENTRIES + lane % 4; i < words[k].count; i += 4) put(load_once(w.overflow + begin + i));
    }
    __syncwarp();
  }
}

// Pairs as tiles have them to a word's columns as neighbours.
__device__ __forceinline__ void in_order(u32 (&pairs)[16]) {
  u32 found[16];
#pragma unroll
  for (int j = 0; j < 16; j++) found[j] = permute(pairs[2 * j % 16], pairs[2 * j % 16 + 1], j < 8 ? 0x5410 : 0x7632);
#pragma unroll
  for (int i = 0; i < 16; i++) pairs[i] = found[i];
}
// And back, but in the order in which tensor cores get these: t, then t + 8.
__device__ __forceinline__ void reorder(u32 (&pairs)[16]) {
  u32 found[16];
#pragma unroll
  for (int t = 0; t < 16; t++) found[t % 8 * 2 + t / 8] = permute(pairs[t / 2], pairs[8 + t / 2], t % 2 ? 0x7632 : 0x5410);
#pragma unroll
  for (int i = 0; i < 16; i++) pairs[i] = found[i];
}

// Where each value has a slot, and there are 16 at most, no walk is needed: how many bits there are up to a column is the
// number of its value. `stage` writes a word's values to shared memory, each beside the one before it: n - 1 and n at BLOCK * n
// from a lane's `own`, where of 16 the last and the first share a place. From there `window` reads columns 2 t and 2 t + 1, n
// being the number of bits up to the first of them: whichever are kept, they are in their halves.
template <int SLOTS, bool OVERFLOW>
constexpr bool WINDOWS = !OVERFLOW && SLOTS <= 16;

template <int SLOTS>
__device__ __forceinline__ void stage(const u32 (&values)[SLOTS / 2], u32 own) {
#pragma unroll
  for (int n = 0; n < SLOTS; n++) {
    const u32 here = values[n / 2], before = values[(n + SLOTS - 1) % SLOTS / 2];
    store4(own + BLOCK * n, n % 2 ? here : permute(before, here, 0x5432));
  }
  if (SLOTS < 16) store4(own + BLOCK * SLOTS, values[SLOTS / 2 - 1] >> 16);
}
// How many bits there are up to column 2 t, as byte t / 4 of counts[t % 4]; modulo 16, so that any word is safe.
__device__ __forceinline__ void count_bits(u32 (&counts)[4], u32 bits) {
  bits <<= 1;  // so that column 2 t is the second of a pair
  const u32 pairs = bits - (bits >> 1 & 0x55555555), fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333);
  const u32 eights = fours + (fours >> 4) & 0x0f0f0f0f, below = eights * 0x01010100, half = below + (fours & 0x0f0f0f0f);
  counts[0] = below + (pairs & 0x03030303), counts[1] = half;
  counts[2] = half + (pairs >> 4 & 0x03030303), counts[3] = below + eights;
#pragma unroll
  for (int i = 0; i < 4; i++) counts[i] &= 0x0f0f0f0f;
}
__device__ __forceinline__ u32 window(const u32 (&counts)[4], u32 bits, u32 own, int t) {
  const int byte = t / 4, shift = 6 - 2 * (t % 4);
  const u32 both = load4(dot(counts[t % 4], (u32)BLOCK << 8 * byte, own));
  return both & permute(bits << shift + 1, bits << shift, 0xcc88 + 0x1111 * byte);  // as in `read_pair`
}

// Two values in four columns have six arrangements. A table of 16 at an address that 128 divides has, for the bits of four
// columns, what `permute` needs to bring their two values to the first two columns, and to the other two.
__device__ __forceinline__ void write_selectors(u32 table) {
  if (threadIdx.x >= 16) return;
  const u32 first = threadIdx.x & 3, rest = threadIdx.x >> 2;
  store8(table + 8 * threadIdx.x, first == 0 ? 0x4444 : first == 1 ? 0x4410 : first == 2 ? 0x1044 : 0x3210,
         rest == 0 ? 0x4444 : rest == 1 ? 0x4432 : rest == 2 ? 0x3244 : 0x3210);
}
// Columns 4 i to 4 i + 3 of a word of 2:4, as two pairs.
__device__ __forceinline__ uint2 four_columns(const Words<16, false>& word, int i, u32 table) {
  const uint2 how = load8(table | (i ? word.bits >> (4 * i - 3) : word.bits << 3) & 120);
  uint2 pairs;
  pairs.x = permute(word.values[i], 0, how.x), pairs.y = permute(word.values[i], 0, how.y);
  return pairs;
}

// Brings a warp's words of N tiles to where `pairs_of` finds their columns; 2:4 has them in registers.
template <bool PAIRS, int N, int SLOTS, bool OVERFLOW>
__device__ __forceinline__ void lay_out(u32 (&counts)[N][4], const Matrix& w, const Words<SLOTS, OVERFLOW> (&words)[N],
                                        const int (&groups)[N], int span, const u32 (&tiles)[N]) {
  if constexpr (PAIRS) return;
  else if constexpr (!WINDOWS<SLOTS, OVERFLOW>) spread<N>(w, words, groups, span, tiles);
  else
#pragma unroll
    for (int k = 0; k < N; k++)
      stage<SLOTS>(words[k].values, tiles[k] + threadIdx.x % LANES * 4), count_bits(counts[k], words[k].bits);
}
// Four columns of a lane's word, of 8 times four, in the order in which `load_x` has those of x: neighbours, or `reorder`ed.
template <bool PAIRS, int SLOTS, bool OVERFLOW>
__device__ __forceinline__ uint2 pairs_of(const Words<SLOTS, OVERFLOW>& word, const u32 (&counts)[4], int i, u32 own,
                                          u32 table) {
  if constexpr (PAIRS) return four_columns(word, i, table);
  else if constexpr (WINDOWS<SLOTS, OVERFLOW>)
    return make_uint2(window(counts, word.bits, own, 2 * i), window(counts, word.bits, own, 2 * i + 1));
  else return make_uint2(read_pair(word.bits, own, i), read_pair(word.bits, own, i + 8));
}

// Of 8 tokens, from the `first` on, the columns of a span: a lane gets word lane % 4 of token lane / 4, in the order in which
// tensor cores want it.
template <bool NEIGHBOURS>
__device__ __forceinline__ void load_x(u32 (&x)[16], const Call& call, int first, int span) {
  const int lane = threadIdx.x % LANES, token = first + lane / 4, column = SPAN * span + lane % 4 * 32;
  const bool there = token < call.tokens && column < call.w.columns;
  const uint4* from = (const uint4*)(call.x + (i64)token * call.w.columns + column);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 four = there ? load(from + i) : make_uint4(0, 0, 0, 0);
    x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
  }
  if (!NEIGHBOURS) reorder(x);
}

// ---- multiply

// A block has some rows, 8 at a time, and its warps share out the columns. (Blocks of a cluster share them out too: each then
// reads less of x. With 4,096 rows, x of 8 tokens is half as many bytes as the rows of one processor.) A warp keeps 128 columns
// of x in registers, and takes those of two tiles at a time, which are 16 rows, through up to PASS groups of rows. What bounds
// this kernel is the number of its instructions.
template <bool BF16, int SLOTS, bool OVERFLOW, bool PAIRS, int TOKEN_TILES>
__global__ void __launch_bounds__(512) multiply(const Call call) {
  SHARED(memory);
  constexpr int UNITS = 4, PASS = 2 * UNITS, AHEAD = 2;  // of two tiles; groups; units that are on their way
  typedef Words<SLOTS, OVERFLOW> Word;
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warp = from_lane(threadIdx.x / LANES, 0), warps = blockDim.x / LANES;
  const int spans = (w.columns + SPAN - 1) / SPAN;
  const int cluster = blocks_of_cluster(), rank = rank_in_cluster(), parts = cluster * warps, part = rank * warps + warp;
  const int first = first_of(call, blockIdx.x / cluster), last = first_of(call, blockIdx.x / cluster + 1);
  const int passes = (last - first + PASS - 1) / PASS, size = ((last - first + passes - 1) / passes + 1) / 2 * 2;
  const int first_token = blockIdx.y * 8 * TOKEN_TILES;
  const u32 sums = (address(memory) + TILE - 1) / TILE * TILE, tiles = sums + warp * 2 * TILE;  // one or the other
  const u32 table = sums + warps * max(PAIRS ? 0 : 2 * TILE, UNITS * TOKEN_TILES * 16 * LANES);
  const u32 rooms = table + (PAIRS ? 128 : 0) + warp * AHEAD * 2 * Word::ROOM;

  const typename Word::Pieces pieces(w, lane);
  auto room = [&](int unit, int k) { return rooms + (unit % AHEAD * 2 + k) * Word::ROOM; };
  int2 starts[2];  // of the unit that is asked for next
  auto seek = [&](int unit, int pass, int span) INLINE {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int group = pass + 2 * unit + k;
      starts[k] = Word::seek(w, group, span, 2 * unit < size && group < last && span < spans);
    }
  };
  auto ask = [&](int unit, int pass, int span) INLINE {
    if (2 * unit < size && pass + 2 * unit < last && span < spans)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int group = pass + 2 * unit + k, rows = group < last ? w.rows - ROWS * group : 0;
        Word::ask(room(unit, k), w, pieces, group, span, rows, starts[k]);
      }
    commit_copies();
  };
  let_next_kernel_begin();
#pragma unroll
  for (int i = 0, unit = 0, span = part; i < EARLY; i++) {
    Word::prefetch_tile(w, first + 2 * unit, span, last), Word::prefetch_tile(w, first + 2 * unit + 1, span, last);
    if (2 * ++unit >= size) unit = 0, span += parts;
  }
  wait_for_kernel_before();
#pragma unroll
  for (int unit = 0; unit < AHEAD; unit++) seek(unit, first, part), ask(unit, first, part);
  seek(AHEAD, first, part);
  if (PAIRS) {
    write_selectors(table);
    __syncthreads();
  }

  for (int pass = first; pass < last; pass += size) {
    const int count = min(size, last - pass);
    float sum[UNITS][TOKEN_TILES][4] = {};
    for (int span = part; span < spans; span += parts) {
      const bool more = span + parts < spans;
      const int next_pass = more ? pass : pass + size, next_span = more ? span + parts : part;
      u32 x[TOKEN_TILES][16];
#pragma unroll
      for (int k = 0; k < TOKEN_TILES; k++) load_x<WINDOWS<SLOTS, OVERFLOW>>(x[k], call, first_token + 8 * k, span);
#pragma unroll
      for (int unit = 0; unit < UNITS; unit++) {
        Word words[2];
        wait_copies<AHEAD - 1>();
        __syncwarp();
        if (2 * unit < count) words[0].take(room(unit, 0), pieces), words[1].take(room(unit, 1), pieces);
        __syncwarp();
        if (unit + AHEAD < UNITS) ask(unit + AHEAD, pass, span);
        else ask(unit + AHEAD - UNITS, next_pass, next_span);
        if (unit + AHEAD + 1 < UNITS) seek(unit + AHEAD + 1, pass, span);
        else seek(unit + AHEAD + 1 - UNITS, next_pass, next_span);
        if (2 * unit >= count) continue;
        const int group = pass + 2 * unit;
        u32 counts[2][4];
        lay_out<PAIRS, 2>(counts, w, words, {group, group + 1}, span, {tiles, tiles + TILE});
#pragma unroll
        for (int i = 0; i < 8; i++) {
          uint2 a[2];  // of each tile two pairs of columns
#pragma unroll
          for (int k = 0; k < 2; k++) a[k] = pairs_of<PAIRS>(words[k], counts[k], i, tiles + k * TILE + 4 * lane, table);
#pragma unroll
          for (int k = 0; k < TOKEN_TILES; k++)
            mma<BF16>(sum[unit][k], a[0].x, a[1].x, a[0].y, a[1].y, x[k][2 * i], x[k][2 * i + 1]);
        }
      }
    }
    float* all = (float*)(memory + (sums - address(memory)));  // [warp][unit][tokens][lane][4]
    constexpr int EACH = TOKEN_TILES * LANES * 4;              // of a unit
    __syncthreads();
#pragma unroll
    for (int i = 0; i < UNITS * TOKEN_TILES; i++) {
      const float* mine = sum[i / TOKEN_TILES][i % TOKEN_TILES];
      ((float4*)all)[(warp * UNITS * TOKEN_TILES + i) * LANES + lane] = make_float4(mine[0], mine[1], mine[2], mine[3]);
    }
    __syncthreads();
    const int numbers = (count + 1) / 2 * EACH;
    for (int i = threadIdx.x; i < numbers; i += blockDim.x) {
      float total = 0;
#pragma unroll 4
      for (int other = 0; other < warps; other++) total += all[other * UNITS * EACH + i];
      all[i] = total;
    }
    meet_cluster(cluster);
    for (int i = rank * blockDim.x + threadIdx.x; i < numbers; i += cluster * blockDim.x) {
      const int unit = i / EACH, tile = i / (4 * LANES) % TOKEN_TILES, at = i / 4 % LANES, c = i % 4;
      const int token = first_token + 8 * tile + at % 4 * 2 + c % 2, group = pass + 2 * unit + c / 2;
      const int row = ROWS * group + at / 4;
      if (group >= last || row >= w.rows || token >= call.tokens) continue;
      float total = call.bias ? to_float<BF16>(call.bias[row]) : 0.0f;
      for (int block = 0; block < cluster; block++) total += load_of_cluster(address(all + i), block);
      call.y[(i64)token * w.rows + row] = rounded<BF16>(total);
    }
    meet_cluster(cluster);  // before tiles are written again, or a block ends whose sums others still read
  }
}

// ---- stream: Hopper

// wgmma takes 64 rows of W from a warpgroup's registers, and x from shared memory in blocks of 8 tokens and 8 columns: two of
// each of the four words of 128 columns. Which two, is as in W's fragments: see `pairs_of`.

// x [tokens, columns] -> [tile of TOKENS][span][8 tokens][block], zeros beyond both ends. A warp takes 8 tokens of a span.
template <int TOKENS, bool NEIGHBOURS>
__global__ void arrange(const Call call) {
  const int lane = threadIdx.x % LANES, spans = (call.w.columns + SPAN - 1) / SPAN;
  const int group = blockIdx.y, span = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
  wait_for_kernel_before();
  let_next_kernel_begin();
  if (span >= spans) return;
  u32 x[16];
  load_x<NEIGHBOURS>(x, call, 8 * group, span);
  constexpr int GROUPS = TOKENS / 8;
  u32* to = (u32*)call.y + (((i64)group / GROUPS * spans + span) * GROUPS + group % GROUPS) * (TILE / 4) + lane;
#pragma unroll
  for (int i = 0; i < 16; i++) to[i * BLOCK / 4] = x[i];
}

// The work of a block: all spans of all tiles of y, one tile after the other, are cut into as many parts as there are
// blocks. A block takes the tiles of its part from the last to the first. So the last, of which it may have only a first
// piece, is done first, and who has the end of a tile finds the pieces that others have. Those are of blocks before it,
// which the GPU has begun before: no block waits for one that waits for room.
struct Part {
  int spans, from, tile, at, stop;  // in spans; `at` and `stop` in the tile's piece

  static __device__ __forceinline__ int first_step(const Call& call, int block) { return (u32)block * call.steps / gridDim.x; }
  static __device__ __forceinline__ int block_of(const Call& call, int step) {
    return ((u32)(step + 1) * gridDim.x - 1) / call.steps;
  }
  __device__ __forceinline__ Part(const Call& call, int spans, int block) : spans(spans) {
    from = first_step(call, block);
    stop = first_step(call, block + 1);
    enter();
  }
  __device__ __forceinline__ void enter() {  // the tile before `stop`
    tile = (stop - 1) / spans;
    at = max(from, tile * spans);
  }
  __device__ __forceinline__ bool is_left() const { return stop > from; }
  __device__ __forceinline__ int span() const { return at - tile * spans; }
  __device__ __forceinline__ void leave() {
    stop = max(from, tile * spans);
    if (is_left()) enter();
  }
  __device__ __forceinline__ void advance() {
    if (++at == stop) leave();
  }
};

// What a lane has of 16 rows of W, from `row` on, and 8 tokens: two tokens of a row, and of that 8 below. It writes two rows of
// a token.
template <bool BF16>
__device__ __forceinline__ void write_sums(const Call& call, int row, int token, float4 sums, const float (&bias)[2]) {
  const int lane = threadIdx.x % LANES, rows = call.w.rows;
  token += lane / 4, row += lane % 4 * 2;
  u16* y = call.y + (i64)token * rows + row;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float first = half ? sums.z : sums.x, second = half ? sums.w : sums.y;
    const u32 pair = transposed(rounded<BF16>(first + bias[half]) | (u32)rounded<BF16>(second + bias[half]) << 16);
    if (token >= call.tokens) continue;
    if (row + 8 * half + 1 < rows && rows % 2 == 0) *(u32*)(y + 8 * half) = pair;
    else {
      if (row + 8 * half < rows) y[8 * half] = pair;
      if (row + 8 * half + 1 < rows) y[8 * half + 1] = pair >> 16;
    }
  }
}
template <bool BF16>
__device__ __forceinline__ void load_bias(float (&bias)[2], const Call& call, int row) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int mine = row + 8 * half + threadIdx.x % LANES / 4;
    bias[half] = call.bias && mine < call.w.rows ? to_float<BF16>(call.bias[mine]) : 0.0f;
  }
}

// What a warpgroup, the `group`th of its block, does with its sums, 64 rows of W by TOKENS, of the tile that a part is at.
template <bool BF16, int GROUPS, int TOKENS>
__device__ __forceinline__ void finish_tile(const Call& call, const Part& now, float (&sum)[TOKENS / 2], int group) {
  constexpr int FOURS = TOKENS / 8, TOGETHER = TOKENS < 128 ? 128 / TOKENS : 1;  // pieces that are on their way at a time
  const int thread = threadIdx.x % 128, warp = thread / LANES, block = blockIdx.x;
  auto piece = [&](int block) {  // the sums that a block leaves
    return (float4*)call.partial + ((i64)block * GROUPS + group) * (FOURS * 128) + thread;
  };
  if (now.stop < (now.tile + 1) * now.spans) {
    float4* to = piece(block);
#pragma unroll
    for (int i = 0; i < FOURS; i++)
      to[i * 128] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
    raise_flag(call.flags + block * GROUPS + group, group);
    return;
  }
  const int first = Part::block_of(call, now.tile * now.spans);  // that has a piece of the tile
  if (first < block) {
    for (int other = first + thread; other < block; other += 128) take_flag(call.flags + other * GROUPS + group);
    meet(group);
    for (int other = block - 1; other >= first; other -= TOGETHER) {
      float4 found[TOGETHER][FOURS];
#pragma unroll
      for (int k = 0; k < TOGETHER; k++)
#pragma unroll
        for (int i = 0; i < FOURS; i++)
          found[k][i] = other - k >= first ? load_shared_by_all(piece(other - k) + i * 128) : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int k = 0; k < TOGETHER; k++)
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
          sum[4 * i] += found[k][i].x, sum[4 * i + 1] += found[k][i].y;
          sum[4 * i + 2] += found[k][i].z, sum[4 * i + 3] += found[k][i].w;
        }
    }
  }
  const int token_tiles = (call.tokens + TOKENS - 1) / TOKENS, token = now.tile % token_tiles * TOKENS;
  const int row = (now.tile / token_tiles * GROUPS + group) * 64 + warp * 16;
  float bias[2];
  load_bias<BF16>(bias, call, row);
#pragma unroll
  for (int i = 0; i < FOURS; i++)
    write_sums<BF16>(call, row, token + 8 * i, make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]), bias);
}

// Up to so many tokens at a time a warpgroup more reads x and brings it to the others. To wait for a kernel that arranges x
// takes two microseconds; beyond, that is less than what each block would spend on it.
constexpr int DIRECT = 32;

// What that warpgroup does: x of a step into each of STAGES places in turn.
template <bool NEIGHBOURS, int TOKENS, int STAGES>
__device__ __forceinline__ void bring_x(const Call& call, Part now, u32 places, u32 full, u32 empty) {
  // Of the groups of 8 tokens, step after step, each warp has every fourth: of 32 tokens one of each step, of 16 one of every
  // second. What it takes next is on its way.
  constexpr int EIGHTS = TOKENS / 8, STRIDE = 4 / EIGHTS, AHEAD = 2;
  static_assert(STAGES % STRIDE == 0, "a warp always has the same places");
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES % 4, token_tiles = (call.tokens + TOKENS - 1) / TOKENS;
  auto skip = [&](Part& part, int steps) INLINE {
    for (int i = 0; i < steps && part.is_left(); i++) part.advance();
  };
  skip(now, warp / EIGHTS);
  Part next = now;
  u32 x[AHEAD][16];
  auto ask = [&](int slot) INLINE {
    if (!next.is_left()) return;
    load_x<NEIGHBOURS>(x[slot], call, next.tile % token_tiles * TOKENS + warp % EIGHTS * 8, next.span());
    skip(next, STRIDE);
  };
#pragma unroll
  for (int slot = 0; slot < AHEAD; slot++) ask(slot);
  int stage = warp / EIGHTS, turn = 1;
  while (now.is_left()) {
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++) {
      if (!now.is_left()) break;
      wait_barrier(empty + 8 * stage, turn);
      const u32 to = places + (stage * EIGHTS + warp % EIGHTS) * TILE + lane * 16;
#pragma unroll
      for (int i = 0; i < 16; i += 4)
        store_matrices(to + i * BLOCK, x[slot][i], x[slot][i + 1], x[slot][i + 2], x[slot][i + 3]);
      publish_writes();
      __syncwarp();
      if (lane == 0) arrive(full + 8 * stage);
      ask(slot);
      skip(now, STRIDE);
      if ((stage += STRIDE) >= STAGES) stage -= STAGES, turn ^= 1;
    }
  }
}

// What the warps of a cluster do with the sums of one tile, 64 rows of W by TOKENS, whose columns its warpgroups have shared out:
// each leaves its own in shared memory, at `own`, `stride` bytes before those of the next warp, and adds up some of all.
template <bool BF16, int GROUPS, int TOKENS>
__device__ __forceinline__ void share_sums(const Call& call, int tile, const float (&sum)[TOKENS / 2], u32 own, int stride) {
  constexpr int FOURS = TOKENS / 8, WARPS = 4 * GROUPS;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, blocks = blocks_of_cluster();
  const int token_tiles = (call.tokens + TOKENS - 1) / TOKENS;
#pragma unroll
  for (int i = 0; i < FOURS; i++)
    store16(own + (i * LANES + lane) * 16, sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
  meet_cluster(blocks);
  for (int i = warp * blocks + rank_in_cluster(); i < 4 * FOURS; i += WARPS * blocks) {
    const int row = tile / token_tiles * 64 + i / FOURS * 16;
    float bias[2];
    load_bias<BF16>(bias, call, row);
    float4 total = make_float4(0, 0, 0, 0);
    for (int block = 0; block < blocks; block++)
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        const u32 theirs = own + (4 * group + i / FOURS - warp) * stride + (i % FOURS * LANES + lane) * 16;
        const float4 found = load4_of_cluster(theirs, block);
        total.x += found.x, total.y += found.y, total.z += found.z, total.w += found.w;
      }
    write_sums<BF16>(call, row, tile % token_tiles * TOKENS + i % FOURS * 8, total, bias);
  }
  meet_cluster(blocks);  // before a block ends whose sums others still read
}

// A block makes 64 * GROUPS columns of y for TOKENS tokens at a time. Each warp of a warpgroup brings the 16 rows of W that
// it multiplies into registers itself, as in `multiply`; x is there for all of them, by `bring_x` or by `fill`. How many blocks
// are to be on a processor, is as `streams` in cuda.py has it. ACROSS: a cluster makes 64 columns of y, one tile, whose spans its
// warpgroups share out evenly: then no sums go through global memory, which of 64 tokens takes two or three microseconds.
template <bool BF16, int SLOTS, bool OVERFLOW, bool PAIRS, int GROUPS, int TOKENS, bool ACROSS>
__global__ void __launch_bounds__(128 * (GROUPS + (TOKENS <= DIRECT)), GROUPS < 4 && TOKENS <= 64 && !ACROSS ? 2 : 1)
    stream(const Call call) {
  SHARED(memory);
  static_assert(!ACROSS || TOKENS > DIRECT, "`bring_x` has one span at a time");
  constexpr int WARPS = 4 * GROUPS, X = TOKENS / 8 * TILE, AHEAD = OVERFLOW && TOKENS == 16 ? 1 : 2;
  constexpr int SIDE = ACROSS ? GROUPS : 1, HEIGHT = 8 * GROUPS / SIDE;      // spans, and times 8 rows, of a step
  constexpr int STAGES = TOKENS * SIDE >= 256 ? 2 : 4, FILLED = STAGES / 2;  // of x; before the first step
  typedef Words<SLOTS, OVERFLOW> Word;
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warp = from_lane(threadIdx.x / LANES, 0);  // which the compiler sees is one
  const int mine = ACROSS ? warp % 4 : warp, side = ACROSS ? warp / 4 : 0;  // of the rows, of the spans
  const int spans = (w.columns + SPAN - 1) / SPAN, steps = spans / SIDE, token_tiles = (call.tokens + TOKENS - 1) / TOKENS;
  const u32 xs = (address(memory) + TILE - 1) / TILE * TILE, tiles = xs + STAGES * SIDE * X + warp * 2 * TILE;
  const u32 table = xs + STAGES * SIDE * X + (PAIRS ? 0 : WARPS * 2 * TILE), first_room = table + 128;
  constexpr int ROOMS = AHEAD * 2 * Word::ROOM, SUMS = ACROSS ? 64 * TOKENS : 0;  // bytes of a warp that multiplies
  constexpr int OWN = ROOMS > SUMS ? ROOMS : SUMS;                               // one after the other
  const u32 rooms = first_room + warp * OWN, full = first_room + WARPS * OWN, empty = full + 8 * STAGES;
  Part now(call, steps, blockIdx.x), later = now, next = now;  // what is multiplied; asked for of W; of x

  const typename Word::Pieces pieces(w, lane);
  int span, group, more = 0;    // of what is asked for next, and how often before the tile of y ends
  const int* start = w.starts;  // what says where its overflow is,
  int2 starts[2];               // and where that is
  auto room = [&](int slot, int k) { return rooms + (slot * 2 + k) * Word::ROOM; };
  auto seek = [&]() INLINE {
    if (more == 0 && later.is_left()) {
      span = later.span() * SIDE + side, group = later.tile / token_tiles * HEIGHT + 2 * mine, more = later.stop - later.at;
      start = start_of(w, ROWS * group + lane / 4, span);
      later.leave();
    }
#pragma unroll
    for (int k = 0; k < 2; k++)
      starts[k] = Word::seek(start + k * ROWS * (spans + 1), more && ROWS * (group + k) < w.rows);
    start += ROWS * SIDE;  // to work that out each time takes as long as to read masked what has been written
  };
  auto ask = [&](int slot) INLINE {
    if (more) {
#pragma unroll
      for (int k = 0; k < 2; k++)
        Word::ask(room(slot, k), w, pieces, group + k, span, w.rows - ROWS * (group + k), starts[k]);
      span += SIDE, more--;
      seek();
    }
    commit_copies();
  };
  if (warp < WARPS) {
    if constexpr (TOKENS <= DIRECT) {
      const int first = now.tile / token_tiles * HEIGHT + 2 * mine, groups = (w.rows + ROWS - 1) / ROWS;
      for (int i = 0; i < EARLY && now.at + i < now.stop; i++)
        Word::prefetch_tile(w, first, now.span() + i, groups), Word::prefetch_tile(w, first + 1, now.span() + i, groups);
    } else {
      // W does not wait for what x waits for. Who has written W is done: `arrange`, launched between, has waited for that
      // before it let this kernel begin.
      seek();
      for (int slot = 0; slot < AHEAD; slot++) ask(slot);
    }
  }
  let_next_kernel_begin();
  if (PAIRS) write_selectors(table);
  if (threadIdx.x < STAGES) {
    start_barrier(full + 8 * threadIdx.x, TOKENS <= DIRECT ? TOKENS / 8 : 1);
    start_barrier(empty + 8 * threadIdx.x, WARPS);
  }
  publish_writes();
  __syncthreads();
  if constexpr (TOKENS <= DIRECT) {
    wait_for_kernel_before();
    if (warp >= WARPS) return bring_x<WINDOWS<SLOTS, OVERFLOW>, TOKENS, STAGES>(call, now, xs, full, empty);
    seek();
    for (int slot = 0; slot < AHEAD; slot++) ask(slot);
  }
  int filled = 0, filled_turn = 1;
  auto fill = [&]() INLINE {  // the next stage with the x of the next step, as `arrange` has it; one thread
    if (!next.is_left()) return;
    wait_barrier(empty + 8 * filled, filled_turn);
    const char* from = (const char*)call.x + ((i64)(next.tile % token_tiles) * steps + next.span()) * (SIDE * X);
    copy_many(xs + filled * SIDE * X, from, SIDE * X, full + 8 * filled);
    if (++filled == STAGES) filled = 0, filled_turn ^= 1;
    next.advance();
  };
  const bool fills = TOKENS > DIRECT && threadIdx.x == 0;
  if (fills) {
    wait_for_kernel_before();
    for (int i = 0; i < FILLED; i++) fill();
  }
  for (int stage = 0, turn = 0, slot = 0; now.is_left(); now.leave()) {
    float sum[TOKENS / 2] = {};
    const int here = now.tile / token_tiles * HEIGHT + 2 * mine;
    for (int left = now.stop - now.at; left; left--) {
      if (fills) fill();
      Word words[2];
      wait_copies<AHEAD - 1>();
      __syncwarp();
      words[0].take(room(slot, 0), pieces), words[1].take(room(slot, 1), pieces);
      __syncwarp();
      ask(slot);
      if (++slot == AHEAD) slot = 0;
      const int here_span = (now.stop - left - now.tile * steps) * SIDE + side;
      u32 a[SPAN / 16][4], counts[2][4];
      lay_out<PAIRS, 2>(counts, w, words, {here, here + 1}, here_span, {tiles, tiles + TILE});
#pragma unroll
      for (int i = 0; i < SPAN / 16; i++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const uint2 pairs = pairs_of<PAIRS>(words[k], counts[k], i, tiles + k * TILE + 4 * lane, table);
          a[i][k] = pairs.x, a[i][2 + k] = pairs.y;
        }
      wait_barrier(full + 8 * stage, turn);
      const u64 x = described(xs + (stage * SIDE + side) * X, BLOCK, TILE);
      begin_products();
#pragma unroll
      for (int i = 0; i < SPAN / 16; i++) multiply_rows<BF16, TOKENS>(sum, a[i], further(x, 2 * BLOCK * i));
      commit_products();
      wait_products();
      if (lane == 0) arrive(empty + 8 * stage);
      if (++stage == STAGES) stage = 0, turn ^= 1;
    }
    keep(sum);
    if constexpr (ACROSS) share_sums<BF16, GROUPS, TOKENS>(call, now.tile, sum, rooms, OWN);
    else finish_tile<BF16, GROUPS, TOKENS>(call, now, sum, warp / 4);
  }
}

// ---- expand

// A warp writes every n-th tile: by words to a tile in shared memory, row after row, from which lanes side by side write whole
// lines of W.
template <int SLOTS, bool OVERFLOW>
__global__ void __launch_bounds__(256) expand(const Call call) {
  SHARED(memory);
  typedef Words<SLOTS, OVERFLOW> Word;
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
  const int spans = (w.columns + SPAN - 1) / SPAN, groups = (w.rows + ROWS - 1) / ROWS, stride = gridDim.x * warps;
  const u32 tiles = (address(memory) + TILE - 1) / TILE * TILE, tile = tiles + warp * TILE;
  const u32 room = tiles + warps * TILE + warp * Word::ROOM;
  const typename Word::Pieces pieces(w, lane);
  const int group_stride = stride / spans, span_stride = stride % spans;  // to divide for each tile takes a fifth of the time
  int group = (blockIdx.x * warps + warp) / spans, span = (blockIdx.x * warps + warp) % spans;
  auto ask = [&]() INLINE {
    if (group < groups) Word::ask(room, w, pieces, group, span, w.rows - ROWS * group, Word::seek(w, group, span, true));
    commit_copies();
  };
  // 16 bytes of a row, of which it has 16 times so many: neighbours change places so that lanes have banks of their own when
  // they write their words, and when they read lines.
  auto place = [&](int row, int piece) { return tile + 16 * (16 * row + (piece ^ (piece >> 3 | row % 2 << 1))); };
  const int half = lane / 16, piece = lane % 16;  // which of two rows a lane writes, and what of it
  const u32 to = place(lane / 4, lane % 4 * 4), from = place(half, piece);
  let_next_kernel_begin();
  wait_for_kernel_before();
  ask();
  while (group < groups) {
    const int row = ROWS * group + half, column = SPAN * span + 8 * piece, here = group, here_span = span;
    Word words[1];
    wait_copies<0>();
    __syncwarp();
    words[0].take(room, pieces);
    __syncwarp();
    group += group_stride, span += span_stride;
    if (span >= spans) span -= spans, group++;
    ask();
    u32 counts[1][4], columns[16];  // the latter of a lane's word, in their order
    lay_out<false, 1>(counts, w, words, {here}, here_span, {tile});
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint2 pairs = pairs_of<false>(words[0], counts[0], i, tile + 4 * lane, 0);
      if constexpr (WINDOWS<SLOTS, OVERFLOW>) columns[2 * i] = pairs.x, columns[2 * i + 1] = pairs.y;
      else columns[i] = pairs.x, columns[8 + i] = pairs.y;
    }
    if constexpr (!WINDOWS<SLOTS, OVERFLOW>) in_order(columns);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++)
      store16(to ^ 16 * i, columns[4 * i], columns[4 * i + 1], columns[4 * i + 2], columns[4 * i + 3]);
    __syncwarp();
    uint4* y = (uint4*)(call.y + (i64)row * w.columns + column);
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++)
      if (row + 2 * i < w.rows && column < w.columns) y[i * (w.columns / 4)] = load16(from + 2 * i * 256);
  }
}
