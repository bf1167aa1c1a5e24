// Products of few rows of x [M, K] with the rows of a weight, which is read once, at the speed of memory.
//
// A panel of 16 rows of the weight is multiplied by all of x, a group of rows of x at a time: two or four rows of the weight
// with up to twelve of x have their sums in registers. x is laid out anew and is cut in ranges of k that stay in the first
// cache. What follows in memory is fetched meanwhile, line by line in the order of addresses.
//
// Whatever M, the groups and the ranges are, a sum takes its products in one order: a row's result depends on it alone, with
// NF4 from three rows on.
// Internal linkage throughout, as in portable.hpp.
#pragma once

#include "bf16.hpp"

#include <algorithm>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace twinlora {
namespace {

constexpr i64 panel = 16;
constexpr i64 wide_group = 6, group = 12;  // rows of x that go together: with four rows of the weight, and with two
constexpr i64 range_values = 8192;         // of x in a range
constexpr i64 fetch_ahead = 8192;          // bytes

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

// The block's 16 values in bfloat16, twice. Denormals become 0 here, as they would in the product.
inline __m512i table_bf16(float scale, __m512 levels) {
    const __m256bh values = _mm512_cvtneps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
    return _mm512_broadcast_i64x4((__m256i)values);
}

// Scales of blocks [first, last) as float32. Looked up one by one: a gather takes several times as long.
[[maybe_unused]] inline void decode_scales(const Scales& scales, i64 first, i64 last, float* out) {
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

// Blocks of codes -> bfloat16, in the order that `arrange<true>` gives to x.
[[maybe_unused]] inline void decode_split(const u8* packed, const float* scales, i64 blocks, int block, u16* out) {
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

// What to fetch, a line for each row of a block at every step: lines that follow each other, through pieces of rows.
struct Fetch {
    const char *at, *end;  // of the present piece
    i64 gap, stride;       // to the next piece
    i64 pace;              // from line to line

    template <int Cols>
    inline void lines() {
        if (at >= end) at += gap, end += stride;
#pragma GCC unroll 4
        for (int c = 0; c < Cols; ++c) _mm_prefetch(at + c * pace, _MM_HINT_T0);
        at += Cols * pace;
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
// in [from, to), to `sums` [Cols][Rows]; from 0 on, it sets them. x begins at `from`.

// bfloat16.
struct Dense {
    static constexpr i64 step = 32;  // values for which a line is fetched
    const u16* w;                    // [panel, K], `stride` apart
    i64 K, stride;

    template <int Rows, int Cols>
    [[gnu::always_inline]] inline void accumulate(const u16* x, i64 n, i64 from, i64 to, __m512* sums, Fetch fetch) const {
        const u16* at = w + n * stride;
        __m512 local[Cols][Rows];
        load_sums(from ? sums : nullptr, local);
        for (i64 k = from; k < to; k += 32, x += 32 * Rows) {
            __m512bh values[Cols];
            fetch.lines<Cols>();
#pragma GCC unroll 4
            for (int c = 0; c < Cols; ++c) values[c] = as_bf16(_mm512_loadu_si512(at + c * stride + k));
            add_products(values, x, local);
        }
        store_sums(local, sums);
    }
};

// NF4 codes, looked up 64 at a time as they are multiplied, the even and the odd ones apart.
// For one or two rows the scale is applied to a block's sum, for more to the table of its values.
struct Codes {
    static constexpr i64 step = 64;
    const u8* packed;
    const float* scales;  // [panel, K / block]
    i64 K;
    int block;

    template <int Rows, int Cols>
    [[gnu::always_inline]] inline void accumulate(const u16* x, i64 n, i64 from, i64 to, __m512* sums, Fetch fetch) const {
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
                fetch.lines<Cols>();
#pragma GCC unroll 4
                for (int c = 0; c < Cols; ++c) {
                    const auto* codes = reinterpret_cast<const __m256i*>(packed + ((n + c) * K + k) / 2);
                    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes));
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

// How M > 0 rows of x are multiplied: in groups of nearly one size.
struct Plan {
    i64 M, K, groups;

    Plan(i64 M, i64 K) : M(M), K(K), groups(M <= group ? 1 : (M + wide_group - 1) / wide_group) {}
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

// A panel as it lies in memory: rows of `stride` bytes, a value in 2^width half-bytes.
struct Stored {
    const void* at;
    i64 stride;
    int width;

    i64 bytes(i64 values) const { return (values << width) / 2; }
};

// What group g fetches while it is multiplied by blocks of Cols rows, over k in [from, to), of a panel of `rows`. One group
// alone: the block that is read `fetch_ahead` bytes later. Several: each its share of the same block of the next panel.
template <int Cols>
struct Ahead {
    const char *here, *next;  // where the block `lead` rows on begins, for the first block; and from the row `turn` on
    i64 turn, length;
    Fetch fetch;

    Ahead(const Stored& stored, i64 groups, i64 g, i64 rows, i64 K, i64 from, i64 to, i64 step) {
        length = stored.bytes(to - from);
        const i64 lead = groups > 1 ? panel : (fetch_ahead + Cols * length - 1) / (Cols * length) * Cols;
        const i64 skip = Cols * length * g / groups, whole = skip / length;
        const char* base = static_cast<const char*>(stored.at) + (lead + whole) * stored.stride + skip - whole * length;
        here = base + stored.bytes(from);
        next = to < K ? base - rows * stored.stride + stored.bytes(to) : base;
        turn = groups > 1 ? rows : rows - lead;
        length -= skip - whole * length;
        fetch = {nullptr, nullptr, stored.stride - stored.bytes(to - from), stored.stride,
                 (stored.bytes(step) + groups - 1) / groups};
    }
    inline Fetch of(i64 n) const {
        Fetch out = fetch;
        out.at = (n < turn ? here : next) + n * out.stride;
        out.end = out.at + length;
        return out;
    }
};

// Fetches regions evenly over the end of `work`, products of values of `groups` groups that are done a part at a time: over
// twice as many bytes of weights as the regions have. Fetched earlier, they would be gone again where weights are large.
class Soon {
public:
    Soon(const Region* regions, i64 count, i64 work, i64 groups) : next_(regions), last_(regions + count) {
        for (const Region* r = regions; r < last_; ++r) lines_ += (r->bytes + 63) / 64;
        price_ = std::min(work, 64 * lines_ * groups);
        owed_ = (price_ - work) * lines_;
    }
    inline void done(i64 part) {
        for (owed_ += part * lines_; owed_ >= price_ && next_ < last_; owed_ -= price_, at_ += 64) {
            if (at_ >= next_->bytes && (at_ = 0, ++next_ == last_)) return;
            _mm_prefetch(static_cast<const char*>(next_->at) + at_, _MM_HINT_T1);
        }
    }

private:
    const Region *next_, *last_;
    i64 price_, owed_, lines_ = 0, at_ = 0;
};

// Group g, `Rows` rows of x, against `rows` rows of a panel -> y [Rows, N]. k is cut at multiples of `unit`.
template <int Rows, int Cols, class Panel>
void multiply(const Panel& w, const Stored& stored, i64 groups, i64 g, const u16* x, i64 rows, i64 unit, u16* y, i64 N,
              Soon& soon) {
    const i64 ranges = (w.K * Rows + range_values - 1) / range_values;
    const i64 range = (w.K + ranges * unit - 1) / (ranges * unit) * unit;
    __m512 sums[panel * Rows];
    for (i64 from = 0; from < w.K; from += range, x += range * Rows) {
        const i64 to = from + range < w.K ? from + range : w.K;
        const Ahead<Cols> ahead(stored, groups, g, rows, w.K, from, to, Panel::step);
        i64 n = 0;
        for (; n + Cols <= rows; n += Cols) {
            w.template accumulate<Rows, Cols>(x, n, from, to, sums + n * Rows, ahead.of(n));
            soon.done(Cols * (to - from));
        }
        for (; n < rows; ++n) w.template accumulate<Rows, 1>(x, n, from, to, sums + n * Rows, ahead.of(n));
    }
    for (int m = 0; m < Rows; ++m) store_bf16(y + m * N, mask16(rows), sums_of(sums + m, Rows));
}

// All rows of x, arranged, against `rows` rows of a panel.
template <class Panel>
void multiply_panel(const Panel& w, const Stored& stored, const Plan& plan, const u16* x, i64 rows, i64 unit, u16* y,
                    i64 N, Soon& soon) {
    constexpr decltype(&multiply<1, 4, Panel>) kernels[] = {
        multiply<1, 4, Panel>, multiply<2, 4, Panel>, multiply<3, 4, Panel>,  multiply<4, 4, Panel>,
        multiply<5, 4, Panel>, multiply<6, 4, Panel>, multiply<7, 2, Panel>,  multiply<8, 2, Panel>,
        multiply<9, 2, Panel>, multiply<10, 2, Panel>, multiply<11, 2, Panel>, multiply<12, 2, Panel>};
    for (i64 g = 0; g < plan.groups; ++g) {
        const i64 first = plan.first_row(g), count = plan.first_row(g + 1) - first;
        kernels[count - 1](w, stored, plan.groups, g, x + first * plan.K, rows, unit, y + first * N, N,
                           soon);
    }
}

}  // namespace
}  // namespace twinlora
#endif
