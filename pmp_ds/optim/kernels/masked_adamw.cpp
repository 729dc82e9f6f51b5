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
  const int64_t* addresses;
  const Coefficients* coefficients;  // of each segment
  const float* factor;               // of all gradients; NaN: nothing is updated
  int32_t gradient_type, weight_type, compact_master;
};
}

namespace {

enum Row : int { kGradient, kWeights, kMaster, kExpAvg, kExpAvgSq, kMask };

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
    const float* found = gradients(dense, scaled);
    for (int64_t i = 0; i < kept_count_; ++i) scaled[i] = found[i] * factor;
    const bool gathered = masked_ && !batch_.compact_master;
    float* master = at<float>(kMaster) + (batch_.compact_master ? kept_before_ : offset_);
    if (gathered) compact(master, mask_, size_, weights);
    float* values = gathered ? weights : master;
    adamw(values, scaled, at<float>(kExpAvg) + kept_before_, at<float>(kExpAvgSq) + kept_before_,
          kept_count_, batch_.coefficients[segment_]);
    if (gathered) expand(weights, mask_, size_, master);
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
