// The panels that bfloat16 products take as their right-hand side, and what lays them out.
//
// It is packed once into panels of 32 columns: for every 32 values of k two tiles [16][16] of pairs
// (k, k + 1), 16 columns each.
//
// Internal linkage throughout, as in portable.hpp.
#pragma once

#include "bf16.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace twinlora {
namespace {

constexpr i64 step_depth = 32;       // values of k in a step; depth is a multiple of it
constexpr i64 step_pairs = 2 * 256;  // packed pairs of a step of a panel

[[maybe_unused]] inline i64 round_up(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// 16 rows of 16 pairs -> 16 columns; in place.
[[maybe_unused]] inline void transpose16(__m512i* r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Panel of rows: column j of the panel is row j of src [32, depth].
[[maybe_unused]] inline void pack_rows(const u16* src, i64 stride, i64 depth, u32* out) {
    for (i64 k = 0; k < depth; k += step_depth, out += step_pairs)
        for (i64 half = 0; half < 2; ++half) {
            __m512i column[16];
            for (i64 j = 0; j < 16; ++j) column[j] = _mm512_loadu_si512(src + (16 * half + j) * stride + k);
            transpose16(column);
            for (i64 i = 0; i < 16; ++i) _mm512_store_si512(out + 256 * half + 16 * i, column[i]);
        }
}

// Panel of columns: column j of the panel is column j of src [depth, 32].
[[maybe_unused]] inline void pack_columns(const u16* src, i64 stride, i64 depth, u32* out) {
    alignas(64) static constexpr u16 low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (i64 k = 0; k < depth; k += step_depth, out += step_pairs)
        for (i64 pair = 0; pair < 16; ++pair) {
            const u16* row = src + (k + 2 * pair) * stride;
            const __m512i even = _mm512_loadu_si512(row), odd = _mm512_loadu_si512(row + stride);
            _mm512_store_si512(out + 16 * pair, _mm512_permutex2var_epi16(even, first, odd));
            _mm512_store_si512(out + 16 * pair + 256, _mm512_permutex2var_epi16(even, second, odd));
        }
}

}  // namespace
}  // namespace twinlora
#endif
