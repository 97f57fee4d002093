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
//   stream          more tokens yet, on Hopper: some warps fill tiles, others multiply them, and all steps of the whole
//                   product are shared out evenly.
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
  // What follows is for `stream` only.
  int count;       // of flags
  int* flags;      // [blocks, GROUPS], cleared by `arrange`
  float* partial;  // [blocks, GROUPS, ...]
  int each, rest;  // steps of a block: the first `rest` blocks have one more
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

  // The word at these addresses, or nothing.
  __device__ __forceinline__ void load(const u32* mask, const u16* here, bool there) {
    bits = 0;
#pragma unroll
    for (int i = 0; i < SLOTS / 2; i++) values[i] = 0;
    if (there) {
      bits = load_once(mask);
      if (SLOTS % 8 == 0) {
#pragma unroll
        for (int i = 0; i < SLOTS / 8; i++) {
          const uint4 four = load_once((const uint4*)here + i);
          values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < SLOTS / 4; i++) {
          const uint2 two = load_once((const uint2*)here + i);
          values[2 * i] = two.x, values[2 * i + 1] = two.y;
        }
      }
    }
  }

  // Word `at` of a row; nothing beyond the ends.
  __device__ __forceinline__ void load(const Matrix& w, int row, int at) {
    const i64 index = (i64)row * (w.columns / 32) + at;
    load(w.mask + index, w.values + SLOTS * index, row < w.rows && at < w.columns / 32);
  }

  // Four words of each of eight rows, one for each lane of a warp, through shared memory: any number of them may be on
  // their way, where to wait for one load to a register is to wait for all. Lanes ask for whole rows together, for what
  // they ask for one by one comes in sectors of 32 bytes, the same ones again and again.
  static constexpr int PIECE = SLOTS % 8 ? 8 : 16, PIECES = 8 * SLOTS / PIECE, ROW = 8 * SLOTS + 16;  // bytes; of a row
  static constexpr int ROOM = 8 * ROW + 4 * LANES;
  static __device__ __forceinline__ void ask(u32 room, const Matrix& w, int row, int at, int lane) {
    const int words = w.columns / 32;
#pragma unroll
    for (int i = 0; i < PIECES / 4; i++) {
      const int r = (LANES * i + lane) / PIECES, piece = (LANES * i + lane) % PIECES;
      const u16* from = w.values + ((i64)(row + r) * words + at) * SLOTS + PIECE / 2 * piece;
      copy<PIECE>(room + ROW * r + PIECE * piece, from, row + r < w.rows && at + piece * 4 / PIECES < words);
    }
    const int r = row + lane / 4, mine = at + lane % 4;
    copy<4>(room + 8 * ROW + 4 * lane, w.mask + (i64)r * words + mine, r < w.rows && mine < words);
  }
  __device__ __forceinline__ void take(u32 room, int lane) {
    bits = load4(room + 8 * ROW + 4 * lane);
#pragma unroll
    for (int i = 0; i < PIECES / 4; i++) {
      const u32 at = room + lane / 4 * ROW + lane % 4 * 2 * SLOTS + PIECE * i;
      if constexpr (PIECE == 16) {
        const uint4 four = load16(at);
        values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
      } else {
        const uint2 two = load8(at);
        values[2 * i] = two.x, values[2 * i + 1] = two.y;
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

// x in shared memory as `gather` reads it: of 1,024 columns at a time, STEP_ROW numbers for each column of a word, one of
// each word. So a lane, whose words are the same of every step, reads from a bank of its own, whatever its columns are.
// They come backwards after a zero, so that -1, which stands for no bit, is safe. One token as fp32, more as 16 bits each.
constexpr int STEP_ROW = LANES, STAGED = 33 * STEP_ROW;  // numbers of a step

// Where column 31 - `zeros` of a word is.
__device__ __forceinline__ int place(int word, int zeros) {
  return word / STEP * STAGED + (zeros + 1) * STEP_ROW + word % STEP;
}

template <bool BF16, int TOKENS>
__device__ void spread_x(const Call& call, u32* staged) {
  constexpr int EACH = TOKENS == 4 ? 2 : 1;  // 32-bit numbers per column
  const int columns = call.w.columns, words = (columns / 32 + STEP - 1) / STEP * STEP;
  for (int i = threadIdx.x; i < words; i += blockDim.x)
#pragma unroll
    for (int j = 0; j < EACH; j++) staged[EACH * place(i, -1) + j] = 0;
  for (int i = threadIdx.x; i < 4 * words; i += blockDim.x) {  // the lanes of a warp write to different words
    const int word = i / (4 * LANES) * LANES + i % LANES, quarter = i / LANES % 4;
    if (word >= columns / 32) continue;
    u32 tokens[TOKENS][4];
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      const bool there = token < call.tokens;
      const uint4* from = (const uint4*)(call.x + (i64)token * columns) + 4 * word + quarter;
      const uint4 eight = there ? __ldg(from) : make_uint4(0, 0, 0, 0);
      tokens[token][0] = eight.x, tokens[token][1] = eight.y, tokens[token][2] = eight.z, tokens[token][3] = eight.w;
    }
    u32* to = staged + EACH * place(word, 31 - 8 * quarter);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (TOKENS == 1) {
        to[-j * STEP_ROW] = __float_as_uint(j % 2 ? high<BF16>(tokens[0][j / 2]) : low<BF16>(tokens[0][j / 2]));
      } else {
#pragma unroll
        for (int k = 0; k < EACH; k++)
          to[k - EACH * j * STEP_ROW] =
              permute(tokens[2 * k][j / 2], tokens[2 * k + 1][j / 2], j % 2 ? 0x7632 : 0x5410);
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
      const u32* x = staged + EACH * place(at, 0);
      now.walk([&](int i, int zeros) {
        const float value = i % 2 ? high<BF16>(now.values[i / 2]) : low<BF16>(now.values[i / 2]);
        add<BF16, TOKENS>(value, x + EACH * STEP_ROW * zeros, sum);
      });
    }
    now.walk_overflow(w, lane, [&](u32 entry) {
      const int column = entry >> 16;
      if (column < w.columns)
        add<BF16, TOKENS>(low<BF16>(entry), staged + EACH * place(column / 32, 31 - column % 32), sum);
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
    else if (token < call.tokens) copy<16>(at, call.x + (i64)token * call.w.columns + here);
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
  wait_for_kernel_before();
  let_next_kernel_begin();
  for (int i = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x; i < call.count;
       i += gridDim.x * gridDim.y * blockDim.x)
    call.flags[i] = 0;
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

// The work of a block: all spans of all tiles of y, one tile after the other, are cut into as many parts as there are
// blocks. A block takes the tiles of its part from the last to the first. So the last, of which it may have only a first
// piece, is done first, and who has the end of a tile finds the pieces that others have. Those are of blocks before it,
// which the GPU has begun before: no block waits for one that waits for room.
struct Part {
  int spans, from, tile, at, stop;  // in spans; `at` and `stop` in the tile's piece

  static __device__ __forceinline__ int begin(const Call& call, int block) {
    return block * call.each + min(block, call.rest);
  }
  static __device__ __forceinline__ int block_of(const Call& call, int step) {
    const int longer = call.rest * (call.each + 1);
    return step < longer ? step / (call.each + 1) : call.rest + (step - longer) / call.each;
  }
  __device__ __forceinline__ Part(const Call& call, int spans, int block) : spans(spans) {
    from = begin(call, block);
    stop = begin(call, block + 1);
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
};

// What a warpgroup, the `group`th of its block, does with its sums, 64 rows of W by TOKENS, of the tile that a part is at.
template <bool BF16, int GROUPS, int TOKENS>
__device__ __forceinline__ void finish_tile(const Call& call, const Part& now, float (&sum)[TOKENS / 2], int group) {
  constexpr int FOURS = TOKENS / 8, TOGETHER = TOKENS < 64 ? 64 / TOKENS : 1;  // pieces that are on their way at a time
  const Matrix& w = call.w;
  const int thread = threadIdx.x % 128, lane = thread % LANES, warp = thread / LANES, block = blockIdx.x;
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
    for (int other = first + thread; other < block; other += 128) wait_flag(call.flags + other * GROUPS + group);
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
  // Of each 8 rows and 8 tokens a lane has two tokens of a row; it writes two rows of a token.
  const int token_tiles = (call.tokens + TOKENS - 1) / TOKENS, tokens = now.tile % token_tiles * TOKENS + lane / 4;
  const int rows = (now.tile / token_tiles * GROUPS + group) * 64 + warp * 16;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int mine = rows + 8 * half + lane / 4, row = rows + 8 * half + lane % 4 * 2;
    const float bias = call.bias && mine < w.rows ? to_float<BF16>(call.bias[mine]) : 0.0f;
    u16* y = call.y + (i64)tokens * w.rows + row;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
      const float* both = sum + 4 * i + 2 * half;
      const u32 pair = transposed(rounded<BF16>(both[0] + bias) | (u32)rounded<BF16>(both[1] + bias) << 16);
      if (tokens + 8 * i < call.tokens) {
        if (row + 1 < w.rows && w.rows % 2 == 0) *(u32*)y = pair;
        else {
          if (row < w.rows) y[0] = pair;
          if (row + 1 < w.rows) y[1] = pair >> 16;
        }
      }
      y += 8 * (i64)w.rows;
    }
  }
}

// A block makes 64 * GROUPS columns of y for TOKENS tokens at a time.
template <bool BF16, int SLOTS, bool OVERFLOW, bool PAIRS, int GROUPS, int TOKENS>
__global__ void __launch_bounds__(384, TOKENS > 64 ? 1 : 2) stream(const Call call) {
  SHARED(memory);
  constexpr int EXPANDERS = 12 - 4 * GROUPS, WORDS = 8 * GROUPS / EXPANDERS;  // of each lane and step
  constexpr int ROWS = 64 * GROUPS, TILE = ROWS / 8 * BLOCKS, X = TOKENS / 8 * BLOCKS;
  constexpr int STAGES = TOKENS == 64 || TOKENS == 256 ? 2 : 3;  // as many as there is room for
  constexpr int AHEAD = WORDS == 1 ? 3 : 1;  // steps that a lane has asked for
  constexpr int EXTRA = OVERFLOW ? 4 : 0;    // and overflow, of the step that it is at
  typedef Words<SLOTS, false> Word;
  const Matrix& w = call.w;
  const int lane = threadIdx.x % LANES, warp = from_lane(threadIdx.x / LANES, 0);  // which the compiler sees is one
  const int spans = (w.columns + SPAN - 1) / SPAN, token_tiles = (call.tokens + TOKENS - 1) / TOKENS;
  const u32 tiles = (address(memory) + BLOCKS - 1) / BLOCKS * BLOCKS;  // so that `|` can add what is inside of blocks
  const u32 full = tiles + STAGES * (TILE + X), empty = full + 8 * STAGES, selectors = empty + 8 * STAGES;
  const u32 asked = selectors + 64;  // [AHEAD][word of the block's]
  Part now(call, spans, blockIdx.x), later = now;
  int stage = 0, turn = 0;

  // Warps that expand walk twice over the part's steps: one walk asks for words, the other, AHEAD steps behind, expands.
  const int mine = warp - 4 * GROUPS, part = lane % 4;
  int at, row_asked, more = 0;  // the words that are asked for next, and how often before the tile ends
  auto first_row = [&](const Part& part) { return part.tile / token_tiles * ROWS + 8 * mine; };
  auto room = [&](int slot, int i) { return asked + ((slot * EXPANDERS + mine) * WORDS + i) * Word::ROOM; };
  auto ask = [&](int slot) INLINE {
    if (more == 0 && later.is_left()) {
      at = 4 * later.span(), row_asked = first_row(later), more = later.stop - later.at;
      later.leave();
    }
    if (more) {
#pragma unroll
      for (int i = 0; i < WORDS; i++) Word::ask(room(slot, i), w, row_asked + 8 * EXPANDERS * i, at, lane);
      at += 4, more--;
    }
    commit_copies();
  };
  if (mine >= 0)  // before all else: W does not wait for what x waits for
    for (int slot = 0; slot < AHEAD; slot++) ask(slot);

  let_next_kernel_begin();
  if (PAIRS && threadIdx.x < 16) store4(selectors + 4 * threadIdx.x, pair_selectors(threadIdx.x));
  if (threadIdx.x < STAGES) {
    start_barrier(full + 8 * threadIdx.x, EXPANDERS + 1);  // and x
    start_barrier(empty + 8 * threadIdx.x, GROUPS);
  }
  publish_barriers();
  __syncthreads();

  if (mine >= 0) {
    const u32 minus_one = opaque(0xffffffff);  // what it multiplies is subtracted by units that have less to do
    int left = 0;                         // steps of the tile
    const char* x;                        // of the next step
    int overflow[WORDS], no_more[WORDS];  // of what is next in a row, and after the row
    auto enter = [&]() INLINE {
      left = now.stop - now.at;
      x = (const char*)call.x + ((i64)(now.tile % token_tiles) * spans + now.span()) * X;
      if constexpr (OVERFLOW) {
        const int words = w.columns / 32, steps = (words + STEP - 1) / STEP, step = now.span() / (STEP / 4);
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
          int before = 0;
          no_more[i] = 0;
          const int row = first_row(now) + 8 * EXPANDERS * i + lane / 4;
          if (row < w.rows) {
            const u32* mask = w.mask + (i64)row * words;
            const int* starts = w.starts + (i64)row * steps;
            for (int k = step * STEP + part; k < 4 * now.span(); k += 4) before += max(0, __popc(__ldg(mask + k)) - SLOTS);
            if (part == 0) before += __ldg(starts + step);
            no_more[i] = __ldg(starts + steps);
          }
          overflow[i] = add_up<4>(before);
        }
      }
    };
    auto expand = [&](Word (&words)[WORDS]) {
      const u32 tile = tiles + stage * (TILE + X), ready = full + 8 * stage;
      wait_barrier(empty + 8 * stage, turn ^ 1);
      if (mine == 0 && lane == 0) copy_many(tile + TILE, x, X, ready);
      x += X;
      u32 to[WORDS], extra[WORDS][EXTRA + 1];
      int count[WORDS], last[WORDS];
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
        to[i] = tile + (mine + EXPANDERS * i) * BLOCKS;
        if constexpr (!PAIRS) {
#pragma unroll
          for (int j = 0; j < 4; j++) store16(to[i] + 512 * j + 16 * lane, make_uint4(0, 0, 0, 0));
        }
        to[i] += 4 * lane;
        if constexpr (OVERFLOW) {  // the list has a row's words in order: the four lanes of a row divide it
          count[i] = max(0, __popc(words[i].bits) - SLOTS);
          const int upto = add_before<4>(count[i]) + count[i];
          last[i] = overflow[i] + upto - 1;
          overflow[i] += from_lane(upto, lane | 3);
          if (last[i] >= no_more[i]) count[i] = 0;  // a damaged mask
#pragma unroll
          for (int k = 0; k < EXTRA; k++) extra[i][k] = k < count[i] ? __ldg(w.overflow + last[i] - k) : 0;
        }
      }
      if constexpr (PAIRS) {
#pragma unroll
        for (int group = 0; group < 8; group++)
#pragma unroll
          for (int i = 0; i < WORDS; i++) {
            const u32 bits = group ? words[i].bits >> (4 * group - 2) : words[i].bits << 2;
            const u32 how = load4(selectors + (bits & 60)), value = words[i].values[group];
            store4(to[i] + 2 * BLOCK * group, permute(value, 0, how));
            store4(to[i] + 2 * BLOCK * group + BLOCK, permute(value, 0, how >> 16));
          }
      } else {
        __syncwarp();
        // If there is no bit left, only a damaged mask of a matrix without overflow gets a number here, a wrong one.
        auto put = [&](int i, u32 value) {
          const int column = highest_bit(words[i].bits);
          words[i].bits += minus_one * bit(column);
          if (!OVERFLOW || column >= 0) store2(to[i] | column * 66 & 0x782, value);
        };
#pragma unroll
        for (int n = SLOTS - 1; n >= 0; n--)
#pragma unroll
          for (int i = 0; i < WORDS; i++) put(i, n % 2 ? words[i].values[n / 2] >> 16 : words[i].values[n / 2]);
        if constexpr (OVERFLOW) {
#pragma unroll
          for (int k = 0; k < EXTRA; k++)
#pragma unroll
            for (int i = 0; i < WORDS; i++) put(i, extra[i][k]);
#pragma unroll
          for (int i = 0; i < WORDS; i++)
            for (int k = EXTRA; k < count[i]; k++) put(i, __ldg(w.overflow + last[i] - k));
        }
      }
      publish_stores();
      __syncwarp();
      if (lane == 0) arrive(ready);
      if (++stage == STAGES) stage = 0, turn ^= 1;
    };
    if (mine == 0) wait_for_kernel_before();
    for (int slot = 0; now.is_left(); now.leave()) {
      enter();
      for (; left; left--) {
        wait_copies<AHEAD - 1>();
        __syncwarp();
        Word words[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i].take(room(slot, i), lane);
        __syncwarp();
        ask(slot);
        expand(words);
        if (++slot == AHEAD) slot = 0;
      }
    }
  } else {
    const int group = warp / 4, thread = threadIdx.x % 128;
    wait_for_kernel_before();
    for (; now.is_left(); now.leave()) {
      float sum[TOKENS / 2] = {};
      int before = -1;  // the stage of the products that are not waited for yet
      for (int steps = now.stop - now.at; steps; steps--) {
        const u32 tile = tiles + stage * (TILE + X);
        wait_barrier(full + 8 * stage, turn);
        begin_products();
        const u64 a = described(tile + group * 8 * BLOCKS, BLOCK, BLOCKS), b = described(tile + TILE, BLOCK, BLOCKS);
#pragma unroll
        for (int j = 0; j < SPAN / 16; j++)
          multiply_tile<BF16, TOKENS>(sum, further(a, 2 * BLOCK * j), further(b, 2 * BLOCK * j));
        commit_products();
        wait_products<1>();
        if (before >= 0 && thread == 0) arrive(empty + 8 * before);
        before = stage;
        if (++stage == STAGES) stage = 0, turn ^= 1;
      }
      wait_products<0>();
      keep(sum);
      if (thread == 0) arrive(empty + 8 * before);
      finish_tile<BF16, GROUPS, TOKENS>(call, now, sum, group);
    }
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
