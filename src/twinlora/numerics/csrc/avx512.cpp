// AVX-512 with BF16: one permutation looks up 32 codes, one instruction multiplies 32 pairs.
#include "products.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace twinlora {
namespace {

constexpr i64 from_decoded = 17;  // rows of x from which on a panel is decoded once for all of them

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

// The block's 16 values in 16 bit, twice: a permutation looks at five bits of an index, and any fifth bit will do.
inline __m512i table16(float scale, Type type, __m512 levels) {
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
inline __m512i look_up(const std::uint8_t* packed, __m512i table) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    return _mm512_permutexvar_epi16(index, table);
}

void dequantize(const std::uint8_t* packed, const Scales& scales, std::int64_t first, std::int64_t last, int block,
                Type type, void* out) {
    const __m512 levels = _mm512_loadu_ps(tables.levels);
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t start = b * block;
        if (type == Type::float32) {
            const __m512 table = _mm512_mul_ps(levels, _mm512_set1_ps(scale_of(scales, b)));
            for (std::int64_t i = start; i < start + block; i += 16) {
                const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i / 2)));
                const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
                _mm512_storeu_ps(static_cast<float*>(out) + i, _mm512_permutexvar_ps(index, table));
            }
        } else {
            const __m512i table = table16(scale_of(scales, b), type, levels);
            for (std::int64_t i = start; i < start + block; i += 32)
                _mm512_storeu_si512(static_cast<std::uint16_t*>(out) + i, look_up(packed + i / 2, table));
        }
    }
}

// 32 codes in 12 bytes: every 16-bit lane gets the two bytes that its code lies in, and is shifted to it. The table of
// eight values repeats, so that the bits above the code do not matter.
void dequantize_nf3(const std::uint8_t* packed, const Scales& scales, std::int64_t first, std::int64_t last, int block,
                    Type type, void* out) {
    if (type == Type::float32) return nf3_blocks(packed, scales, first, last, block, type, out);
    alignas(64) u8 bytes[64];
    alignas(64) u16 shifts[32];
    for (int i = 0; i < 32; ++i) {
        const int bit = 3 * i;
        bytes[2 * i] = static_cast<u8>(bit / 8), bytes[2 * i + 1] = static_cast<u8>(bit / 8 + 1);
        shifts[i] = static_cast<u16>(bit % 8);
    }
    const __m512i spread = _mm512_load_si512(bytes), shift = _mm512_load_si512(shifts);
    const __m512 levels = _mm512_broadcast_f32x8(_mm256_loadu_ps(tables.nf3_levels));
    for (std::int64_t b = first; b < last; ++b) {
        const __m512i table = table16(scale_of(scales, b), type, levels);
        for (std::int64_t i = b * block; i < (b + 1) * block; i += 32) {
            const __m128i codes = _mm_maskz_loadu_epi8(0xfff, packed + i / 8 * 3);
            const __m512i pairs = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), spread);
            const __m512i values = _mm512_permutexvar_epi16(_mm512_srlv_epi16(pairs, shift), table);
            _mm512_storeu_si512(static_cast<u16*>(out) + i, values);
        }
    }
}

inline __m512 load16(const void* x, Type type, std::int64_t i) {
    if (type == Type::float32) return _mm512_loadu_ps(static_cast<const float*>(x) + i);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(x) + i));
    if (type == Type::float16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

void quantize(const void* x, Type type, std::int64_t first, std::int64_t last, int block, std::uint8_t* packed,
              float* scales) {
    const __m512 borders = _mm512_loadu_ps(tables.borders);
    const __m512 limit = _mm512_set1_ps(3.40282346638528859811704183484516925e+38f);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t start = b * block;
        __m512i largest = _mm512_setzero_si512();
        for (std::int64_t i = start; i < start + block; i += 16)
            largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(load16(x, type, i)), magnitude));
        const std::uint32_t bits = _mm512_reduce_max_epu32(largest);
        __builtin_memcpy(&scales[b], &bits, 4);
        const __m512 inverse = _mm512_min_ps(_mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_set1_ps(scales[b])), limit);
        for (std::int64_t i = start; i < start + block; i += 16) {
            const __m512 value = _mm512_mul_ps(load16(x, type, i), inverse);
            __m512i code = _mm512_setzero_si512();
            for (int step = 8; step; step /= 2) {
                const __m512 border = _mm512_permutexvar_ps(_mm512_add_epi32(code, _mm512_set1_epi32(step - 1)), borders);
                const __mmask16 above = _mm512_cmp_ps_mask(border, value, _CMP_LT_OQ);
                code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
            }
            const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi64_epi8(pair));
        }
    }
}

void multiply_rows(const u16* x, const u8* packed, const Scales& scales, u16* y, i64 M, i64 N, i64 K, int block, i64 first,
                   i64 last) {
    if (!M) return;
    const i64 blocks = K / block, stride = K + 64;  // rows of a power of two would share few sets of the cache
    const Plan plan(M, K);
    thread_local Kept<float> kept_scales;
    thread_local Kept<u16> kept_x, kept_values;
    float* decoded = kept_scales.at_least(panel * blocks);
    u16* arranged = kept_x.at_least(M * K);
    u16* values = M < from_decoded ? nullptr : kept_values.at_least(panel * stride);
    arrange<true>(x, plan, arranged);
    Soon soon(nullptr, 0, 1, 1);
    for (i64 start = first; start < last; start += panel) {
        const i64 rows = start + panel < last ? panel : last - start;
        const u8* codes = packed + start * K / 2;
        const Stored stored{codes, K / 2, 0};
        decode_scales(scales, start * blocks, (start + rows) * blocks, decoded);
        if (values) {
            for (i64 n = 0; n < rows; ++n)
                decode_split(codes + n * K / 2, decoded + n * blocks, blocks, block, values + n * stride);
            multiply_panel(Dense{values, K, stride}, stored, plan, arranged, rows, 64, y + start, N, soon);
        } else {
            multiply_panel(Codes{codes, decoded, K, block}, stored, plan, arranged, rows, block, y + start, N, soon);
        }
    }
}

void multiply_dense(const u16* x, const u16* w, u16* y, i64 M, i64 N, i64 K, i64 first, i64 last, const Region* regions,
                    i64 count) {
    const Plan plan(M, K);
    thread_local Kept<u16> kept;
    u16* arranged = kept.at_least(M * K);
    arrange<false>(x, plan, arranged);
    Soon soon(regions, count, (last - first) * K * plan.groups, plan.groups);
    for (i64 start = first; start < last; start += panel) {
        const i64 rows = start + panel < last ? panel : last - start;
        const u16* at = w + start * K;
        multiply_panel(Dense{at, K, K}, Stored{at, 2 * K, 2}, plan, arranged, rows, 64, y + start, N, soon);
    }
}

}  // namespace

const Path avx512{"avx512-bf16", supported, dequantize, dequantize_nf3, int8_blocks, quantize, multiply_rows,
                  multiply_dense};

}  // namespace twinlora

#else

namespace twinlora {
const Path avx512{"avx512-bf16", [] { return false; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}

#endif
