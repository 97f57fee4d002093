// y = x W^T for few tokens, straight from a compressed W: kept values in column order, and one bit per weight.
//
// Decoding waits for memory, and W has about 0.56 of its dense bytes: what keeps up with memory is free, and that is
// some twenty instructions for each kept weight. A mask word stands for 32 columns of a row. Its highest bit is the
// column of its last value; take both away, and the same holds for what is left. That walk brings values and columns
// together, in one of two ways; 2:4 needs no walk:
//
//   gather          1 to 4 tokens. A lane holds a word and its values, and reads x at the columns it meets.
//   multiply        more tokens. The values are written to their columns in a tile of shared memory that is then dense,
//                   and tensor cores multiply.
//   multiply_pairs  2:4, more tokens. Two values in four columns have six arrangements: byte permutes from a table.
//   expand          writes the dense W.
//
// The layout is that of formats/slots.py: SLOTS values per word, the last ones of the word, after zeros if it has
// fewer. What a word has more goes to a list: OVERFLOW. For 4:8, 8:16 and the like that is the disk format, for nothing
// is left over. Whatever bits and columns a damaged W holds, kernels touch no memory but its own; `starts` are made by
// this package, and trusted.

#include <device.cuh>

struct Matrix {
  const u16* values;    // [rows, columns / 32, SLOTS]
  const u32* mask;      // [rows, columns / 32]
  const u32* overflow;  // column << 16 | value, by row and column; their value bits are those that its word has too many
  const int* starts;    // [rows * steps + 1]: where the overflow of each 1,024 columns of a row begins
  int rows, columns;
};

struct Call {
  Matrix w;
  const u16* x;     // [tokens, columns]
  const u16* bias;  // [rows] or null
  u16* y;           // [tokens, rows]; `expand`: the dense W
  int tokens;
};

constexpr int STEP = 32;  // words, one per lane: 1,024 columns that a warp takes at a time

// ---- a word of each lane, and the overflow of all of them

template <int SLOTS, bool OVERFLOW>
struct Words {
  u32 bits;
  u32 values[SLOTS / 2];
  int begin, count;  // overflow of the step
  u32 extra[2];      // the first two of a lane: there are rarely more than 64 in a step
  int ahead[2];      // where the overflow of the step after begins and ends

  // Asks where the overflow of a step is: `fetch` of that step comes next, and must not wait for it.
  __device__ __forceinline__ void seek(const Matrix& w, int row, int step) {
    if constexpr (OVERFLOW) {
      const int steps = (w.columns / 32 + STEP - 1) / STEP;
      ahead[0] = ahead[1] = 0;
      if (row >= w.rows || step >= steps) return;
      ahead[0] = __ldg(w.starts + (i64)row * steps + step);
      ahead[1] = __ldg(w.starts + (i64)row * steps + step + 1);
    }
  }

  // Word `at` of a row; nothing beyond the ends.
  __device__ __forceinline__ void load(const Matrix& w, int row, int at) {
    const int words = w.columns / 32;
    bits = 0;
#pragma unroll
    for (int i = 0; i < SLOTS / 2; i++) values[i] = 0;
    if (row < w.rows && at < words) {
      const i64 index = (i64)row * words + at;
      bits = load_once(w.mask + index);
      if (SLOTS % 8 == 0) {
#pragma unroll
        for (int i = 0; i < SLOTS / 8; i++) {
          const uint4 four = load_once((const uint4*)(w.values + SLOTS * index) + i);
          values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < SLOTS / 4; i++) {
          const uint2 two = load_once((const uint2*)(w.values + SLOTS * index) + i);
          values[2 * i] = two.x, values[2 * i + 1] = two.y;
        }
      }
    }
  }

  // This lane's word of a step, and what falls to it of the step's overflow.
  __device__ __forceinline__ void fetch(const Matrix& w, int row, int step, int lane) {
    load(w, row, step * STEP + lane);
    if constexpr (OVERFLOW) {
      begin = ahead[0], count = ahead[1] - begin;
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (lane + LANES * i < count) extra[i] = load_once(w.overflow + begin + lane + LANES * i);
    }
  }

  template <class F>  // f(index of a value, zeros above its column's bit), and -1 with the index of a zero
  __device__ __forceinline__ void walk(F f) const {
    u32 left = bits;
#pragma unroll
    for (int i = SLOTS - 1; i >= 0; i--) {
      const int zeros = leading_zeros(left);
      left ^= bit_after(zeros);
      f(i, zeros);
    }
  }

  template <class F>  // f(entry) for the overflow that falls to this lane
  __device__ __forceinline__ void walk_overflow(const Matrix& w, int lane, F f) const {
    if constexpr (OVERFLOW) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (lane + LANES * i < count) f(extra[i]);
      for (int i = lane + 2 * LANES; i < count; i += LANES) f(load_once(w.overflow + begin + i));
    }
  }
};

// ---- gather

// x in shared memory as `gather` reads it: a word's 32 columns backwards after a zero, so that -1, which stands for no
// bit, is safe, and lanes that read the same column of their words read from different banks. One token as fp32, more
// as 16 bits each.
template <bool BF16, int TOKENS>
__device__ void spread_x(const Call& call, u32* staged) {
  constexpr int EACH = TOKENS == 4 ? 2 : 1;  // 32-bit numbers per column
  const int columns = call.w.columns;
  for (int i = threadIdx.x; i < columns / 32; i += blockDim.x)
#pragma unroll
    for (int j = 0; j < EACH; j++) staged[33 * EACH * i + j] = 0;
  for (int i = threadIdx.x; i < columns / 8; i += blockDim.x) {
    u32 tokens[TOKENS][4];
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      const bool there = token < call.tokens;
      const uint4 eight = there ? __ldg((const uint4*)(call.x + (i64)token * columns) + i) : make_uint4(0, 0, 0, 0);
      tokens[token][0] = eight.x, tokens[token][1] = eight.y, tokens[token][2] = eight.z, tokens[token][3] = eight.w;
    }
    u32* to = staged + EACH * (33 * (i / 4) + 32 - i % 4 * 8);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (TOKENS == 1) {
        to[-j] = __float_as_uint(j % 2 ? high<BF16>(tokens[0][j / 2]) : low<BF16>(tokens[0][j / 2]));
      } else {
#pragma unroll
        for (int k = 0; k < EACH; k++)
          to[k - EACH * j] = permute(tokens[2 * k][j / 2], tokens[2 * k + 1][j / 2], j % 2 ? 0x7632 : 0x5410);
      }
    }
  }
}

// Adds value * x at `here`, one column as spread_x writes it.
template <bool BF16, int TOKENS>
__device__ __forceinline__ void add(float value, const u32* here, float* sum) {
  if (TOKENS == 1) {
    sum[0] += value * __uint_as_float(here[0]);
  } else if (TOKENS == 2) {
    sum[0] += value * low<BF16>(here[0]);
    sum[1] += value * high<BF16>(here[0]);
  } else {
    const uint2 pairs = *(const uint2*)here;
    sum[0] += value * low<BF16>(pairs.x);
    sum[1] += value * high<BF16>(pairs.x);
    sum[2] += value * low<BF16>(pairs.y);
    sum[3] += value * high<BF16>(pairs.y);
  }
}

// A warp takes every n-th row, a step at a time; the next step is on its way meanwhile.
template <bool BF16, int TOKENS, int SLOTS, bool OVERFLOW>
__global__ void __launch_bounds__(512) gather(const Call call) {
  SHARED(memory);
  constexpr int EACH = TOKENS == 4 ? 2 : 1;
  u32* staged = (u32*)memory;
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warps = gridDim.x * (blockDim.x / LANES);
  const int words = w.columns / 32, steps = (words + STEP - 1) / STEP;
  int row = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES, step = 0;
  Words<SLOTS, OVERFLOW> next;
  auto fetch = [&] {
    next.fetch(w, row, step, lane);
    if (step + 1 < steps) next.seek(w, row, step + 1);
    else next.seek(w, row + warps, 0);
  };
  next.seek(w, row, step);
  fetch();  // before x is staged: the first weights take longest
  spread_x<BF16, TOKENS>(call, staged);
  __syncthreads();

  float sum[TOKENS] = {};
  while (row < w.rows) {
    const Words<SLOTS, OVERFLOW> now = next;
    const int here = row, at = step * STEP + lane;
    if (++step == steps) step = 0, row += warps;
    fetch();

    if (at < words) {
      const u32* x = staged + EACH * (33 * at + 1);
      now.walk([&](int i, int zeros) {
        add<BF16, TOKENS>(i % 2 ? high<BF16>(now.values[i / 2]) : low<BF16>(now.values[i / 2]), x + EACH * zeros, sum);
      });
    }
    now.walk_overflow(w, lane, [&](u32 entry) {
      const int column = entry >> 16;
      if (column < w.columns)
        add<BF16, TOKENS>(low<BF16>(entry), staged + EACH * (33 * (column / 32) + 32 - column % 32), sum);
    });
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

// ---- tensor cores

constexpr int WARPS = 8;  // of a block, which share out the columns: 128 for each at a time

// A lane's number is 4 r + q. Of the 128 columns that its warp multiplies at a time it has word q: of rows r and r + 8 of W
// and of token r. Sums do not care in which order columns come, so long as it is the same order for both.

// The sums of all warps meet in shared memory, [warp][token][row].
template <bool BF16, int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ void finish(const Call& call, float (&sum)[ROW_TILES][TOKEN_TILES][4], float* sums) {
  constexpr int ROWS = 16 * ROW_TILES, SUMS = 8 * TOKEN_TILES * ROWS;
  const int warp = threadIdx.x / LANES, r = threadIdx.x % LANES / 4, token = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int k = 0; k < TOKEN_TILES; k++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        sums[warp * SUMS + (8 * k + token + j % 2) * ROWS + 16 * i + r + j / 2 * 8] = sum[i][k][j];
  __syncthreads();
  for (int i = threadIdx.x; i < SUMS; i += WARPS * LANES) {
    const int row = blockIdx.x * ROWS + i % ROWS, token = blockIdx.y * 8 * TOKEN_TILES + i / ROWS;
    if (row >= call.w.rows || token >= call.tokens) continue;
    float total = call.bias ? to_float<BF16>(call.bias[row]) : 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; part++) total += sums[part * SUMS + i];
    call.y[(i64)token * call.w.rows + row] = rounded<BF16>(total);
  }
}

constexpr int X_ROW = 256 + 64;  // bytes of a token's 128 columns, and a gap that spreads tokens over banks

// A warp starts to copy 128 columns of 8 * TOKEN_TILES tokens to shared memory; zeros beyond the last column. Pieces of 16
// bytes change places within a word, so that the lanes of a token read from different banks.
template <int TOKEN_TILES>
__device__ __forceinline__ void stage_x(const Call& call, int first_token, int column, u32 to, int lane) {
  const int piece = lane % 16, word = piece / 4, here = column + 8 * piece;
#pragma unroll
  for (int i = 0; i < 4 * TOKEN_TILES; i++) {
    const int row = 2 * i + lane / 16, token = first_token + row;
    const u32 at = to + row * X_ROW + word * 64 + (piece % 4 ^ word) * 16;
    if (here >= call.w.columns) store16(at, make_uint4(0, 0, 0, 0));
    else if (token < call.tokens) copy16(at, call.x + (i64)token * call.w.columns + here);
  }
  commit_copies();
}

// Adds columns 8 j to 8 j + 7 of the lane's words to the sums of all tokens. a: [tile][row r, r + 8][columns 8 j and
// 8 j + 1, ...].
template <bool BF16, int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ void add_columns(float (&sum)[ROW_TILES][TOKEN_TILES][4], const u32 (&a)[ROW_TILES][2][4],
                                            u32 x, int j, int r, int q) {
#pragma unroll
  for (int k = 0; k < TOKEN_TILES; k++) {
    const uint4 b = load16(x + (8 * k + r) * X_ROW + q * 64 + (j ^ q) * 16);
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
      mma<BF16>(sum[i][k], a[i][0][0], a[i][1][0], a[i][0][1], a[i][1][1], b.x, b.y);
      mma<BF16>(sum[i][k], a[i][0][2], a[i][1][2], a[i][0][3], a[i][1][3], b.z, b.w);
    }
  }
}

// ---- multiply

// How a warp's 1,024 columns of a row lie in shared memory once they are dense.
struct Banks {  // every word in a bank of its own, two columns above each other: no walk gets into another's way
  static constexpr int ROW = 64 * STEP + 16;  // bytes, and the gap that keeps rows off each other's banks
  static __device__ __forceinline__ u32 at(u32 row, int word, int zeros) {
    return row + 4 * word + 31 * 64 - 62 - 64 * zeros + 62 * (zeros & 1);
  }
  static __device__ __forceinline__ void clear(u32 row, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) store16(row + 512 * i + 16 * lane, make_uint4(0, 0, 0, 0));
    __syncwarp();
  }
};
struct Strips {  // in order, with a gap after every word
  static constexpr int WORD = 72, ROW = WORD * STEP;
  static __device__ __forceinline__ u32 at(u32 row, int word, int zeros) { return row + WORD * word + 62 - 2 * zeros; }
  static __device__ __forceinline__ void clear(u32 row, int lane) {
#pragma unroll
    for (int i = 0; i < 8; i++) store8(row + WORD * lane + 8 * i, 0, 0);
  }
};

// A warp writes its words to a row of a tile, dense.
template <class Layout, int SLOTS, bool OVERFLOW>
__device__ __forceinline__ void write(const Words<SLOTS, OVERFLOW>& words, const Matrix& w, int step, u32 row, int lane) {
  Layout::clear(row, lane);
  words.walk([&](int i, int zeros) {
    if (zeros >= 0) store2(Layout::at(row, lane, zeros), i % 2 ? words.values[i / 2] >> 16 : words.values[i / 2]);
  });
  if (!OVERFLOW) return;
  __syncwarp();
  words.walk_overflow(w, lane, [&](u32 entry) {
    const u32 column = (entry >> 16) - 32 * STEP * step;
    if (column < 32 * STEP) store2(Layout::at(row, column / 32, 31 - column % 32), entry);
  });
}

// A block makes 16 * ROW_TILES columns of y for 8 * TOKEN_TILES tokens: its warps write a tile of 1,024 columns, each 2 *
// ROW_TILES rows of it, and multiply it, each 128 columns of it.
template <bool BF16, int SLOTS, bool OVERFLOW, int ROW_TILES, int TOKEN_TILES>
__global__ void __launch_bounds__(WARPS * LANES, ROW_TILES * TOKEN_TILES == 1 ? 3 : 1) multiply(const Call call) {
  SHARED(memory);
  constexpr int MINE = 2 * ROW_TILES, TILE = 16 * Banks::ROW;
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, q = lane % 4;
  const int words = w.columns / 32, steps = (words + STEP - 1) / STEP;
  const int first = blockIdx.x * 16 * ROW_TILES + warp, first_token = blockIdx.y * 8 * TOKEN_TILES;
  const u32 tiles = address(memory), mine = tiles + r * Banks::ROW + 4 * (4 * warp + q);
  const u32 x = tiles + ROW_TILES * TILE + warp * 8 * TOKEN_TILES * X_ROW;

  Words<SLOTS, OVERFLOW> rows[MINE];
  auto fetch = [&](int i, int step) {
    rows[i].fetch(w, first + WARPS * i, step, lane);
    rows[i].seek(w, first + WARPS * i, step + 1);
  };
#pragma unroll
  for (int i = 0; i < MINE; i++) rows[i].seek(w, first + WARPS * i, 0);
#pragma unroll
  for (int i = 0; i < MINE; i++) fetch(i, 0);
  float sum[ROW_TILES][TOKEN_TILES][4] = {};
  for (int step = 0; step < steps; step++) {
    const bool busy = step * STEP + 4 * warp < words;
    if (busy) stage_x<TOKEN_TILES>(call, first_token, 32 * (step * STEP + 4 * warp), x, lane);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      write<Banks>(rows[i], w, step, tiles + (warp + WARPS * i) * Banks::ROW, lane);
      if (step + 1 < steps) fetch(i, step + 1);
    }
    wait_copies<0>();
    __syncthreads();
    if (busy) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 a[ROW_TILES][2][4];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
          for (int n = 0; n < 8; n++)
            a[i][n / 4][n % 4] = load4(mine + i * TILE + n / 4 * 8 * Banks::ROW + (4 * j + n % 4) * 128);
        add_columns<BF16>(sum, a, x, j, r, q);
      }
    }
    __syncthreads();
  }
  finish<BF16, ROW_TILES, TOKEN_TILES>(call, sum, (float*)memory);
}

// ---- multiply_pairs

// The bits of a group of 2:4 to selectors of `permute`, which bring its two values to their columns: for the first two
// columns, and in the high half for the other two.
__device__ __forceinline__ u32 pair_selectors(u32 bits) {
  const u32 first = bits & 3, rest = bits >> 2 & 3;
  const u32 one = first == 0 ? 0x4444 : first == 1 ? 0x4410 : first == 2 ? 0x1044 : 0x3210;
  const u32 two = rest == 0 ? 0x4444 : rest == 1 ? 0x4432 : rest == 2 ? 0x3244 : 0x3210;
  return one | two << 16;
}

// As `multiply`, but every lane makes what it multiplies itself.
template <bool BF16, int ROW_TILES, int TOKEN_TILES>
__global__ void __launch_bounds__(WARPS * LANES) multiply_pairs(const Call call) {
  SHARED(memory);
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, r = lane / 4, q = lane % 4;
  const int words = w.columns / 32, first_token = blockIdx.y * 8 * TOKEN_TILES;
  u32* selectors = (u32*)memory;
  constexpr int X = 8 * TOKEN_TILES * X_ROW;
  const u32 staged = address(memory) + 64 + warp * 2 * X;
  if (threadIdx.x < 16) selectors[threadIdx.x] = pair_selectors(threadIdx.x);

  typedef Words<16, false> Word;
  Word next[ROW_TILES][2];  // [tile][row r, r + 8]
  auto fetch = [&](int span) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++)
      next[i / 2][i % 2].load(w, blockIdx.x * 16 * ROW_TILES + 8 * i + r, 4 * span + q);
  };
  fetch(warp);
  stage_x<TOKEN_TILES>(call, first_token, 128 * warp, staged, lane);
  __syncthreads();
  float sum[ROW_TILES][TOKEN_TILES][4] = {};
  for (int span = warp; 4 * span < words; span += WARPS) {
    const u32 x = staged + span / WARPS % 2 * X;
    Word now[ROW_TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) now[i / 2][i % 2] = next[i / 2][i % 2];
    fetch(span + WARPS);
    __syncwarp();  // all lanes are done with the half that is written next
    stage_x<TOKEN_TILES>(call, first_token, 128 * (span + WARPS), staged + (span / WARPS + 1) % 2 * X, lane);
    wait_copies<1>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; j++) {  // 8 columns: two groups
      u32 a[ROW_TILES][2][4];
#pragma unroll
      for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const Word& word = now[i][half];
#pragma unroll
          for (int group = 0; group < 2; group++) {
            const u32 value = word.values[2 * j + group], how = selectors[word.bits >> (8 * j + 4 * group) & 15];
            a[i][half][2 * group] = permute(value, 0, how);
            a[i][half][2 * group + 1] = permute(value, 0, how >> 16);
          }
        }
      add_columns<BF16>(sum, a, x, j, r, q);
    }
  }
  wait_copies<0>();
  __syncthreads();
  finish<BF16, ROW_TILES, TOKEN_TILES>(call, sum, (float*)memory);
}

// ---- stream: Hopper

// Warpgroups of 64 rows multiply what other warps expand meanwhile. wgmma takes both operands from shared memory, in
// blocks of 8 rows (of W; or tokens) and 8 columns: a lane that owns the same four bytes of each block owns a bank, and so
// no walk gets into another's way. Word p of 128 columns has its columns 2 t and 2 t + 1 in block t, at 2 p and 2 p + 1;
// `arrange` brings x into the same order, tile by tile.

constexpr int SPAN = 128;           // columns of a step
constexpr int BLOCK = 128;          // bytes
constexpr int BLOCKS = 16 * BLOCK;  // of 8 rows of a span

// x [tokens, columns] -> [tile of TOKENS][span][8 tokens][block], zeros beyond both ends. A warp takes 8 tokens of a span.
template <int TOKENS>
__global__ void arrange(const Call call) {
  const int lane = threadIdx.x % LANES, spans = (call.w.columns + SPAN - 1) / SPAN;
  const int group = blockIdx.y, span = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
  const int token = 8 * group + lane / 4, column = SPAN * span + lane % 4 * 32;
  if (span >= spans) return;
  uint4 x[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    x[i] = token < call.tokens && column < call.w.columns
               ? __ldg((const uint4*)(call.x + (i64)token * call.w.columns + column) + i)
               : make_uint4(0, 0, 0, 0);
  constexpr int GROUPS = TOKENS / 8;
  u32* to = (u32*)call.y + (((i64)group / GROUPS * spans + span) * GROUPS + group % GROUPS) * (BLOCKS / 4) + lane;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[(4 * i + 0) * BLOCK / 4] = x[i].x;
    to[(4 * i + 1) * BLOCK / 4] = x[i].y;
    to[(4 * i + 2) * BLOCK / 4] = x[i].z;
    to[(4 * i + 3) * BLOCK / 4] = x[i].w;
  }
}

// What a row's words have too many, in column order: the four lanes of a row take turns.
template <bool OVERFLOW>
struct Extra {
  static constexpr int AHEAD = 3;  // of each lane
  const u32* entries;
  int at, end;
  u32 next[AHEAD];

  __device__ __forceinline__ void seek(const Matrix& w, int row, int column, int part) {
    if constexpr (OVERFLOW) {
      const int steps = (w.columns / 32 + STEP - 1) / STEP, step = column / (32 * STEP);
      entries = w.overflow, at = end = 0;
      int skip = 0;
      if (row < w.rows && step < steps) {
        const int* starts = w.starts + (i64)row * steps;
        at = __ldg(starts + step), end = __ldg(starts + steps);
        const int behind = __ldg(starts + step + 1);
#pragma unroll 8
        for (int i = at + part; i < behind; i += 4) skip += (int)(__ldg(entries + i) >> 16) < column;
      }
      at += add_up<4>(skip);
      fetch(part);
    }
  }
  __device__ __forceinline__ void fetch(int part) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      next[i] = at + 4 * i + part < end ? __ldg(entries + at + 4 * i + part) : 0xffff0000;
  }
  template <class F>  // f(entry) for the entries before column `stop`
  __device__ __forceinline__ void take(int stop, int part, F f) {
    if constexpr (OVERFLOW) {
      int taken, all = 0;
      do {
        taken = 0;
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
          if (at + 4 * i + part < end && (int)(next[i] >> 16) < stop) f(next[i]), taken++;
        all = add_up<4>(taken);
        at += all;
        fetch(part);
      } while (for_any(all == 4 * AHEAD));
    }
  }
};

// A block makes 64 * GROUPS columns of y for TOKENS tokens from the spans that fall to it; the blocks of a row of the grid,
// a cluster, share out the spans and add up.
template <bool BF16, int SLOTS, bool OVERFLOW, int GROUPS, int TOKENS, int SPLIT>
__global__ void CLUSTER(SPLIT) __launch_bounds__(384, TOKENS > 64 ? 1 : 2) stream(const Call call) {
  SHARED(memory);
  constexpr int EXPANDERS = 12 - 4 * GROUPS, WORDS = 8 * GROUPS / EXPANDERS;  // of each lane and step
  constexpr int STAGES = TOKENS > 128 ? 2 : 3, ROWS = 64 * GROUPS, TILE = ROWS / 8 * BLOCKS, X = TOKENS / 8 * BLOCKS;
  constexpr int AHEAD = WORDS == 1 ? 2 : 1;  // steps that a lane has asked for
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, rank = blockIdx.x;
  const int spans = (w.columns + SPAN - 1) / SPAN;
  const int first = spans * rank / SPLIT, count = spans * (rank + 1) / SPLIT - first;
  const u32 tiles = (address(memory) + BLOCKS - 1) / BLOCKS * BLOCKS;  // so that `|` can add what is inside of blocks
  const u32 full = tiles + STAGES * (TILE + X), empty = full + 8 * STAGES;
  if (threadIdx.x < STAGES) {
    start_barrier(full + 8 * threadIdx.x, EXPANDERS + 1);  // and x
    start_barrier(empty + 8 * threadIdx.x, GROUPS);
  }
  publish_barriers();
  __syncthreads();

  if (warp >= 4 * GROUPS) {
    const int mine = warp - 4 * GROUPS, part = lane % 4;
    typedef Words<SLOTS, false> Word;
    Word next[AHEAD][WORDS];
    Extra<OVERFLOW> extra[WORDS];
    auto row = [&](int i) { return blockIdx.z * ROWS + 8 * (mine + EXPANDERS * i) + lane / 4; };
    auto load = [&](Word& word, int i, int step) {
      word.load(w, row(i), step < count ? 4 * (first + step) + part : w.columns / 32);
    };
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
#pragma unroll
      for (int j = 0; j < AHEAD; j++) load(next[j][i], i, j);
      extra[i].seek(w, row(i), SPAN * first, part);
    }
    const char* x = (const char*)call.x + ((i64)blockIdx.y * spans + first) * X;
    for (int step = 0, stage = 0, turn = 1; step < count; step++) {
      const u32 tile = tiles + stage * (TILE + X), ready = full + 8 * stage;
      wait_barrier(empty + 8 * stage, turn);
      if (mine == 0 && lane == 0) copy_many(tile + TILE, x + (i64)step * X, X, ready);
      Word now[WORDS];
      u32 to[WORDS];
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
        now[i] = next[0][i];
        if constexpr (AHEAD == 2) next[0][i] = next[1][i];
        load(next[AHEAD - 1][i], i, step + AHEAD);
        to[i] = tile + (mine + EXPANDERS * i) * BLOCKS;
#pragma unroll
        for (int j = 0; j < 4; j++) store16(to[i] + 512 * j + 16 * lane, make_uint4(0, 0, 0, 0));
        to[i] += 4 * lane;
      }
      __syncwarp();
#pragma unroll
      for (int n = SLOTS - 1; n >= 0; n--)
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
          const int column = highest_bit(now[i].bits);
          now[i].bits ^= bit(column);
          if (!OVERFLOW || column >= 0)  // else only a damaged mask has no bit here: it gets a wrong number
            store2(to[i] | column * 66 & 0x782, n % 2 ? now[i].values[n / 2] >> 16 : now[i].values[n / 2]);
        }
      if constexpr (OVERFLOW) {
        __syncwarp();
        const int begin = SPAN * (first + step);
#pragma unroll
        for (int i = 0; i < WORDS; i++)
          extra[i].take(begin + SPAN, part, [&](u32 entry) {
            const u32 column = (entry >> 16) - begin;
            if (column < SPAN)
              store2(to[i] - 4 * part + column / 32 * 4 + column % 32 / 2 * BLOCK + column % 2 * 2, entry);
          });
      }
      publish_stores();
      __syncwarp();
      if (lane == 0) arrive(ready);
      if (++stage == STAGES) stage = 0, turn ^= 1;
    }
  } else {
    float sum[TOKENS / 2] = {};
    const int group = warp / 4;
    for (int step = 0, stage = 0, turn = 0; step < count; step++) {
      const u32 tile = tiles + stage * (TILE + X);
      wait_barrier(full + 8 * stage, turn);
      begin_products();
#pragma unroll
      for (int j = 0; j < SPAN / 16; j++)
        multiply_tile<BF16, TOKENS>(sum, tile + group * 8 * BLOCKS + 2 * BLOCK * j, tile + TILE + 2 * BLOCK * j, BLOCK,
                                    BLOCKS);
      commit_products();
      wait_products(sum);
      if (threadIdx.x % 128 == 0) arrive(empty + 8 * stage);
      if (++stage == STAGES) stage = 0, turn ^= 1;
    }

    // The sums of all blocks of the cluster, each in shared memory as [token][row]; every block adds some tokens up.
    constexpr int PITCH = ROWS + 4;
    wait_for_threads(128 * GROUPS);
    const int r = warp * 16 + lane / 4, q = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++)
      store4(tiles + 4 * ((i / 4 * 8 + q + i % 2) * PITCH + r + i % 4 / 2 * 8), __float_as_uint(sum[i]));
    if constexpr (SPLIT > 1) wait_for_cluster();
    else wait_for_threads(128 * GROUPS);
    const int at = threadIdx.x % ROWS, here = blockIdx.z * ROWS + at;
    const int tokens = min(TOKENS, call.tokens - (int)blockIdx.y * TOKENS);
    const float bias = call.bias && here < w.rows ? to_float<BF16>(call.bias[here]) : 0.0f;
    for (int token = threadIdx.x / ROWS * SPLIT + rank; token < tokens; token += 2 * SPLIT) {
      float total = bias;
#pragma unroll
      for (int peer = 0; peer < SPLIT; peer++) total += load_of<SPLIT>(peer, tiles + 4 * (token * PITCH + at));
      if (here < w.rows) call.y[((i64)blockIdx.y * TOKENS + token) * w.rows + here] = rounded<BF16>(total);
    }
    if constexpr (SPLIT > 1) wait_for_cluster();  // shared memory goes with its block
  }
}

// ---- expand

// A warp writes every n-th step.
template <int SLOTS, bool OVERFLOW>
__global__ void __launch_bounds__(WARPS * LANES) expand(const Call call) {
  SHARED(memory);
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, steps = (w.columns / 32 + STEP - 1) / STEP;
  const u32 tile = address(memory) + warp * Strips::ROW;
  const int total = w.rows * steps, stride = gridDim.x * WARPS;
  int i = blockIdx.x * WARPS + warp;
  Words<SLOTS, OVERFLOW> next;
  next.seek(w, i / steps, i % steps);
  next.fetch(w, i / steps, i % steps, lane);
  for (; i < total; i += stride) {
    const int row = i / steps, step = i % steps, begin = 32 * STEP * step, columns = min(32 * STEP, w.columns - begin);
    next.seek(w, (i + stride) / steps, (i + stride) % steps);
    write<Strips>(next, w, step, tile, lane);
    next.fetch(w, (i + stride) / steps, (i + stride) % steps, lane);
    __syncwarp();
    uint2* to = (uint2*)(call.y + (i64)row * w.columns + begin);
    for (int j = lane; j < columns / 4; j += LANES) to[j] = load8(tile + j / 8 * Strips::WORD + j % 8 * 8);
    __syncwarp();
  }
}
