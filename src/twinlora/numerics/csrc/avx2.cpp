// AVX2: codes are looked up by byte shuffles, the low and the high bytes of a 16-bit value apart.
#include "portable.hpp"

#if defined(__AVX2__)
#include <immintrin.h>

namespace twinlora {
namespace {

bool supported() { return __builtin_cpu_supports("avx2"); }

void dequantize_block(const std::uint8_t* packed, float scale, int block, Type type, std::uint16_t* out) {
    alignas(16) std::uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
        const float product = tables.levels[i] * scale;
        const std::uint16_t value = type == Type::bfloat16 ? to_bfloat16(product) : to_float16(product);
        low[i] = value & 255;
        high[i] = value >> 8;
    }
    const __m128i table_low = _mm_load_si128(reinterpret_cast<const __m128i*>(low));
    const __m128i table_high = _mm_load_si128(reinterpret_cast<const __m128i*>(high));
    const __m128i nibble = _mm_set1_epi8(15);
    for (int i = 0; i < block; i += 32) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
        const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), second = _mm_and_si128(bytes, nibble);
        const __m128i codes[2] = {_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)};
        for (int half = 0; half < 2; ++half) {
            const __m128i l = _mm_shuffle_epi8(table_low, codes[half]), h = _mm_shuffle_epi8(table_high, codes[half]);
            auto* target = reinterpret_cast<__m128i*>(out + i + 16 * half);
            _mm_storeu_si128(target, _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128(target + 1, _mm_unpackhi_epi8(l, h));
        }
    }
}

void dequantize(const std::uint8_t* packed, const Scales& scales, std::int64_t first, std::int64_t last, int block,
                Type type, void* out) {
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t start = b * block;
        if (type == Type::float32)
            dequantize_part(packed + start / 2, scale_of(scales, b), block, type, at(out, type, start));
        else
            dequantize_block(packed + start / 2, scale_of(scales, b), block, type, static_cast<std::uint16_t*>(out) + start);
    }
}

void quantize(const void* x, Type type, std::int64_t first, std::int64_t last, int block, std::uint8_t* packed,
              float* scales) {
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t start = b * block;
        scales[b] = quantize_part(at(x, type, start), type, block, packed + start / 2);
    }
}

void multiply_rows(const std::uint16_t* x, const std::uint8_t* packed, const Scales& scales, std::uint16_t* y,
                   std::int64_t M, std::int64_t N, std::int64_t K, int block, std::int64_t first, std::int64_t last) {
    Scratch<std::uint16_t> row(K);
    for (std::int64_t n = first; n < last; ++n) {
        for (std::int64_t k = 0; k < K; k += block)
            dequantize_block(packed + (n * K + k) / 2, scale_of(scales, (n * K + k) / block), block, Type::bfloat16, row.values + k);
        for (std::int64_t m = 0; m < M; ++m) y[m * N + n] = to_bfloat16(dot(x + m * K, row.values, K));
    }
}

}  // namespace

const Path avx2{"avx2", supported, dequantize, nf3_blocks, int8_blocks, quantize, multiply_rows, nullptr};

}  // namespace twinlora

#else

namespace twinlora {
const Path avx2{"avx2", [] { return false; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}

#endif
