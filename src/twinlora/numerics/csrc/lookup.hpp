// NF4 codes and scales in AVX-512 registers.
#pragma once

#include "portable.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <immintrin.h>

namespace twinlora {
namespace {

// The block's 16 values in 16 bit, twice: a permutation looks at five bits of an index, and any fifth bit will do.
[[maybe_unused]] inline __m512i table16(float scale, Type type, __m512 levels) {
    const __m512 products = _mm512_mul_ps(levels, _mm512_set1_ps(scale));
    __m256i values;
    if (type == Type::bfloat16) {
        const __m512i bits = _mm512_castps_si512(products);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        values = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    } else {
        values = _mm512_cvtps_ph(products, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    return _mm512_broadcast_i64x4(values);
}

// 32 values of the codes in 16 bytes, in order.
[[maybe_unused]] inline __m512i look_up(const std::uint8_t* packed, __m512i table) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    return _mm512_permutexvar_epi16(index, table);
}

// Scales of blocks [first, last) as float32.
[[maybe_unused]] void decode_scales(const Scales& scales, std::int64_t first, std::int64_t last, float* out) {
    std::int64_t b = first;
    if (!scales.plain) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (; b + 16 <= last; b += 16) {
            const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales.codes + b)));
            const std::int64_t base = b >> scales.nested_shift;
            const __m512i offset = _mm512_set1_epi32(static_cast<int>(b - (base << scales.nested_shift)));
            const __m512i which = _mm512_srl_epi32(_mm512_add_epi32(lane, offset), _mm_cvtsi32_si128(scales.nested_shift));
            const __m512 value = _mm512_i32gather_ps(code, tables.dynamic_map, 4);
            const __m512 nested = _mm512_i32gather_ps(which, scales.nested + base, 4);
            const __m512 product = _mm512_mul_ps(value, nested);
            _mm512_storeu_ps(out + (b - first), _mm512_add_ps(product, _mm512_set1_ps(scales.offset)));
        }
    }
    for (; b < last; ++b) out[b - first] = scale_of(scales, b);
}

}  // namespace
}  // namespace twinlora
#endif
