// bfloat16 in AVX-512 registers.
#pragma once

#include "portable.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <immintrin.h>

#include <initializer_list>

namespace twinlora {
namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;

[[maybe_unused]] inline __m512 widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

[[maybe_unused]] inline __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

[[maybe_unused]] inline __m512 load_bf16(const u16* x) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

[[maybe_unused]] inline void store_bf16(u16* out, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow(values));
}

// The first `count` of 16 values.
[[maybe_unused]] inline __mmask16 mask16(i64 count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

[[maybe_unused]] inline __m512 load_bf16(const u16* x, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, x)); }

[[maybe_unused]] inline void store_bf16(u16* out, __mmask16 mask, __m512 values) {
    _mm256_mask_storeu_epi16(out, mask, narrow(values));
}

// e^x; 0 below 2^-126, since what is computed from less than a normal number takes a hundred times as long. Relative error
// under 3e-7.
[[maybe_unused]] inline __m512 exponential(__m512 x) {
    const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.54035304e-4f);
    for (const float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(-126.0f), _CMP_GE_OQ), p, n);
}

// The sum of each of 16 vectors, `stride` apart.
[[maybe_unused]] inline __m512 sums_of(const __m512* v, int stride) {
    __m512 t[16];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = v[2 * i * stride], b = v[(2 * i + 1) * stride];
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    // t[i] has, in each quarter, two halves of v[2i] and two of v[2i + 1], in turn.
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
        t[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    // t[i] has, in each quarter, one part of v[4i] to v[4i + 3].
    for (int i = 0; i < 2; ++i)
        t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88), _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
}

}  // namespace
}  // namespace twinlora
#endif
