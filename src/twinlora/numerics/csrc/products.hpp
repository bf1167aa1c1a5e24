// Products of few rows of x [M, K] with the rows of a weight: the weight is read once, at the speed of memory.
//
// x is laid out anew and stays in the first cache, in ranges of k where it is too long. A block of two or four rows of the
// weight is multiplied by all of x, a group of rows at a time, whose sums stay in registers; meanwhile what follows in
// memory is fetched, line by line in the order of addresses. Sums of 16 rows of the weight (a panel) are added up together.
//
// Whatever M, the ranges and the groups are, a sum takes its products in one order: a row's result depends on it alone.
// Internal linkage throughout, as in portable.hpp.
#pragma once

#include "bf16.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace twinlora {
namespace {

constexpr i64 panel = 16;
constexpr i64 wide_group = 6, group = 12;  // rows of x that go together: with four rows of the weight, and with two
constexpr i64 fetch_ahead = 8192;          // bytes

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

// The block's 16 values in bfloat16, twice. Denormals become 0 here, as they would in the product.
inline __m512i table_bf16(float scale, __m512 levels) {
    const __m256bh values = _mm512_cvtneps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
    return _mm512_broadcast_i64x4((__m256i)values);
}

// Where to fetch: pieces of rows, `stride` apart, so many bytes each time.
struct Fetch {
    const char *at, *end;  // of the present piece
    i64 gap, stride, pace;

    inline void next_piece() {
        if (at < end) return;
        at += gap;
        end += stride;
    }
    inline void line() {
        _mm_prefetch(at, _MM_HINT_T0);
        at += pace;
    }
};

// sums[c][m] += 32 values of row m of x times those of row c of the weight.
template <int Rows, int Cols>
[[gnu::always_inline]] inline void add_products(const __m512bh* w, const u16* x, __m512 (&sums)[Cols][Rows]) {
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
        const __m512bh values = as_bf16(_mm512_load_si512(x + 32 * m));
#pragma GCC unroll 16
        for (int c = 0; c < Cols; ++c) sums[c][m] = _mm512_dpbf16_ps(sums[c][m], w[c], values);
    }
}

template <int Rows, int Cols>
[[gnu::always_inline]] inline void load_sums(const __m512* from, __m512 (&sums)[Cols][Rows]) {
#pragma GCC unroll 16
    for (int c = 0; c < Cols; ++c)
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) sums[c][m] = from ? from[c * Rows + m] : _mm512_setzero_ps();
}

template <int Rows, int Cols>
[[gnu::always_inline]] inline void store_sums(const __m512 (&sums)[Cols][Rows], __m512* to) {
#pragma GCC unroll 16
    for (int c = 0; c < Cols; ++c)
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) to[c * Rows + m] = sums[c][m];
}

// In each kind of panel, `accumulate` adds the products of a group of rows of x with rows [n, n + Cols) of the panel, over k
// in [from, to), to `sums` [Cols][Rows] (from 0 on: sets them). `prepare` comes once before, for all groups. `stored` are
// the panel's rows in memory, values of 2^width half-bytes; a line is fetched for every `step` of them.

// bfloat16.
struct Dense {
    static constexpr int width = 2, step = 32;
    const u16* w;
    i64 K;

    const void* stored() const { return w; }
    void prepare(i64, i64, i64, i64) const {}

    template <int Rows, int Cols>
    void accumulate(const u16* x, i64 n, i64 from, i64 to, __m512* sums, Fetch fetch) const {
        multiply<Rows, Cols>(x, w + n * K + from, K, to - from, from ? sums : nullptr, sums, fetch);
    }

    // Rows of the weight at `at`, `stride` apart, `count` values of each.
    template <int Rows, int Cols>
    static inline void multiply(const u16* x, const u16* at, i64 stride, i64 count, const __m512* before, __m512* sums,
                                Fetch fetch) {
        __m512 local[Cols][Rows];
        load_sums(before, local);
        for (i64 k = 0; k < count; k += 32, x += 32 * Rows) {
            __m512bh values[Cols];
            fetch.next_piece();
#pragma GCC unroll 4
            for (int c = 0; c < Cols; ++c) {
                values[c] = as_bf16(_mm512_loadu_si512(at + c * stride + k));
                fetch.line();
            }
            add_products(values, x, local);
        }
        store_sums(local, sums);
    }
};

// NF4 codes, looked up 64 at a time as they are multiplied, the even and the odd ones apart.
// For one or two rows the scale is applied to a block's sum, for more to the table of its values.
struct Codes {
    static constexpr int width = 0, step = 64;
    const u8* packed;
    i64 K;
    const float* scales;  // [rows, K / block]
    int block;

    const void* stored() const { return packed; }
    void prepare(i64, i64, i64, i64) const {}

    template <int Rows, int Cols>
    void accumulate(const u16* x, i64 n, i64 from, i64 to, __m512* sums, Fetch fetch) const {
        constexpr bool scale_sums = Rows <= 2;
        const __m512 levels = _mm512_loadu_ps(tables.levels);
        const i64 blocks = K / block;
        __m512 local[Cols][Rows];
        load_sums(from ? sums : nullptr, local);
        for (i64 b = from / block; b < to / block; ++b) {
            __m512i table[Cols];
            __m512 part[Cols][Rows];
            const float* scale = scales + n * blocks + b;
#pragma GCC unroll 4
            for (int c = 0; c < Cols; ++c) table[c] = table_bf16(scale_sums ? 1.0f : scale[c * blocks], levels);
            if (scale_sums) load_sums(nullptr, part);
            for (i64 k = b * block; k < (b + 1) * block; k += 64, x += 64 * Rows) {
                __m512bh even[Cols], odd[Cols];
                fetch.next_piece();
#pragma GCC unroll 4
                for (int c = 0; c < Cols; ++c) {
                    const auto* codes = reinterpret_cast<const __m256i*>(packed + ((n + c) * K + k) / 2);
                    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes));
                    fetch.line();
                    even[c] = as_bf16(_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table[c]));
                    odd[c] = as_bf16(_mm512_permutexvar_epi16(bytes, table[c]));
                }
                add_products(even, x, scale_sums ? part : local);
                add_products(odd, x + 32 * Rows, scale_sums ? part : local);
            }
            if (scale_sums)
#pragma GCC unroll 4
                for (int c = 0; c < Cols; ++c)
#pragma GCC unroll 2
                    for (int m = 0; m < Rows; ++m)
                        local[c][m] = _mm512_fmadd_ps(part[c][m], _mm512_set1_ps(scale[c * blocks]), local[c][m]);
        }
        store_sums(local, sums);
    }
};

// NF4 codes, a block of rows decoded at once for all groups.
struct Decoded {
    static constexpr int width = 0, step = 32;
    Codes codes;
    u16* values;  // a block, [rows, stride]
    i64 stride;

    const void* stored() const { return codes.packed; }

    void prepare(i64 n, i64 rows, i64 from, i64 to) const {
        const i64 K = codes.K, block = codes.block;
        const __m512 levels = _mm512_loadu_ps(tables.levels);
        for (i64 row = 0; row < rows; ++row) {
            const float* scale = codes.scales + (n + row) * (K / block);
            const u8* packed = codes.packed + (n + row) * K / 2;
            u16* out = values + row * stride;
            for (i64 k = from; k < to;) {
                const __m512i table = table_bf16(scale[k / block], levels);
                const i64 stop = k / block * block + block < to ? k / block * block + block : to;
                for (; k < stop; k += 64, out += 64) {
                    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + k / 2)));
                    _mm512_store_si512(out, _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table));
                    _mm512_store_si512(out + 32, _mm512_permutexvar_epi16(bytes, table));
                }
            }
        }
    }

    template <int Rows, int Cols>
    void accumulate(const u16* x, i64, i64 from, i64 to, __m512* sums, Fetch fetch) const {
        Dense::multiply<Rows, Cols>(x, values, stride, to - from, from ? sums : nullptr, sums, fetch);
    }
};

// How M > 0 rows of x are multiplied: in groups of nearly one size, each with `cols` rows of the weight, over ranges of k
// that are multiples of `unit`; while a row of the weight is multiplied, the one `lead` rows on is fetched.
struct Plan {
    i64 M, K, groups, cols, range, lead;

    Plan(i64 M, i64 K, i64 unit, int width) : M(M), K(K) {
        cols = M <= wide_group ? 4 : 2;
        groups = (M + group - 1) / group;
        const i64 fits = groups > 1 ? 16384 : 8192;  // values of x: with less of many rows, sums would move too often
        const i64 ranges = (K * M + fits - 1) / fits;
        range = (K + ranges * unit - 1) / (ranges * unit) * unit;
        const i64 block = cols * (range << width) / 2;
        lead = (fetch_ahead + block - 1) / block * cols;
    }
    i64 first_row(i64 g) const { return M * g / groups; }
};

// x [M, K] -> for each group its parts [32] of each row side by side, k by k: read in one stream. `Split`: of every 64
// values those with even index, then those with odd index.
template <bool Split>
void arrange(const u16* x, const Plan& plan, u16* out) {
    alignas(64) u16 index[32];
    for (int i = 0; i < 32; ++i) index[i] = static_cast<u16>(2 * i);
    const __m512i even = _mm512_load_si512(index), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (i64 g = 0; g < plan.groups; ++g) {
        const i64 start = plan.first_row(g), rows = plan.first_row(g + 1) - start;
        for (i64 m = 0; m < rows; ++m)
            for (i64 k = 0; k < plan.K; k += 64) {
                const u16* at = x + (start + m) * plan.K + k;
                u16* to = out + start * plan.K + k * rows + 32 * m;
                const __m512i low = _mm512_loadu_si512(at), high = _mm512_loadu_si512(at + 32);
                _mm512_store_si512(to, Split ? _mm512_permutex2var_epi16(low, even, high) : low);
                _mm512_store_si512(to + 32 * rows, Split ? _mm512_permutex2var_epi16(low, odd, high) : high);
            }
    }
}

// What group g fetches while it is multiplied by the block that begins at row n of a panel of `rows`: its share of a block
// further on, in the same range of k or in the next.
template <class Panel>
Fetch fetch_of(const Panel& w, const Plan& plan, i64 rows, i64 n, i64 cols, i64 from, i64 to, i64 g) {
    const auto bytes = [](i64 values) { return (values << Panel::width) / 2; };
    const i64 stride = bytes(plan.K), length = bytes(to - from);
    i64 row = n + plan.lead, k = from, skip = 0;
    if (row >= rows) {
        k = to < plan.K ? to : 0;
        if (k) row -= rows;
    }
    if (g) {
        skip = cols * length * g / plan.groups;
        row += skip / length, skip %= length;
    }
    const char* piece = static_cast<const char*>(w.stored()) + row * stride + bytes(k);
    return {piece + skip, piece + length, stride - length, stride, (bytes(Panel::step) + plan.groups - 1) / plan.groups};
}

template <class Panel>
using Accumulate = void (Panel::*)(const u16*, i64, i64, i64, __m512*, Fetch) const;

// `accumulate` for so many rows of x, between Rows and Most.
template <int Rows, int Most, int Cols, class Panel>
Accumulate<Panel> kernel_of(i64 rows) {
    if constexpr (Rows < Most)
        if (rows != Rows) return kernel_of<Rows + 1, Most, Cols, Panel>(rows);
    return &Panel::template accumulate<Rows, Cols>;
}

// All rows of x, arranged, against `rows` rows of a panel -> y [M, N]. `sums` [M, panel].
template <class Panel>
void multiply_panel(const Panel& w, const Plan& plan, const u16* x, i64 rows, __m512* sums, u16* y, i64 N) {
    const auto multiply = [&](i64 n, i64 cols, i64 from, i64 to) {
        w.prepare(n, cols, from, to);
        for (i64 g = 0; g < plan.groups; ++g) {
            const i64 first = plan.first_row(g), count = plan.first_row(g + 1) - first;
            const auto kernel = cols == 4   ? kernel_of<1, wide_group, 4, Panel>(count)
                                : cols == 2 ? kernel_of<group / 2, group, 2, Panel>(count)
                                            : kernel_of<1, group, 1, Panel>(count);
            (w.*kernel)(x + first * plan.K + from * count, n, from, to, sums + first * panel + n * count,
                        fetch_of(w, plan, rows, n, cols, from, to, g));
        }
    };
    for (i64 from = 0; from < plan.K; from += plan.range) {
        const i64 to = from + plan.range < plan.K ? from + plan.range : plan.K;
        i64 n = 0;
        for (; n + plan.cols <= rows; n += plan.cols) multiply(n, plan.cols, from, to);
        for (; n < rows; ++n) multiply(n, 1, from, to);
    }
    for (i64 g = 0; g < plan.groups; ++g) {
        const i64 first = plan.first_row(g), count = plan.first_row(g + 1) - first;
        for (i64 m = 0; m < count; ++m)
            store_bf16(y + (first + m) * N, mask16(rows), sums_of(sums + first * panel + m, static_cast<int>(count)));
    }
}

}  // namespace
}  // namespace twinlora
#endif
