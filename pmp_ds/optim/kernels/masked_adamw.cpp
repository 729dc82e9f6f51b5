// AdamW on the kept elements of a flat fp32 tensor, with compact moments. Contract: cpu.py.
//
// Each tile of the dense weights and gradients is compacted into two small buffers that stay in the
// first-level cache, updated there in one straight loop, and written back as whole cache lines. So
// the dense tensors are read and written once, in order. Compilation without contraction rounds
// every operation separately: an element's result does not depend on its place, the density, the
// vector width or the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86 1
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define X86 0
#define CLONES
#endif

namespace {

constexpr int64_t kTile = 1024;    // elements compacted at once, a multiple of 16
constexpr int64_t kBlock = 16384;  // elements per entry of `prefix`, a multiple of kTile
constexpr int64_t kSlack = 16;     // lanes that a vector store may write past the last value

struct Coefficients {  // cpu.py computes them in double precision
  float decay, beta1, grad_weight, beta2, grad_sq_weight, minus_step_size, sqrt_correction2, eps;
};

// One step on n contiguous values.
CLONES void adamw(float* __restrict p, const float* __restrict g, float* __restrict m,
                  float* __restrict v, int64_t n, const Coefficients& coefficients) {
  const Coefficients c = coefficients;
  for (int64_t i = 0; i < n; ++i) {
    m[i] = m[i] * c.beta1 + g[i] * c.grad_weight;
    v[i] = v[i] * c.beta2 + g[i] * g[i] * c.grad_sq_weight;
    const float denominator = std::sqrt(v[i]) / c.sqrt_correction2 + c.eps;
    p[i] = p[i] * c.decay + m[i] * c.minus_step_size / denominator;
  }
}

inline bool kept(const uint8_t* bits, int64_t i) { return bits[i >> 3] >> (i & 7) & 1; }

// Write the kept ones of n `dense` values to `out`; return their number. Value i has bit start + i.
int64_t compact_scalar(const float* dense, const uint8_t* bits, int64_t start, int64_t n,
                       float* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[count] = dense[i];
    count += kept(bits, start + i);
  }
  return count;
}

// The reverse: write the values to the kept places of `dense`, in order; the others stay.
void expand_scalar(const float* values, const uint8_t* bits, int64_t start, int64_t n,
                   float* dense) {
  for (int64_t i = 0; i < n; ++i) {
    if (kept(bits, start + i)) dense[i] = *values++;
  }
}

#if X86
inline __mmask16 mask16(const uint8_t* bits, int64_t i) {
  uint16_t word;
  std::memcpy(&word, bits + (i >> 3), 2);
  return word;
}

// Compress and expand between registers, because the forms with a memory operand are slow on Zen 4.
// `start` is a multiple of 8.
__attribute__((target("avx512f,popcnt"))) int64_t compact_avx512(const float* dense,
                                                                const uint8_t* bits, int64_t start,
                                                                int64_t n, float* out) {
  int64_t count = 0, i = 0;
  for (; i + 16 <= n; i += 16) {
    const __mmask16 mask = mask16(bits, start + i);
    _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(dense + i)));
    count += __builtin_popcount(mask);
  }
  return count + compact_scalar(dense + i, bits, start + i, n - i, out + count);
}

__attribute__((target("avx512f,popcnt"))) void expand_avx512(const float* values,
                                                            const uint8_t* bits, int64_t start,
                                                            int64_t n, float* dense) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __mmask16 mask = mask16(bits, start + i);
    const int count = __builtin_popcount(mask);
    const __m512 old = _mm512_loadu_ps(dense + i);
    // Read no lane past the last value: memory may end there.
    const __m512 next = _mm512_maskz_loadu_ps((1u << count) - 1, values);
    _mm512_storeu_ps(dense + i, _mm512_mask_expand_ps(old, mask, next));
    values += count;
  }
  expand_scalar(values, bits, start + i, n - i, dense + i);
}

const bool has_avx512 = __builtin_cpu_supports("avx512f");
#endif

int64_t compact(const float* dense, const uint8_t* bits, int64_t start, int64_t n, float* out) {
#if X86
  if (has_avx512) return compact_avx512(dense, bits, start, n, out);
#endif
  return compact_scalar(dense, bits, start, n, out);
}

void expand(const float* values, const uint8_t* bits, int64_t start, int64_t n, float* dense) {
#if X86
  if (has_avx512) return expand_avx512(values, bits, start, n, dense);
#endif
  expand_scalar(values, bits, start, n, dense);
}

// 16-bit floats are stored as bits. Rounding is to nearest, ties to even; NaN stays NaN.
CLONES void widen_bf16(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t wide = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(out + i, &wide, 4);
  }
}

CLONES void narrow_bf16(const float* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t wide;
    std::memcpy(&wide, in + i, 4);
    const uint32_t rounded = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
    out[i] = static_cast<uint16_t>(in[i] != in[i] ? 0x7FC0 : rounded);
  }
}

#ifdef __FLT16_MAX__
constexpr bool has_fp16 = true;

CLONES void widen_fp16(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    _Float16 value;
    std::memcpy(&value, in + i, 2);
    out[i] = static_cast<float>(value);
  }
}

CLONES void narrow_fp16(const float* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const _Float16 value = static_cast<_Float16>(in[i]);
    std::memcpy(out + i, &value, 2);
  }
}
#else
constexpr bool has_fp16 = false;
void widen_fp16(const uint16_t*, int64_t, float*) {}
void narrow_fp16(const float*, int64_t, uint16_t*) {}
#endif

struct Format {
  void (*widen)(const uint16_t*, int64_t, float*);
  void (*narrow)(const float*, int64_t, uint16_t*);
};

// One block of the step with a compact fp32 master: weights are 16-bit, gradients 16-bit or fp32.
void compact_master_block(const Format& as, uint16_t* p, const void* g, bool g_is_fp32,
                          const uint8_t* bits, int64_t begin, int64_t end, float* master, float* m,
                          float* v, float factor, const Coefficients& c) {
  alignas(64) float dense[kTile + kSlack];
  alignas(64) float compacted[kTile + kSlack];
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t n = std::min(kTile, end - start);
    if (g_is_fp32) {
      std::memcpy(dense, static_cast<const float*>(g) + start, n * sizeof(float));
    } else {
      as.widen(static_cast<const uint16_t*>(g) + start, n, dense);
    }
    const int64_t count = bits == nullptr ? n : compact(dense, bits, start, n, compacted);
    if (count == 0) continue;
    float* gradients = bits == nullptr ? dense : compacted;
    for (int64_t i = 0; i < count; ++i) gradients[i] *= factor;
    adamw(master, gradients, m, v, count, c);
    if (bits == nullptr) {
      as.narrow(master, n, p + start);
    } else {
      as.widen(p + start, n, dense);
      expand(master, bits, start, n, dense);
      as.narrow(dense, n, p + start);
    }
    master += count;
    m += count;
    v += count;
  }
}

constexpr int kWord = 16;  // mask bits used at once to zero values

// Zero those of 16 values whose bit in `word` is 0. This uses the compilers' vector types because
// they did not vectorize loops over 16-bit values.
template <typename T>
inline __attribute__((always_inline)) void zero_word(T* values, uint16_t word) {
  typedef T Lanes __attribute__((vector_size(kWord * sizeof(T)), aligned(sizeof(T)), may_alias));
  const Lanes bit = {1,   2,   4,    8,    16,   32,   64,    128,
                     256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  Lanes* lanes = reinterpret_cast<Lanes*>(values);
  *lanes &= (Lanes)((static_cast<T>(word) & bit) == bit);
}

// Zero values[i] for begin <= i < end where bit offset + i is 0.
template <typename T>
inline __attribute__((always_inline)) void zero_range(T* __restrict values, const uint8_t* bits,
                                                      int64_t offset, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kWord < end; i += kWord) {
    const uint8_t* byte = bits + ((offset + i) >> 3);  // byte[2] has element i + 16
    const uint32_t three = byte[0] | byte[1] << 8 | byte[2] << 16;
    zero_word(values + i, static_cast<uint16_t>(three >> ((offset + i) & 7)));
  }
  for (; i < end; ++i) {
    if (!kept(bits, offset + i)) values[i] = T(0);
  }
}

CLONES void zero_range4(uint32_t* values, const uint8_t* bits, int64_t offset, int64_t begin,
                        int64_t end) {
  zero_range(values, bits, offset, begin, end);
}

CLONES void zero_range2(uint16_t* values, const uint8_t* bits, int64_t offset, int64_t begin,
                        int64_t end) {
  zero_range(values, bits, offset, begin, end);
}

}  // namespace

extern "C" {

int64_t pmp_block() { return kBlock; }

// p, g: (numel,); bits: (ceil(numel / 8),), or null for all kept; prefix: kept elements before each
// block of kBlock; m, v: (number of kept elements,).
void pmp_masked_adamw(float* p, const float* g, const uint8_t* bits, const int64_t* prefix,
                      int64_t numel, float* m, float* v, const Coefficients* coefficients,
                      int num_threads) {
  const Coefficients& c = *coefficients;
  const int64_t num_blocks = (numel + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t block = 0; block < num_blocks; ++block) {
    alignas(64) float weights[kTile + kSlack];
    alignas(64) float gradients[kTile + kSlack];
    const int64_t begin = block * kBlock, end = std::min(numel, begin + kBlock);
    if (bits == nullptr) {
      adamw(p + begin, g + begin, m + begin, v + begin, end - begin, c);
      continue;
    }
    int64_t done = prefix[block];
    for (int64_t start = begin; start < end; start += kTile) {
      const int64_t n = std::min(kTile, end - start);
      const int64_t count = compact(p + start, bits, start, n, weights);
      if (count == 0) continue;
      compact(g + start, bits, start, n, gradients);
      adamw(weights, gradients, m + done, v + done, count, c);
      expand(weights, bits, start, n, p + start);
      done += count;
    }
  }
}

int pmp_has_fp16() { return has_fp16; }

// The same with 16-bit weights p (fp16, else bf16). The update applies to the compact fp32 master
// weights (number of kept elements,), and p becomes the rounded master. Gradients are fp32 or in
// the format of p, and are multiplied by `factor` first.
void pmp_masked_adamw_master(uint16_t* p, int fp16, const void* g, int g_is_fp32,
                             const uint8_t* bits, const int64_t* prefix, int64_t numel,
                             float* master, float* m, float* v, float factor,
                             const Coefficients* coefficients, int num_threads) {
  const Format as = fp16 ? Format{widen_fp16, narrow_fp16} : Format{widen_bf16, narrow_bf16};
  const int64_t num_blocks = (numel + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = block * kBlock, end = std::min(numel, begin + kBlock);
    const int64_t done = bits == nullptr ? begin : prefix[block];
    compact_master_block(as, p, g, g_is_fp32 != 0, bits, begin, end, master + done, m + done,
                         v + done, factor, *coefficients);
  }
}

// Zero the values that are not kept. values: (numel,), 4 or 2 bytes each; value i has bit
// offset + i.
void pmp_zero_complement(void* values, int64_t bytes_per_value, const uint8_t* bits, int64_t offset,
                         int64_t numel, int num_threads) {
  const int64_t num_blocks = (numel + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = block * kBlock, end = std::min(numel, begin + kBlock);
    if (bytes_per_value == 4) {
      zero_range4(static_cast<uint32_t*>(values), bits, offset, begin, end);
    } else {
      zero_range2(static_cast<uint16_t*>(values), bits, offset, begin, end);
    }
  }
}
}
