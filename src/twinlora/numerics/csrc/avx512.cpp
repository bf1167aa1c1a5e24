// AVX-512 with BF16: one permutation looks up 32 codes, one instruction multiplies 32 pairs.
#include "bf16.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace twinlora {
namespace {

constexpr std::int64_t panel = 16;  // rows of W that all rows of x pass over while they are in the cache

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

// Scales of blocks [first, last) as float32.
void decode_scales(const Scales& scales, std::int64_t first, std::int64_t last, float* out) {
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

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

// The block's 16 values in bfloat16, twice. Denormals become 0 here, as they would in the product.
inline __m512i table_bf16(float scale, __m512 levels) {
    const __m256bh values = _mm512_cvtneps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
    return _mm512_broadcast_i64x4((__m256i)values);
}

// Some rows of x against a panel of rows of W.
struct Product {
    const std::uint16_t* x;      // [M, K], split
    const std::uint8_t* packed;  // the panel's codes
    const float* scales;         // the panel's scales, [rows, K / block]
    std::int64_t K;
    int block;
};

// Sums of rows [0, Rows) of x with rows [n, n + Cols) of the panel over k in [from, to): a weight vector serves all rows
// of x, and Cols of them hide each other's latency. `sums` [Cols][Rows] carries what earlier ranges of k have added.
// Codes are looked up 32 at a time without being unpacked into order: x is `split` instead.
// For one or two rows the scale is applied to a block's sum, for more to the table of its values.
template <int Rows, int Cols>
inline void accumulate(const Product& p, std::int64_t n, std::int64_t from, std::int64_t to, __m512* sums) {
    constexpr bool scale_sums = Rows <= 2;
    const __m512 levels = _mm512_loadu_ps(tables.levels);
    const __m512i unscaled = table_bf16(1.0f, levels);
    const std::int64_t blocks = p.K / p.block;
    __m512 local[Cols][Rows];
#pragma GCC unroll 16
    for (int c = 0; c < Cols; ++c)
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) local[c][m] = sums[c * Rows + m];
    for (std::int64_t b = from / p.block; b < to / p.block; ++b) {
        __m512i table[Cols];
        __m512 part[Cols][Rows];
#pragma GCC unroll 16
        for (int c = 0; c < Cols; ++c) {
            table[c] = scale_sums ? unscaled : table_bf16(p.scales[(n + c) * blocks + b], levels);
#pragma GCC unroll 16
            for (int m = 0; m < Rows; ++m) part[c][m] = scale_sums ? _mm512_setzero_ps() : local[c][m];
        }
        for (std::int64_t k = b * p.block; k < (b + 1) * p.block; k += 64) {
            __m512bh even[Cols], odd[Cols];
#pragma GCC unroll 16
            for (int c = 0; c < Cols; ++c) {
                const auto* codes = reinterpret_cast<const __m256i*>(p.packed + ((n + c) * p.K + k) / 2);
                const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes));
                // The next rows: the processor does not guess streams as short as ours.
                _mm_prefetch(reinterpret_cast<const char*>(codes) + Cols * p.K / 2, _MM_HINT_T0);
                even[c] = as_bf16(_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table[c]));
                odd[c] = as_bf16(_mm512_permutexvar_epi16(bytes, table[c]));
            }
#pragma GCC unroll 16
            for (int m = 0; m < Rows; ++m) {
                const std::uint16_t* x = p.x + m * p.K + k;
                const __m512bh first = as_bf16(_mm512_load_si512(x)), second = as_bf16(_mm512_load_si512(x + 32));
#pragma GCC unroll 16
                for (int c = 0; c < Cols; ++c) {
                    part[c][m] = _mm512_dpbf16_ps(part[c][m], even[c], first);
                    part[c][m] = _mm512_dpbf16_ps(part[c][m], odd[c], second);
                }
            }
        }
#pragma GCC unroll 16
        for (int c = 0; c < Cols; ++c) {
            const __m512 scale = _mm512_set1_ps(p.scales[(n + c) * blocks + b]);
#pragma GCC unroll 16
            for (int m = 0; m < Rows; ++m)
                local[c][m] = scale_sums ? _mm512_fmadd_ps(part[c][m], scale, local[c][m]) : part[c][m];
        }
    }
#pragma GCC unroll 16
    for (int c = 0; c < Cols; ++c)
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) sums[c * Rows + m] = local[c][m];
}

// Every 64 values of x [count] as the 32 with even index, then the 32 with odd index.
void split(const std::uint16_t* x, std::int64_t count, std::uint16_t* out) {
    alignas(64) std::uint16_t index[32];
    for (int i = 0; i < 32; ++i) index[i] = static_cast<std::uint16_t>(2 * i);
    const __m512i even = _mm512_load_si512(index), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (std::int64_t i = 0; i < count; i += 64) {
        const __m512i low = _mm512_loadu_si512(x + i), high = _mm512_loadu_si512(x + i + 32);
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(low, even, high));
        _mm512_storeu_si512(out + i + 32, _mm512_permutex2var_epi16(low, odd, high));
    }
}

// The sum of each of 16 vectors, `stride` apart.
inline __m512 sums_of(const __m512* v, int stride) {
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

// `Rows` rows of x against `rows` rows of a panel -> y [Rows, N]. Ranges of k keep this part of x in the first cache.
template <int Rows>
void multiply(const Product& p, std::int64_t rows, std::uint16_t* y, std::int64_t N) {
    constexpr int Cols = Rows >= 8 ? 2 : 4;
    const std::int64_t range = 8192 / Rows / p.block > 0 ? 8192 / Rows / p.block * p.block : p.block;
    __m512 sums[panel * Rows];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (std::int64_t from = 0; from < p.K; from += range) {
        const std::int64_t to = from + range < p.K ? from + range : p.K;
        std::int64_t n = 0;
        for (; n + Cols <= rows; n += Cols) accumulate<Rows, Cols>(p, n, from, to, sums + n * Rows);
        for (; n < rows; ++n) accumulate<Rows, 1>(p, n, from, to, sums + n * Rows);
    }
    for (int m = 0; m < Rows; ++m) store_bf16(y + m * N, mask16(rows), sums_of(sums + m, Rows));
}

void multiply_rows(const std::uint16_t* x, const std::uint8_t* packed, const Scales& scales, std::uint16_t* y,
                   std::int64_t M, std::int64_t N, std::int64_t K, int block, std::int64_t first, std::int64_t last) {
    const std::int64_t blocks = K / block;
    Scratch<std::uint16_t> halves(M * K);
    Scratch<float> decoded(panel * blocks);
    split(x, M * K, halves.values);
    for (std::int64_t start = first; start < last; start += panel) {
        const std::int64_t rows = start + panel < last ? panel : last - start;
        decode_scales(scales, start * blocks, (start + rows) * blocks, decoded.values);
        std::int64_t m = 0;
        auto run = [&](auto kernel, int count) {
            kernel(Product{halves.values + m * K, packed + start * K / 2, decoded.values, K, block}, rows, y + m * N + start, N);
            m += count;
        };
        while (M - m >= 8) run(multiply<8>, 8);
        if (M - m >= 4) run(multiply<4>, 4);
        if (M - m >= 2) run(multiply<2>, 2);
        if (M - m >= 1) run(multiply<1>, 1);
    }
}

// `Rows` rows of x against rows [first, last) of a dense W: bound by reading W, `Cols` of its rows at a time.
template <int Rows>
void multiply_dense_rows(const u16* x, const u16* w, u16* y, std::int64_t N, std::int64_t K, std::int64_t first,
                         std::int64_t last) {
    constexpr int Cols = Rows == 1 ? 8 : 4;
    for (std::int64_t n = first; n < last; n += Cols) {
        const int valid = static_cast<int>(last - n < Cols ? last - n : Cols);
        __m512 sums[Cols][Rows];
        for (auto& column : sums)
            for (auto& sum : column) sum = _mm512_setzero_ps();
        for (std::int64_t k = 0; k < K; k += 32) {
            __m512bh rows[Rows];
#pragma GCC unroll 8
            for (int m = 0; m < Rows; ++m) rows[m] = as_bf16(_mm512_loadu_si512(x + m * K + k));
#pragma GCC unroll 8
            for (int c = 0; c < Cols; ++c) {
                const __m512bh weight = as_bf16(_mm512_loadu_si512(w + (n + (c < valid ? c : 0)) * K + k));
#pragma GCC unroll 8
                for (int m = 0; m < Rows; ++m) sums[c][m] = _mm512_dpbf16_ps(sums[c][m], weight, rows[m]);
            }
        }
        for (int c = 0; c < valid; ++c)
            for (int m = 0; m < Rows; ++m) y[m * N + n + c] = to_bfloat16(_mm512_reduce_add_ps(sums[c][m]));
    }
}

void multiply_dense(const u16* x, const u16* w, u16* y, std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t first,
                    std::int64_t last) {
    (M == 1 ? multiply_dense_rows<1> : M == 2 ? multiply_dense_rows<2> : multiply_dense_rows<3>)(x, w, y, N, K, first, last);
}

}  // namespace

const Path avx512{"avx512-bf16", supported, dequantize, quantize, multiply_rows, multiply_dense};

}  // namespace twinlora

#else

namespace twinlora {
const Path avx512{"avx512-bf16", [] { return false; }, nullptr, nullptr, nullptr, nullptr};
}

#endif
