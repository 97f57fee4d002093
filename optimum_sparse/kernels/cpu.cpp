// y = x W^T + b for a few rows x, straight from the disk format of W: kept values in column order, one bit per weight.
//
// Decoding on a CPU waits for memory, and this reads 0.56 of the bytes of a dense 16-bit matrix at 50 %. Rows of W
// are expanded in registers, 64 columns at a time, and multiplied with all rows of x at once:
//
//   avx512   vpexpandw puts values where the mask has bits; bf16 multiplies in pairs (vdpbf16ps) where that exists
//   avx2     eight columns at a time; a byte of the mask selects a shuffle from a table
//   portable one bit after the other
//
// A plain C interface without Python or PyTorch headers: built with the package in seconds, loaded by ctypes. OpenMP is
// PyTorch's own (see cpu.py), so that its threads and their number are shared.

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86 1
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,fma,f16c,popcnt")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,popcnt")))
#endif

namespace {

static_assert(std::endian::native == std::endian::little, "bit c of a mask's words is column c");

enum Level { PORTABLE, VIA_AVX2, VIA_AVX512, VIA_AVX512_BF16 };

constexpr int STEP = 64;       // columns of one mask word
constexpr int SLACK = 40;      // values that a vector load may read past those it needs, and 7 for bits past the last column
constexpr int AHEAD = 8192;    // bytes to prefetch ahead: over the page, where the hardware stops by itself
constexpr int MOST = 8;        // rows of x at once

// ---- types: stored as, and as float

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float to_float(Float16 x) {  // subnormals included: the exponent is moved by a multiplication
  const float magnitude = from_bits(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t infinite = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
  return from_bits(to_bits(magnitude) | infinite | uint32_t(x.bits & 0x8000) << 16);
}

inline void store(float x, float* to) { *to = x; }
inline void store(float x, BFloat16* to) {
  const uint32_t bits = to_bits(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void store(float x, Float16* to) {
  const uint16_t sign = to_bits(x) >> 16 & 0x8000;
  uint32_t bits = to_bits(x) & 0x7fffffff;
  if (bits > 0x7f800000) to->bits = sign | 0x7e00;
  else if (bits >= 0x477ff000) to->bits = sign | 0x7c00;  // rounds past the largest
  else if (bits < 0x38800000) to->bits = sign | uint16_t(to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f));  // subnormal
  else to->bits = sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline uint64_t first_bits(int64_t count) { return count < 64 ? (uint64_t(1) << count) - 1 : ~uint64_t(0); }
inline uint64_t word(const uint8_t* mask, int64_t bytes) {
  uint64_t bits = 0;
  if (bytes >= 8) std::memcpy(&bits, mask, 8);
  else std::memcpy(&bits, mask, bytes);
  return bits;
}

// ---- R rows of W [columns] times M rows of x [M, stride], which is 0 beyond `columns`; sums go to out [M][R]

// x is loaded from the cache half as often with two, and memory is read best in one stream.
constexpr int rows_at_once(int tokens) { return tokens > 1 ? 2 : 1; }

template <class T, int R>
struct Rows {
  const T* values[R];
  const uint8_t* mask[R];
  int64_t bytes;     // of a mask
  uint64_t last[R];  // its last word, of fewer bytes: to read these is a call, which loops go round

  uint64_t word_at(int r, int64_t byte) const {
    if (byte + 8 > bytes) return last[r];
    uint64_t bits;
    std::memcpy(&bits, mask[r] + byte, 8);
    return bits;
  }
};

template <class T, int M, int R>
void dot_portable(Rows<T, R> w, const float* x, int64_t stride, float (*out)[R]) {
  for (int r = 0; r < R; r++) {
    float sum[M] = {};
    for (int64_t byte = 0; byte < w.bytes; byte += 8)
      for (uint64_t bits = w.word_at(r, byte); bits; bits &= bits - 1) {
        const float value = to_float(*w.values[r]++);
        for (int m = 0; m < M; m++) sum[m] += value * x[m * stride + 8 * byte + std::countr_zero(bits)];
      }
    for (int m = 0; m < M; m++) out[m][r] = sum[m];
  }
}

#ifdef X86

struct Shuffles {  // for each byte of a mask: where its columns' values are among the next eight, as 16- and 32-bit lanes
  alignas(16) uint8_t halves[256][16];
  alignas(32) int32_t words[256][8];
  alignas(16) uint8_t columns[256][16] = {};  // and the other way: which columns the next values are from, as 16-bit lanes
  Shuffles() {
    for (int byte = 0; byte < 256; byte++)
      for (int column = 0, next = 0; column < 8; column++) {
        const bool kept = byte >> column & 1;
        halves[byte][2 * column] = kept ? 2 * next : 0x80;  // 0x80: a zero
        halves[byte][2 * column + 1] = kept ? 2 * next + 1 : 0x80;
        words[byte][column] = kept ? next : -1;
        if (kept) columns[byte][2 * next] = 2 * column, columns[byte][2 * next + 1] = 2 * column + 1;
        next += kept;
      }
  }
};
const Shuffles shuffles;

AVX2 inline __m256 expand8(const float* values, int byte) {
  const __m256i order = _mm256_load_si256((const __m256i*)shuffles.words[byte]);
  const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), order);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(order, 31)), found);
}
AVX2 inline __m128i expand8(const void* values, int byte) {
  return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), _mm_load_si128((const __m128i*)shuffles.halves[byte]));
}
AVX2 inline __m256 expand8(const BFloat16* values, int byte) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(expand8((const void*)values, byte)), 16));
}
AVX2 inline __m256 expand8(const Float16* values, int byte) {
  return _mm256_cvtph_ps(expand8((const void*)values, byte));
}
AVX2 inline float sum8(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <class T, int M, int R>
AVX2 void dot_avx2(Rows<T, R> w, const float* x, int64_t stride, float (*out)[R]) {
  // Sums of a row and a token that take turns: an addition waits some cycles for the one before.
  constexpr int SUMS = M * R == 1 ? 4 : M * R <= 4 ? 2 : 1;
  __m256 sum[M][R][SUMS];
  for (auto& of_token : sum)
    for (auto& of_row : of_token)
      for (__m256& one : of_row) one = _mm256_setzero_ps();
  for (int64_t byte = 0; byte < w.bytes; byte += 8) {
    uint64_t bits[R];
    for (int r = 0; r < R; r++) {
      bits[r] = w.word_at(r, byte);
      _mm_prefetch((const char*)w.values[r] + AHEAD, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++) {
      __m256 dense[R];
      for (int r = 0; r < R; r++) {
        const int here = bits[r] >> 8 * part & 0xff;
        dense[r] = expand8(w.values[r], here);
        w.values[r] += _mm_popcnt_u32(here);
      }
      for (int m = 0; m < M; m++) {
        const __m256 at = _mm256_loadu_ps(x + m * stride + 8 * (byte + part));
        for (int r = 0; r < R; r++) {
          __m256& own = sum[m][r][part % SUMS];
          own = _mm256_fmadd_ps(at, dense[r], own);
        }
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) {
      for (int i = 1; i < SUMS; i++) sum[m][r][0] = _mm256_add_ps(sum[m][r][0], sum[m][r][i]);
      out[m][r] = sum8(sum[m][r][0]);
    }
}

// Loads of values. Compilers would make load and expansion one instruction, which AMD's Zen 4 executes ten times slower.
AVX512 inline __m512 load(const float* values) {
  __m512 x = _mm512_loadu_ps(values);
  asm("" : "+v"(x));
  return x;
}
AVX512 inline __m512i load32(const void* values) {
  __m512i x = _mm512_loadu_si512(values);
  asm("" : "+v"(x));
  return x;
}
// The next 32 columns: 16 and 16, as fp32.
AVX512 inline void expand32(const float* values, uint32_t bits, __m512& low, __m512& high) {
  low = _mm512_maskz_expand_ps(__mmask16(bits), load(values));
  high = _mm512_maskz_expand_ps(__mmask16(bits >> 16), load(values + _mm_popcnt_u32(bits & 0xffff)));
}
AVX512 inline __m512 widened(__m256i x, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
AVX512 inline __m512 widened(__m256i x, Float16) { return _mm512_cvtph_ps(x); }
template <class T>
AVX512 inline void expand32(const T* values, uint32_t bits, __m512& low, __m512& high) {
  const __m512i dense = _mm512_maskz_expand_epi16(bits, load32(values));
  low = widened(_mm512_castsi512_si256(dense), T{});
  high = widened(_mm512_extracti64x4_epi64(dense, 1), T{});
}

constexpr int sums(int pairs) { return pairs <= 4 ? 2 : 1; }
template <int N>
AVX512 inline float total(const __m512 (&sum)[N]) {
  return _mm512_reduce_add_ps(N > 1 ? _mm512_add_ps(sum[0], sum[N - 1]) : sum[0]);
}

template <class T, int M, int R>
AVX512 void dot_avx512(Rows<T, R> w, const float* x, int64_t stride, float (*out)[R]) {
  __m512 sum[M][R][sums(M * R)];
  for (auto& of_token : sum)
    for (auto& of_row : of_token)
      for (__m512& one : of_row) one = _mm512_setzero_ps();
  for (int64_t byte = 0; byte < w.bytes; byte += 8) {
    uint64_t bits[R];
    for (int r = 0; r < R; r++) {
      bits[r] = w.word_at(r, byte);
      _mm_prefetch((const char*)w.values[r] + AHEAD, _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
      __m512 low[R], high[R];
      for (int r = 0; r < R; r++) {
        const auto here = uint32_t(bits[r] >> 32 * part);
        expand32(w.values[r], here, low[r], high[r]);
        w.values[r] += _mm_popcnt_u32(here);
      }
      for (int m = 0; m < M; m++) {
        const float* at = x + m * stride + 8 * byte + 32 * part;
        for (int r = 0; r < R; r++) {
          __m512 &first = sum[m][r][0], &second = sum[m][r][sums(M * R) - 1];
          first = _mm512_fmadd_ps(_mm512_loadu_ps(at), low[r], first);
          second = _mm512_fmadd_ps(_mm512_loadu_ps(at + 16), high[r], second);
        }
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) out[m][r] = total(sum[m][r]);
}

template <int M, int R>
AVX512_BF16 void dot_avx512_bf16(Rows<BFloat16, R> w, const BFloat16* x, int64_t stride, float (*out)[R]) {
  __m512 sum[M][R][sums(M * R)];
  for (auto& of_token : sum)
    for (auto& of_row : of_token)
      for (__m512& one : of_row) one = _mm512_setzero_ps();
  for (int64_t byte = 0; byte < w.bytes; byte += 8) {
    uint64_t bits[R];
    for (int r = 0; r < R; r++) {
      bits[r] = w.word_at(r, byte);
      _mm_prefetch((const char*)w.values[r] + AHEAD, _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
      __m512i dense[R];
      for (int r = 0; r < R; r++) {
        const auto here = uint32_t(bits[r] >> 32 * part);
        dense[r] = _mm512_maskz_expand_epi16(here, load32(w.values[r]));
        w.values[r] += _mm_popcnt_u32(here);
      }
      for (int m = 0; m < M; m++) {
        const __m512i at = _mm512_loadu_si512(x + m * stride + 8 * byte + 32 * part);
        for (int r = 0; r < R; r++) {
          __m512& own = sum[m][r][part % sums(M * R)];
          own = _mm512_dpbf16_ps(own, (__m512bh)at, (__m512bh)dense[r]);
        }
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) out[m][r] = total(sum[m][r]);
}

// ---- one row of W, dense

AVX2 inline void put8(__m256 x, float* to) { _mm256_storeu_ps(to, x); }
AVX2 inline void put8(__m128i x, void* to) { _mm_storeu_si128((__m128i*)to, x); }

template <class T>
AVX2 void expand_avx2(const T* values, const uint8_t* mask, int64_t columns, T* to) {
  using Raw = std::conditional_t<sizeof(T) == 4, float, void>;  // 16-bit types are moved as they are
  for (int64_t column = 0; column < columns; column += 8) {
    const int byte = mask[column / 8];
    if (column + 8 <= columns) {
      put8(expand8((const Raw*)values, byte), (Raw*)(to + column));
    } else {
      T last[8];
      put8(expand8((const Raw*)values, byte), (Raw*)last);
      std::copy_n(last, columns - column, to + column);
    }
    values += _mm_popcnt_u32(byte);
  }
}

AVX512 inline void put32(const float* values, uint32_t bits, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_expand_ps(__mmask16(bits), load(values)));
  values += _mm_popcnt_u32(bits & 0xffff);
  _mm512_storeu_ps(to + 16, _mm512_maskz_expand_ps(__mmask16(bits >> 16), load(values)));
}
template <class T>
AVX512 inline void put32(const T* values, uint32_t bits, T* to) {
  _mm512_storeu_si512(to, _mm512_maskz_expand_epi16(bits, load32(values)));
}

// Whole words are stored without a mask: with one, a store takes several times as long.
template <class T>
AVX512 void expand_avx512(const T* values, const uint8_t* mask, int64_t columns, T* to) {
  int64_t column = 0;
  for (; column + 32 <= columns; column += 32) {
    uint32_t bits;
    std::memcpy(&bits, mask + column / 8, 4);
    _mm_prefetch((const char*)values + AHEAD, _MM_HINT_T0);
    put32(values, bits, to + column);
    values += _mm_popcnt_u32(bits);
  }
  if (column == columns) return;
  T last[32];
  put32(values, word(mask + column / 8, (columns - column + 7) / 8), last);
  std::copy_n(last, columns - column, to + column);
}

#endif

// ---- all rows of W

template <class T>
struct Matrix {
  const T* values;        // [count]
  int64_t count;
  const uint8_t* mask;    // [rows, bytes]
  const int64_t* starts;  // [rows + 1], or null if every row has `per_row` values
  int64_t per_row, rows, columns;

  int64_t bytes() const { return (columns + 7) / 8; }
  int64_t start(int64_t row) const { return std::clamp<int64_t>(starts ? starts[row] : row * per_row, 0, count); }
};

// run(numbers, rows) for R rows at a time; SLACK more than `columns` values can be read. The last may come twice.
template <int R, class T, class Run>
void for_rows(const Matrix<T>& w, Run run) {
#pragma omp parallel
  {
    std::vector<T> copies[R];  // of rows at the very end of `values`
#pragma omp for schedule(static)
    for (int64_t first = 0; first < w.rows; first += R) {
      int64_t number[R];
      Rows<T, R> rows{{}, {}, w.bytes(), {}};
      for (int r = 0; r < R; r++) {
        number[r] = std::min(first + r, w.rows - 1);
        const T* values = w.values + w.start(number[r]);
        // As many as a mask could ask for, even a wrong one, can be read.
        if (w.start(number[r]) + w.columns + SLACK > w.count) {
          copies[r].assign(values, w.values + w.count);
          copies[r].resize(w.columns + SLACK);
          values = copies[r].data();
        }
        rows.values[r] = values;
        rows.mask[r] = w.mask + number[r] * w.bytes();
        rows.last[r] = word(rows.mask[r] + w.bytes() / 8 * 8, w.bytes() % 8);
      }
      run(number, rows);
    }
  }
}

// dot(rows, out [M][R]) for all rows, into y [M, rows].
template <int M, class T, class Dot>
void dot_rows(const Matrix<T>& w, const T* bias, T* y, Dot dot) {
  constexpr int R = rows_at_once(M);
  for_rows<R>(w, [=, count = w.rows](const int64_t* number, Rows<T, R> rows) {
    float sum[M][R];
    dot(rows, sum);
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++)
        store(sum[m][r] + (bias ? to_float(bias[number[r]]) : 0.0f), y + m * count + number[r]);
  });
}

// Elements from one row of x to the next: whole words, and a cache line more, or rows would all fall on the same few lines.
template <class X>
int64_t row_stride(int64_t columns) {
  return (columns + STEP - 1) / STEP * STEP + 64 / sizeof(X);
}

template <class T, int M>
void linear(int level, const Matrix<T>& w, const T* x, const T* bias, T* y) {
  const int64_t stride = row_stride<float>(w.columns);
  std::vector<float> wide(M * stride);
  for (int m = 0; m < M; m++)
    for (int64_t column = 0; column < w.columns; column++)
      wide[m * stride + column] = to_float(x[m * w.columns + column]);
  const float* at = wide.data();
#ifdef X86
  if (level >= VIA_AVX512)
    return dot_rows<M>(w, bias, y, [=](auto rows, auto* sum) {
      dot_avx512<T, M, rows_at_once(M)>(rows, at, stride, sum);
    });
  if (level >= VIA_AVX2)
    return dot_rows<M>(w, bias, y, [=](auto rows, auto* sum) {
      dot_avx2<T, M, rows_at_once(M)>(rows, at, stride, sum);
    });
#endif
  dot_rows<M>(w, bias, y, [=](auto rows, auto* sum) {
    dot_portable<T, M, rows_at_once(M)>(rows, at, stride, sum);
  });
}

#ifdef X86
template <int M>
void linear_bf16(const Matrix<BFloat16>& w, const BFloat16* x, const BFloat16* bias, BFloat16* y) {
  const int64_t stride = row_stride<BFloat16>(w.columns);
  std::vector<BFloat16> padded(M * stride);
  for (int m = 0; m < M; m++) std::copy_n(x + m * w.columns, w.columns, padded.data() + m * stride);
  const BFloat16* at = padded.data();
  dot_rows<M>(w, bias, y, [=](auto rows, auto* sum) {
    dot_avx512_bf16<M, rows_at_once(M)>(rows, at, stride, sum);
  });
}
#endif

template <int M>
void linear_rows(int level, const Matrix<BFloat16>& w, const BFloat16* x, const BFloat16* bias, BFloat16* y) {
#ifdef X86
  if (level >= VIA_AVX512_BF16) return linear_bf16<M>(w, x, bias, y);
#endif
  linear<BFloat16, M>(level, w, x, bias, y);
}
template <int M, class T>
void linear_rows(int level, const Matrix<T>& w, const T* x, const T* bias, T* y) {
  linear<T, M>(level, w, x, bias, y);
}

template <class T>
void multiply(int level, const Matrix<T>& w, const T* x, int64_t tokens, const T* bias, T* y) {
  for (; tokens > 0; tokens -= MOST, x += MOST * w.columns, y += MOST * w.rows) switch (std::min<int64_t>(tokens, MOST)) {
      case 1: linear_rows<1>(level, w, x, bias, y); break;
      case 2: linear_rows<2>(level, w, x, bias, y); break;
      case 3: linear_rows<3>(level, w, x, bias, y); break;
      case 4: linear_rows<4>(level, w, x, bias, y); break;
      case 5: linear_rows<5>(level, w, x, bias, y); break;
      case 6: linear_rows<6>(level, w, x, bias, y); break;
      case 7: linear_rows<7>(level, w, x, bias, y); break;
      default: linear_rows<8>(level, w, x, bias, y);
    }
}

template <class T>
void expand_row(int level, const T* values, const uint8_t* mask, int64_t columns, T* to) {
#ifdef X86
  if (level >= VIA_AVX512) return expand_avx512(values, mask, columns, to);
  if (level >= VIA_AVX2) return expand_avx2(values, mask, columns, to);
#endif
  std::fill_n(to, columns, T{});
  const int64_t bytes = (columns + 7) / 8;
  for (int64_t byte = 0; byte < bytes; byte += 8)
    for (uint64_t bits = word(mask + byte, bytes - byte) & first_bits(columns - 8 * byte); bits; bits &= bits - 1)
      to[8 * byte + std::countr_zero(bits)] = *values++;
}

template <class T>
void expand(int level, const Matrix<T>& w, T* dense) {
  for_rows<1>(w, [=, columns = w.columns](const int64_t* number, Rows<T, 1> row) {
    expand_row(level, row.values[0], row.mask[0], columns, dense + number[0] * columns);
  });
}

// ---- the disk format from dense weights, whatever their type: U has as many bits

#ifdef X86

// Of the first columns of a row, 32 at a time; returns how many.
AVX2 inline int64_t nonzero_bits_avx2(const uint16_t* w, int64_t columns, uint8_t* mask) {
  const __m256i no_sign = _mm256_set1_epi16(0x7fff), zero = _mm256_setzero_si256();
  int64_t column = 0;
  for (; column + 32 <= columns; column += 32) {
    const __m256i* here = (const __m256i*)(w + column);
    const __m256i first = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_loadu_si256(here), no_sign), zero);
    const __m256i second = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_loadu_si256(here + 1), no_sign), zero);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(first, second), 0xd8);  // which takes them by quarters
    const uint32_t bits = ~(uint32_t)_mm256_movemask_epi8(both);
    std::memcpy(mask + column / 8, &bits, 4);
  }
  return column;
}
// Also moves `to`, whose room ends at `end`: other threads write behind that.
AVX2 inline int64_t take_kept_avx2(const uint16_t* w, int64_t columns, const uint8_t* mask, uint16_t*& to, uint16_t* end) {
  int64_t column = 0;
  for (; column + 8 <= columns && end - to >= 8; column += 8) {
    const int byte = mask[column / 8];
    const __m128i from = _mm_load_si128((const __m128i*)shuffles.columns[byte]);
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(w + column)), from));
    to += std::popcount((unsigned)byte);
  }
  return column;
}
AVX512 inline int64_t nonzero_bits_avx512(const uint16_t* w, int64_t columns, uint8_t* mask) {
  int64_t column = 0;
  for (; column + 32 <= columns; column += 32) {
    const __m512i here = _mm512_loadu_si512(w + column);
    const uint32_t bits = _mm512_test_epi16_mask(here, _mm512_set1_epi16(0x7fff));  // but for the sign
    std::memcpy(mask + column / 8, &bits, 4);
  }
  return column;
}
// Also moves `to`, whose room ends at `end`: other threads write behind that.
AVX512 inline int64_t take_kept_avx512(const uint16_t* w, int64_t columns, const uint8_t* mask, uint16_t*& to, uint16_t* end) {
  int64_t column = 0;
  for (; column + 32 <= columns; column += 32) {
    uint32_t bits;
    std::memcpy(&bits, mask + column / 8, 4);
    const __m512i kept = _mm512_maskz_compress_epi16(bits, _mm512_loadu_si512(w + column));
    const int count = std::popcount(bits);
    if (end - to >= 32) _mm512_storeu_si512(to, kept);  // which takes a fraction of what a store with a mask does
    else _mm512_mask_storeu_epi16(to, first_bits(count), kept);
    to += count;
  }
  return column;
}

#endif

// A row's mask; returns how many values that keeps.
template <class U>
int64_t nonzero_bits(int level, const U* w, int64_t columns, uint8_t* mask) {
  const int64_t bytes = (columns + 7) / 8;
  int64_t done = 0, count = 0;
#ifdef X86
  if constexpr (sizeof(U) == 2)
    if (level >= VIA_AVX512) done = nonzero_bits_avx512(w, columns, mask);
    else if (level >= VIA_AVX2) done = nonzero_bits_avx2(w, columns, mask);
#endif
  for (int64_t byte = done / 8; byte < bytes; byte++) {
    const U* here = w + 8 * byte;
    const int64_t there = std::min<int64_t>(8, columns - 8 * byte);
    auto pack = [here](int64_t count) {
      uint8_t bits = 0;
      for (int i = 0; i < count; i++) bits |= uint8_t(U(here[i] << 1) != 0) << i;  // of 0 and -0 nothing is left
      return bits;
    };
    mask[byte] = there == 8 ? pack(8) : pack(there);  // the compiler unrolls the first
  }
  for (int64_t byte = 0; byte < bytes; byte += 8) count += std::popcount(word(mask + byte, bytes - byte));
  return count;
}
// A row's values, as many as `end - to`, which `mask` keeps.
template <class U>
void take_kept(int level, const U* w, int64_t columns, const uint8_t* mask, U* to, U* end) {
  const int64_t bytes = (columns + 7) / 8;
  int64_t done = 0;
#ifdef X86
  if constexpr (sizeof(U) == 2)
    if (level >= VIA_AVX512) done = take_kept_avx512(w, columns, mask, to, end);
    else if (level >= VIA_AVX2) done = take_kept_avx2(w, columns, mask, to, end);
#endif
  for (int64_t byte = done / 8; byte < bytes; byte += 8)
    for (uint64_t bits = word(mask + byte, bytes - byte); bits; bits &= bits - 1)
      *to++ = w[8 * byte + std::countr_zero(bits)];
}

// Values only as long as each row has `kept` of them; returns whether all have. They are taken while a row is in the cache.
template <class U>
bool nonzeros(int level, const U* w, int64_t rows, int64_t columns, int64_t kept, uint8_t* mask, U* values) {
  const int64_t bytes = (columns + 7) / 8;
  std::atomic<bool> all = kept > 0;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const int64_t count = nonzero_bits(level, w + row * columns, columns, mask + row * bytes);
    if (count != kept) all.store(false, std::memory_order_relaxed);
    else if (all.load(std::memory_order_relaxed))
      take_kept(level, w + row * columns, columns, mask + row * bytes, values + row * kept, values + (row + 1) * kept);
  }
  return all;
}

// `starts` count what `mask` has.
template <class U>
void take_kept(int level, const U* w, const uint8_t* mask, const int64_t* starts, int64_t rows, int64_t columns, U* values) {
  const int64_t bytes = (columns + 7) / 8;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++)
    take_kept(level, w + row * columns, columns, mask + row * bytes, values + starts[row], values + starts[row + 1]);
}

template <class Run>
void with_bytes(int bytes, Run run) {
  if (bytes == 1) run(uint8_t{});
  else if (bytes == 2) run(uint16_t{});
  else if (bytes == 4) run(uint32_t{});
  else run(uint64_t{});
}

template <class T>
Matrix<T> matrix(const void* values, int64_t count, const uint8_t* mask, const int64_t* starts, int64_t rows, int64_t columns) {
  return {(const T*)values, count, mask, starts, rows ? count / rows : 0, rows, columns};
}

template <class Run>
void with_type(int type, Run run) {
  if (type == 0) run(float{});
  else if (type == 1) run(BFloat16{});
  else run(Float16{});
}

}  // namespace

extern "C" {

// The best level that this machine has.
int optimum_sparse_cpu_level() {
#ifdef X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi2");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? VIA_AVX512_BF16 : VIA_AVX512;
  if (avx2) return VIA_AVX2;
#endif
  return PORTABLE;
}

// Of W [rows, columns]: type 0 float32, 1 bfloat16, 2 float16; starts is null if all rows hold equally many values.
#define MATRIX const void *values, int64_t count, const uint8_t *mask, const int64_t *starts, int64_t rows, int64_t columns

// y [tokens, rows] = x [tokens, columns] W^T + bias, which may be null.
void optimum_sparse_cpu_linear(int type, MATRIX, int level, const void* x, int64_t tokens, const void* bias, void* y) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    multiply<T>(level, matrix<T>(values, count, mask, starts, rows, columns), (const T*)x, tokens, (const T*)bias, (T*)y);
  });
}

// The mask of the disk format for a dense w [rows, columns] of elements of 1, 2, 4 or 8 bytes, and values [rows, kept]: true if
// each row has so many.
bool optimum_sparse_cpu_nonzeros(int bytes, const void* w, int64_t rows, int64_t columns, int64_t kept, int level,
                                 uint8_t* mask, void* values) {
  bool all = false;
  with_bytes(bytes, [&](auto u) {
    all = nonzeros(level, (const decltype(u)*)w, rows, columns, kept, mask, (decltype(u)*)values);
  });
  return all;
}

// The values that a mask keeps; starts [rows + 1] are those of the mask.
void optimum_sparse_cpu_take_kept(int bytes, const void* w, const uint8_t* mask, const int64_t* starts, int64_t rows,
                                  int64_t columns, int level, void* values) {
  with_bytes(bytes, [&](auto u) {
    take_kept(level, (const decltype(u)*)w, mask, starts, rows, columns, (decltype(u)*)values);
  });
}

void optimum_sparse_cpu_expand(int type, MATRIX, int level, void* y) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    expand<T>(level, matrix<T>(values, count, mask, starts, rows, columns), (T*)y);
  });
}
}
