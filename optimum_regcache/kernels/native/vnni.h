// What the AVX-512 kernels share.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "kernels.h"

// keeps the accumulators of a tile in registers
#define UNROLL _Pragma("GCC unroll 8")

namespace regcache {

constexpr int64_t kLanes = 16;  // float32 lanes of a register

// memory that begins with a cache line: a register is one, and would lie in two
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }
  bool operator==(const LineAllocator&) const { return true; }
};

template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

inline __mmask16 lanes(int64_t count) { return count >= kLanes ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1); }

inline __m512 abs_max(__m512 best, __m512 x) { return _mm512_max_ps(best, _mm512_abs_ps(x)); }

// u8 codes: round half to even, then shift, then clamp
inline __m128i to_u8(__m512 x, __m512 inverse, __m512i zero_point, __m512i highest) {
  // far outside the int32 range the conversion gives INT_MIN, also for large positive values: clamp before
  x = _mm512_max_ps(_mm512_min_ps(_mm512_mul_ps(x, inverse), _mm512_set1_ps(1e6f)), _mm512_set1_ps(-1e6f));
  __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(x), zero_point);
  return _mm512_cvtepi32_epi8(_mm512_min_epi32(_mm512_max_epi32(code, _mm512_setzero_si512()), highest));
}

struct Quantizer {
  __m512 inverse;
  __m512i zero_point, highest;
  explicit Quantizer(const Codes& c)
      : inverse(_mm512_set1_ps(c.inverse)), zero_point(_mm512_set1_epi32(c.zero_point)), highest(_mm512_set1_epi32(c.highest)) {}
  __m128i operator()(__m512 x) const { return to_u8(x, inverse, zero_point, highest); }
};

}  // namespace regcache
