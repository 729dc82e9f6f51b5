// The masked update of many tensors in one pass, and the norm of their gradients. Contract: cpu.py,
// layout: batch.py.
//
// The work is a list of blocks: up to kBlock elements of one segment, a run of a tensor that has one
// gradient. A block's kept gradients and weights are compacted into small buffers that stay in the
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

constexpr int64_t kBlock = 1024;  // elements, a multiple of 16; BLOCK in batch.py
constexpr int64_t kSlack = 16;    // lanes that a vector store may write past the last value
constexpr int64_t kBytes = kBlock / 8 + 8;

struct Coefficients {  // batch.py computes them in double precision
  float decay, beta1, grad_weight, beta2, grad_sq_weight, minus_step_size, sqrt_correction2, eps;
  uint32_t key[2];  // of the random bits
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

// Write the kept ones of n `dense` values from `first` on to `out`; return their number. Value i has
// bit i.
int64_t compact_scalar(const float* dense, const uint8_t* bits, int64_t first, int64_t n,
                       float* out) {
  int64_t count = 0;
  for (int64_t i = first; i < n; ++i) {
    out[count] = dense[i];
    count += kept(bits, i);
  }
  return count;
}

// The reverse: write the values to the kept places of `dense`, in order; the others stay.
void expand_scalar(const float* values, const uint8_t* bits, int64_t first, int64_t n,
                   float* dense) {
  for (int64_t i = first; i < n; ++i) {
    if (kept(bits, i)) dense[i] = *values++;
  }
}

#if X86
inline __mmask16 mask16(const uint8_t* bits, int64_t i) {
  uint16_t word;
  std::memcpy(&word, bits + (i >> 3), 2);
  return word;
}

// Compress and expand between registers: the forms with a memory operand are slow on Zen 4.
__attribute__((target("avx512f,popcnt"))) int64_t compact_avx512(const float* dense,
                                                                const uint8_t* bits, int64_t n,
                                                                float* out) {
  int64_t count = 0, i = 0;
  for (; i + 16 <= n; i += 16) {
    const __mmask16 mask = mask16(bits, i);
    _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(dense + i)));
    count += __builtin_popcount(mask);
  }
  return count + compact_scalar(dense, bits, i, n, out + count);
}

__attribute__((target("avx512f,popcnt"))) void expand_avx512(const float* values,
                                                            const uint8_t* bits, int64_t n,
                                                            float* dense) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __mmask16 mask = mask16(bits, i);
    const int count = __builtin_popcount(mask);
    const __m512 old = _mm512_loadu_ps(dense + i);
    // No lane past the last value: memory may end there.
    const __m512 next = _mm512_maskz_loadu_ps((1u << count) - 1, values);
    _mm512_storeu_ps(dense + i, _mm512_mask_expand_ps(old, mask, next));
    values += count;
  }
  expand_scalar(values, bits, i, n, dense);
}

const bool has_avx512 = __builtin_cpu_supports("avx512f");
#endif

int64_t compact(const float* dense, const uint8_t* bits, int64_t n, float* out) {
#if X86
  if (has_avx512) return compact_avx512(dense, bits, n, out);
#endif
  return compact_scalar(dense, bits, 0, n, out);
}

void expand(const float* values, const uint8_t* bits, int64_t n, float* dense) {
#if X86
  if (has_avx512) return expand_avx512(values, bits, n, dense);
#endif
  expand_scalar(values, bits, 0, n, dense);
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

// Fewer bits for moments and master weights: low_bit.py says what each does.
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// 32 random bits for each of n elements from `place` of the parameter on, as bits of floats.
CLONES void random_words(int64_t place, int64_t n, const uint32_t* key, float* out) {
  const uint32_t first = key[0], second = key[1];
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t where = static_cast<uint64_t>(place + i);
    const uint32_t x = mix(static_cast<uint32_t>(where) ^ first);
    const uint32_t word = mix(x + static_cast<uint32_t>(where >> 32) + second);
    std::memcpy(out + i, &word, 4);
  }
}

// Use the bits of `random` from `shift` on.
CLONES void round_to_bf16(const float* in, const float* random, int shift, int64_t n,
                          uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = bits_of(random[i]) >> shift & 0xFFFF;
    const uint32_t rounded = (bits_of(in[i]) + word) >> 16;
    out[i] = static_cast<uint16_t>(in[i] != in[i] ? 0x7FC0 : rounded);
  }
}

constexpr int kDropped = 20;  // bits of an fp32 mantissa that an 8-bit moment lacks

CLONES int shared_exponent(const float* values, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t size = bits_of(values[i]) & 0x7FFFFFFF;
    largest = size > largest ? size : largest;
  }
  const int exponent = static_cast<int>((largest + (1u << kDropped) - 1) >> 23);
  return std::min(std::max(exponent, 40), 254);
}

CLONES void to_codes(const float* in, const float* random, int shift, bool has_sign, int shared,
                     int64_t n, uint8_t* out) {
  const int top = has_sign ? 15 : 31, largest = 8 * top + 7;
  const float inverse_step = float_of(static_cast<uint32_t>(256 + top - shared) << 23);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(in[i]), size = bits & 0x7FFFFFFF;
    const uint32_t word = bits_of(random[i]) >> shift & 0xFFFF;
    const int normal = static_cast<int>((size + word * 16) >> kDropped) - ((shared - top) << 3);
    const float steps = std::min(float_of(size) * inverse_step, 8.0f);
    const int small = static_cast<int>(steps + static_cast<float>(word) * 0x1p-16f);
    const bool is_normal = static_cast<int>(size >> 23) >= shared - top + 1;
    int code = std::min(is_normal ? normal : small, largest);
    if (has_sign) {
      code |= static_cast<int>(bits >> 31 << 7);
    } else if (code == 0 && size != 0) {
      code = 1;
    }
    out[i] = static_cast<uint8_t>(code);
  }
}

CLONES void from_codes(const uint8_t* in, bool has_sign, int shared, int64_t n, float* out) {
  const int top = has_sign ? 15 : 31;
  for (int64_t i = 0; i < n; ++i) {
    const int code = in[i], size = has_sign ? code & 0x7F : code, exponent = size >> 3;
    const int mantissa = (size & 7) + (exponent > 0 ? 8 : 0);
    const int step = shared - top - 2 + (exponent > 0 ? exponent - 1 : 0);
    const float value = static_cast<float>(mantissa) * float_of(static_cast<uint32_t>(step) << 23);
    out[i] = has_sign && code >> 7 ? -value : value;
  }
}

// The master weights of n bf16 weights, which are given as fp32.
CLONES void join(const float* weights, const uint16_t* low, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t high = bits_of(weights[i]) >> 16;
    out[i] = float_of((high - (low[i] >> 15)) << 16 | low[i]);
  }
}

CLONES void split(const float* in, int64_t n, uint16_t* low) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(in[i]), lower = bits & 0xFFFF;
    low[i] = static_cast<uint16_t>(lower == 0x8000 ? 0x7FFF + 2 * (bits >> 16 & 1) : lower);
  }
}

enum Type : int { kNone = 0, kFp32 = 1, kBf16 = 2, kFp16 = 3 };  // batch.py

// Return n values of a type from element i on, as fp32: in place where they are fp32 already.
const float* wide(const void* values, int type, int64_t i, int64_t n, float* buffer) {
  if (type == kFp32) return static_cast<const float*>(values) + i;
  const uint16_t* half = static_cast<const uint16_t*>(values) + i;
  type == kBf16 ? widen_bf16(half, n, buffer) : widen_fp16(half, n, buffer);
  return buffer;
}

void store(const float* values, int type, int64_t i, int64_t n, void* out) {
  if (type == kFp32) {
    std::memcpy(static_cast<float*>(out) + i, values, n * sizeof(float));
  } else if (type == kBf16) {
    narrow_bf16(values, n, static_cast<uint16_t*>(out) + i);
  } else {
    narrow_fp16(values, n, static_cast<uint16_t*>(out) + i);
  }
}

// Copy n bits, from bit `start` on, to bit 0; zeros follow them.
void take_bits(const uint8_t* bits, int64_t start, int64_t n, uint8_t* out) {
  const uint8_t* from = bits + (start >> 3);
  const int shift = start & 7;
  const int64_t bytes = (n + 7) / 8, readable = (shift + n + 7) / 8;
  if (shift == 0) {
    std::memcpy(out, from, bytes);
  } else {
    for (int64_t k = 0; k < bytes; ++k) {
      const unsigned next = k + 1 < readable ? from[k + 1] : 0;
      out[k] = static_cast<uint8_t>(from[k] >> shift | next << (8 - shift));
    }
  }
  if (n & 7) out[bytes - 1] &= (1 << (n & 7)) - 1;
  std::memset(out + bytes, 0, kBytes - bytes);
}

int64_t count_ones(const uint8_t* bits) {
  int64_t count = 0;
  for (int64_t k = 0; k < kBytes; k += 8) {
    uint64_t word;
    std::memcpy(&word, bits + k, 8);
    count += __builtin_popcountll(word);
  }
  return count;
}

// In double, where squares of fp32 values are exact.
CLONES double sum_of_squares(const float* values, int64_t n) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int k = 0; k < 16; ++k) {
      const double value = values[i + k];
      lanes[k] += value * value;
    }
  }
  for (; i < n; ++i) lanes[0] += static_cast<double>(values[i]) * values[i];
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

}  // namespace

extern "C" {

// A list of blocks, and where their tensors are. `addresses` has a row for each kind of tensor and a
// column for each segment; 0 stands for none. Gradients, weights and dense masters begin at the
// segment's first element, compact tensors at the tensor's first kept one, packed masks at its first.
struct Batch {
  int64_t num_blocks, num_segments;
  const int32_t* segment;      // of each block
  const int64_t* first;        // its first element, counted in the tensor
  const int64_t* kept_before;  // kept elements of the tensor before it
  const int32_t* kept_count;   // and in it
  const int64_t* begin;        // of each segment: its first element in the tensor
  const int64_t* end;
  const int64_t* place;  // of its first element in the parameter
  const int64_t* addresses;
  const Coefficients* coefficients;  // of each segment
  const float* factor;               // of all gradients; NaN: nothing is updated
  int32_t gradient_type, weight_type, master, moments;
};
}

namespace {

enum Row : int { kGradient, kWeights, kMaster, kExpAvg, kExpAvgSq, kMask, kExponents };
enum Master : int { kDense, kCompact, kSplit };             // batch.py
enum Moments : int { kIn32 = 1, kIn16 = 2, kIn8 = 3 };  // config/moments.py

class Block {
 public:
  Block(const Batch& batch, int64_t i)
      : batch_(batch),
        segment_(batch.segment[i]),
        first_(batch.first[i]),
        offset_(first_ - batch.begin[segment_]),
        size_(std::min(kBlock, batch.end[segment_] - first_)),
        kept_before_(batch.kept_before[i]),
        kept_count_(batch.kept_count[i]) {
    const uint8_t* bits = at<uint8_t>(kMask);
    masked_ = bits != nullptr;
    if (masked_) take_bits(bits, first_, size_, mask_);
  }

  // False where there is nothing to do, or the mask in memory is not the one that the moments were
  // made for.
  bool sound() const {
    return kept_count_ > 0 && at<void>(kGradient) != nullptr &&
           (!masked_ || count_ones(mask_) == kept_count_);
  }

  double squares() const {
    alignas(64) float dense[kBlock + kSlack], compacted[kBlock + kSlack];
    return sum_of_squares(gradients(dense, compacted), kept_count_);
  }

  void update(float factor) const {
    alignas(64) float dense[kBlock + kSlack], scaled[kBlock + kSlack], weights[kBlock + kSlack];
    alignas(64) float exp_avg[kBlock], exp_avg_sq[kBlock], random[kBlock + kSlack];
    const Coefficients& c = batch_.coefficients[segment_];
    const float* found = gradients(dense, scaled);
    for (int64_t i = 0; i < kept_count_; ++i) scaled[i] = found[i] * factor;
    float* values = master(dense, weights);
    float* m = moments(kExpAvg, exp_avg);
    float* v = moments(kExpAvgSq, exp_avg_sq);
    adamw(values, scaled, m, v, kept_count_, c);
    if (batch_.moments != kIn32) {
      const int64_t place = batch_.place[segment_] + offset_;
      random_words(place, size_, c.key, masked_ ? dense : random);
      if (masked_) compact(dense, mask_, size_, random);
      store_moments(kExpAvg, m, random, 0);
      store_moments(kExpAvgSq, v, random, 16);
    }
    if (batch_.master == kDense && masked_) {
      expand(values, mask_, size_, at<float>(kMaster) + offset_);
    } else if (batch_.master == kSplit) {
      split(values, kept_count_, at<uint16_t>(kMaster) + kept_before_);
    }
    if (at<void>(kWeights) == nullptr) return;
    if (masked_) {
      const float* old = wide(at<void>(kWeights), batch_.weight_type, offset_, size_, dense);
      if (old != dense) std::memcpy(dense, old, size_ * sizeof(float));
      expand(values, mask_, size_, dense);
      values = dense;
    }
    store(values, batch_.weight_type, offset_, size_, at<void>(kWeights));
  }

 private:
  template <typename T>
  T* at(Row row) const {
    return reinterpret_cast<T*>(batch_.addresses[row * batch_.num_segments + segment_]);
  }

  const float* gradients(float* dense, float* compacted) const {
    const float* all = wide(at<void>(kGradient), batch_.gradient_type, offset_, size_, dense);
    if (!masked_) return all;
    compact(all, mask_, size_, compacted);
    return compacted;
  }

  // The fp32 master weights of the kept elements, in place where they lie next to each other.
  float* master(float* dense, float* out) const {
    if (batch_.master == kCompact) return at<float>(kMaster) + kept_before_;
    if (batch_.master == kDense) {
      float* all = at<float>(kMaster) + offset_;
      if (!masked_) return all;
      compact(all, mask_, size_, out);
      return out;
    }
    const float* high = wide(at<void>(kWeights), batch_.weight_type, offset_, size_, dense);
    if (masked_) {
      compact(high, mask_, size_, out);
      high = out;
    }
    join(high, at<uint16_t>(kMaster) + kept_before_, kept_count_, out);
    return out;
  }

  // The moments of the kept elements: in place in fp32, else in `buffer`.
  float* moments(Row row, float* buffer) const {
    if (batch_.moments == kIn32) return at<float>(row) + kept_before_;
    if (batch_.moments == kIn16) {
      widen_bf16(at<uint16_t>(row) + kept_before_, kept_count_, buffer);
    } else {
      from_codes(at<uint8_t>(row) + kept_before_, row == kExpAvg, *exponent(row), kept_count_,
                 buffer);
    }
    return buffer;
  }

  void store_moments(Row row, const float* values, const float* random, int shift) const {
    if (batch_.moments == kIn16) {
      round_to_bf16(values, random, shift, kept_count_, at<uint16_t>(row) + kept_before_);
      return;
    }
    const int shared = shared_exponent(values, kept_count_);
    *exponent(row) = static_cast<uint8_t>(shared);
    to_codes(values, random, shift, row == kExpAvg, shared, kept_count_,
             at<uint8_t>(row) + kept_before_);
  }

  // What the 8-bit moments of this block share.
  uint8_t* exponent(Row row) const {
    return at<uint8_t>(static_cast<Row>(kExponents + (row - kExpAvg))) + offset_ / kBlock;
  }

  const Batch& batch_;
  const int64_t segment_, first_, offset_, size_, kept_before_, kept_count_;
  bool masked_;
  uint8_t mask_[kBytes];
};

}  // namespace

extern "C" {

int64_t pmp_block() { return kBlock; }

int pmp_has_fp16() { return has_fp16; }

// One AdamW step on the kept elements of the segments that have a gradient.
void pmp_masked_adamw(const Batch* batch, int num_threads) {
  const float factor = *batch->factor;
  if (factor != factor) return;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t i = 0; i < batch->num_blocks; ++i) {
    const Block block(*batch, i);
    if (block.sound()) block.update(factor);
  }
}

// sums: (num_blocks,), the sum of squares of each block's kept gradients.
void pmp_sums_of_squares(const Batch* batch, double* sums, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t i = 0; i < batch->num_blocks; ++i) {
    const Block block(*batch, i);
    sums[i] = block.sound() ? block.squares() : 0.0;
  }
}
}
