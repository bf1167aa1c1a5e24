// AVX-512 with BF16: one permutation looks up 32 codes, one instruction multiplies 32 pairs.
#include "bf16.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace twinlora {
namespace {

constexpr i64 panel = 16;
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

// Scales of blocks [first, last) as float32. Looked up one by one: a gather takes several times as long.
void decode_scales(const Scales& scales, i64 first, i64 last, float* out) {
    if (scales.plain) {
        __builtin_memcpy(out, scales.plain + first, 4 * (last - first));
        return;
    }
    const __m512 offset = _mm512_set1_ps(scales.offset);
    for (i64 b = first, stop; b < last; b = stop) {
        const i64 nested = b >> scales.nested_shift, end = (nested + 1) << scales.nested_shift;
        stop = end < last ? end : last;
        const __m512 scale = _mm512_set1_ps(scales.nested[nested]);
        for (i64 i = b; i < stop; i += 16) {
            alignas(64) float values[16];
            const __mmask16 mask = mask16(stop - i);
            u8 codes[16];
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm_maskz_loadu_epi8(mask, scales.codes + i));
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) values[j] = tables.dynamic_map[codes[j]];
            const __m512 product = _mm512_mul_ps(_mm512_load_ps(values), scale);
            _mm512_mask_storeu_ps(out + (i - first), mask, _mm512_add_ps(product, offset));
        }
    }
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

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

// The block's 16 values in bfloat16, twice. Denormals become 0 here, as they would in the product.
inline __m512i table_bf16(float scale, __m512 levels) {
    const __m256bh values = _mm512_cvtneps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
    return _mm512_broadcast_i64x4((__m256i)values);
}

// A panel is `panel` rows of W, fewer at the end; all rows of x pass over it while it is in the cache. In each kind of
// panel, `accumulate` adds the products of rows [0, Rows) of x with rows [n, n + Cols) of the panel, over k in
// [from, to), to `sums` [Cols][Rows]: a weight vector serves all rows of x, and Cols of them hide each other's latency.

// Codes, looked up 32 at a time without being unpacked into order: x is arranged to match (`Split`).
// For one or two rows the scale is applied to a block's sum, for more to the table of its values.
struct Codes {
    const u8* packed;     // the panel's codes
    const float* scales;  // the panel's scales, [rows, K / block]
    i64 K;
    int block;

    template <int Rows, int Cols>
    inline void accumulate(const u16* x, i64 n, i64 from, i64 to, __m512* sums) const {
        constexpr bool scale_sums = Rows <= 2;
        const __m512 levels = _mm512_loadu_ps(tables.levels);
        const __m512i unscaled = table_bf16(1.0f, levels);
        const i64 blocks = K / block;
        __m512 local[Cols][Rows];
#pragma GCC unroll 16
        for (int c = 0; c < Cols; ++c)
#pragma GCC unroll 16
            for (int m = 0; m < Rows; ++m) local[c][m] = sums[c * Rows + m];
        for (i64 b = from / block; b < to / block; ++b) {
            __m512i table[Cols];
            __m512 part[Cols][Rows];
#pragma GCC unroll 16
            for (int c = 0; c < Cols; ++c) {
                table[c] = scale_sums ? unscaled : table_bf16(scales[(n + c) * blocks + b], levels);
#pragma GCC unroll 16
                for (int m = 0; m < Rows; ++m) part[c][m] = scale_sums ? _mm512_setzero_ps() : local[c][m];
            }
            for (i64 k = b * block; k < (b + 1) * block; k += 64) {
                __m512bh even[Cols], odd[Cols];
#pragma GCC unroll 16
                for (int c = 0; c < Cols; ++c) {
                    const auto* codes = reinterpret_cast<const __m256i*>(packed + ((n + c) * K + k) / 2);
                    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes));
                    // The next rows: the processor does not guess streams as short as ours.
                    _mm_prefetch(reinterpret_cast<const char*>(codes) + Cols * K / 2, _MM_HINT_T0);
                    even[c] = as_bf16(_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table[c]));
                    odd[c] = as_bf16(_mm512_permutexvar_epi16(bytes, table[c]));
                }
#pragma GCC unroll 16
                for (int m = 0; m < Rows; ++m) {
                    const u16* at = x + k * Rows + m * 64;
                    const __m512bh first = as_bf16(_mm512_load_si512(at)), second = as_bf16(_mm512_load_si512(at + 32));
#pragma GCC unroll 16
                    for (int c = 0; c < Cols; ++c) {
                        part[c][m] = _mm512_dpbf16_ps(part[c][m], even[c], first);
                        part[c][m] = _mm512_dpbf16_ps(part[c][m], odd[c], second);
                    }
                }
            }
#pragma GCC unroll 16
            for (int c = 0; c < Cols; ++c) {
                const __m512 scale = _mm512_set1_ps(scales[(n + c) * blocks + b]);
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
};

// bfloat16, in the order of x.
struct Dense {
    const u16* w;  // [rows, K], `stride` apart
    i64 K, stride;
    const void* ahead;  // what will be read next, [rows, K] of 2^width half-bytes: fetched while this is multiplied
    int width;

    template <int Rows, int Cols>
    inline void accumulate(const u16* x, i64 n, i64 from, i64 to, __m512* sums) const {
        __m512 local[Cols][Rows];
#pragma GCC unroll 16
        for (int c = 0; c < Cols; ++c)
#pragma GCC unroll 16
            for (int m = 0; m < Rows; ++m) local[c][m] = sums[c * Rows + m];
        for (i64 k = from; k < to; k += 64) {
            __m512bh first[Cols], second[Cols];
#pragma GCC unroll 16
            for (int c = 0; c < Cols; ++c) {
                const u16* at = w + (n + c) * stride + k;
                first[c] = as_bf16(_mm512_loadu_si512(at)), second[c] = as_bf16(_mm512_loadu_si512(at + 32));
                if (ahead) _mm_prefetch(static_cast<const char*>(ahead) + (((n + c) * K + k) << width) / 2, _MM_HINT_T0);
            }
#pragma GCC unroll 16
            for (int m = 0; m < Rows; ++m) {
                const u16* at = x + k * Rows + m * 64;
                const __m512bh even = as_bf16(_mm512_load_si512(at)), odd = as_bf16(_mm512_load_si512(at + 32));
#pragma GCC unroll 16
                for (int c = 0; c < Cols; ++c) {
                    local[c][m] = _mm512_dpbf16_ps(local[c][m], first[c], even);
                    local[c][m] = _mm512_dpbf16_ps(local[c][m], second[c], odd);
                }
            }
        }
#pragma GCC unroll 16
        for (int c = 0; c < Cols; ++c)
#pragma GCC unroll 16
            for (int m = 0; m < Rows; ++m) sums[c * Rows + m] = local[c][m];
    }
};

// How many rows of x go together, of `left`: at most 6, and groups of one size as far as possible.
inline i64 together(i64 left) {
    const i64 groups = (left + 5) / 6;
    return (left + groups - 1) / groups;
}

// x [M, K] -> for each group of rows that go together, its parts [64] of each row side by side, k by k: read in one
// stream. `Split`: of every part the 32 values with even index, then the 32 with odd index.
template <bool Split>
void arrange(const u16* x, i64 M, i64 K, u16* out) {
    alignas(64) u16 index[32];
    for (int i = 0; i < 32; ++i) index[i] = static_cast<u16>(2 * i);
    const __m512i even = _mm512_load_si512(index), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (i64 rows; M; M -= rows, x += rows * K, out += rows * K) {
        rows = together(M);
        for (i64 m = 0; m < rows; ++m)
            for (i64 k = 0; k < K; k += 64) {
                const u16* at = x + m * K + k;
                u16* to = out + k * rows + m * 64;
                const __m512i low = _mm512_loadu_si512(at), high = _mm512_loadu_si512(at + 32);
                _mm512_store_si512(to, Split ? _mm512_permutex2var_epi16(low, even, high) : low);
                _mm512_store_si512(to + 32, Split ? _mm512_permutex2var_epi16(low, odd, high) : high);
            }
    }
}

// `Rows` rows of x against `rows` rows of a panel -> y [Rows, N]. Ranges of k keep their part of x in the first cache.
template <int Rows, class Panel>
void multiply(const Panel& w, const u16* x, i64 rows, i64 unit, u16* y, i64 N) {
    constexpr int Cols = 4;
    const i64 range = 8192 / Rows / unit > 0 ? 8192 / Rows / unit * unit : unit;
    __m512 sums[panel * Rows];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (i64 from = 0; from < w.K; from += range) {
        const i64 to = from + range < w.K ? from + range : w.K;
        i64 n = 0;
        for (; n + Cols <= rows; n += Cols) w.template accumulate<Rows, Cols>(x, n, from, to, sums + n * Rows);
        for (; n < rows; ++n) w.template accumulate<Rows, 1>(x, n, from, to, sums + n * Rows);
    }
    for (int m = 0; m < Rows; ++m) store_bf16(y + m * N, mask16(rows), sums_of(sums + m, Rows));
}

// All M rows of x, arranged, against a panel. k is cut at multiples of `unit`.
template <class Panel>
void multiply_panel(const Panel& w, const u16* x, i64 M, i64 rows, i64 unit, u16* y, i64 N) {
    for (i64 count; M; M -= count, x += count * w.K, y += count * N) {
        count = together(M);
        constexpr decltype(&multiply<1, Panel>) kernels[] = {multiply<1, Panel>, multiply<2, Panel>, multiply<3, Panel>,
                                                             multiply<4, Panel>, multiply<5, Panel>, multiply<6, Panel>};
        kernels[count - 1](w, x, rows, unit, y, N);
    }
}

// Blocks of codes -> bfloat16, in the order that `Split` gives to x.
void decode_split(const u8* packed, const float* scales, i64 blocks, int block, u16* out) {
    const __m512 levels = _mm512_loadu_ps(tables.levels);
    for (i64 b = 0; b < blocks; ++b) {
        const __m512i table = table_bf16(scales[b], levels);
        for (int i = 0; i < block; i += 64, packed += 32, out += 64) {
            const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
            _mm512_store_si512(out, _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table));
            _mm512_store_si512(out + 32, _mm512_permutexvar_epi16(bytes, table));
        }
    }
}

void multiply_rows(const u16* x, const u8* packed, const Scales& scales, u16* y, i64 M, i64 N, i64 K, int block, i64 first,
                   i64 last) {
    const i64 blocks = K / block, stride = K + 64;  // rows of a power of two would share few sets of the cache
    thread_local Kept<float> kept_scales;
    thread_local Kept<u16> kept_x, kept_values;
    float* decoded = kept_scales.at_least(panel * blocks);
    u16* arranged = kept_x.at_least(M * K);
    u16* values = M < from_decoded ? nullptr : kept_values.at_least(panel * stride);
    arrange<true>(x, M, K, arranged);
    for (i64 start = first; start < last; start += panel) {
        const i64 rows = start + panel < last ? panel : last - start;
        const u8* codes = packed + start * K / 2;
        decode_scales(scales, start * blocks, (start + rows) * blocks, decoded);
        if (values) {
            for (i64 n = 0; n < rows; ++n)
                decode_split(codes + n * K / 2, decoded + n * blocks, blocks, block, values + n * stride);
            multiply_panel(Dense{values, K, stride, codes + panel * K / 2, 0}, arranged, M, rows, 64, y + start, N);
        } else {
            multiply_panel(Codes{codes, decoded, K, block}, arranged, M, rows, block, y + start, N);
        }
    }
}

void multiply_dense(const u16* x, const u16* w, u16* y, i64 M, i64 N, i64 K, i64 first, i64 last) {
    thread_local Kept<u16> kept;
    u16* arranged = kept.at_least(M * K);
    arrange<false>(x, M, K, arranged);
    for (i64 start = first; start < last; start += panel) {
        const i64 rows = start + panel < last ? panel : last - start;
        const u16* ahead = M < 4 ? nullptr : w + (start + 4) * K;
        multiply_panel(Dense{w + start * K, K, K, ahead, 2}, arranged, M, rows, 64, y + start, N);
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
