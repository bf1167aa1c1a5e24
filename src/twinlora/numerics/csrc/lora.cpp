// See lora.hpp.
#include "lora.hpp"

#include "bf16.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

#include <algorithm>

namespace twinlora {
namespace {

inline __m512i load(const u16* values, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, values); }
inline __mmask32 mask32(i64 count) { return count >= 32 ? 0xffffffffu : (1u << std::max<i64>(count, 0)) - 1; }

// 16 products: of `Rows` rows of x with 16 / Rows rows of A. Whatever their number, a sum takes its terms in one order.
// Of fewer rows the last stands in for the rest, and its products are left out.
template <int Rows>
void products(const u16* x, i64 rows, const u16* a, i64 ranks, i64 k, u16* hidden, i64 stride) {
    constexpr int Ranks = 16 / Rows;
    const u16 *xs[Rows], *as[Ranks];
    for (int r = 0; r < Rows; ++r) xs[r] = x + std::min<i64>(r, rows - 1) * k;
    for (int q = 0; q < Ranks; ++q) as[q] = a + std::min<i64>(q, ranks - 1) * k;
    __m512 sums[16];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (i64 i = 0; i < k; i += 32) {
        const __mmask32 mask = mask32(k - i);
        __m512bh values[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) values[r] = (__m512bh)load(xs[r] + i, mask);
#pragma GCC unroll 16
        for (int q = 0; q < Ranks; ++q) {
            const __m512bh weights = (__m512bh)load(as[q] + i, mask);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r)
                sums[r * Ranks + q] = _mm512_dpbf16_ps(sums[r * Ranks + q], values[r], weights);
        }
    }
    u16 rounded[16];
    store_bf16(rounded, sums_of(sums, 1));
    for (i64 r = 0; r < std::min<i64>(rows, Rows); ++r)
        std::copy_n(rounded + r * Ranks, std::min<i64>(ranks, Ranks), hidden + r * stride);
}

void shrink(const GroupedLora& g, i64 first, i64 last) {
    for (i64 s = 0; s < g.count; ++s) {
        const LoraSpan& span = g.spans[s];
        const i64 from = std::max<i64>(first - span.ranks, 0), to = std::min(last - span.ranks, span.rank);
        const i64 count = span.stop - span.start, stride = hidden_stride(span.rank);
        const int tall = count > 2 ? 4 : count == 2 ? 2 : 1;
        for (i64 j = from; j < to; j += 16 / tall)
            for (i64 row = 0; row < count; row += tall) {
                const u16 *x = g.x + (span.start + row) * g.k, *a = span.a + j * g.k;
                u16* out = g.hidden + span.hidden + row * stride + j;
                const auto kernel = tall == 1 ? products<1> : tall == 2 ? products<2> : products<4>;
                kernel(x, count - row, a, to - j, g.k, out, stride);
            }
    }
}

// y[row, column …] of `Rows` rows and a block of at most 64 columns: two rows of B at a time, their values side by side.
template <int Rows>
void block(const LoraSpan& span, i64 columns, const u16* b, const u16* hidden, u16* y) {
    const i64 stride = hidden_stride(span.rank);
    const __mmask32 masks[2] = {mask32(columns), mask32(columns - 32)};
    __m512 sums[Rows][4];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    for (i64 j = 0; j < span.rank; j += 2) {
        const u16* at = b + j * span.n;
        const bool pair = j + 1 < span.rank;
        __m512bh weights[4];
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
            const __m512i even = load(at + 32 * c, masks[c]), odd = load(at + span.n + 32 * c, pair ? masks[c] : 0);
            weights[2 * c] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
            weights[2 * c + 1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            int both;
            __builtin_memcpy(&both, hidden + r * stride + j, sizeof both);
            const __m512bh factors = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], weights[c], factors);
        }
    }
    // Unpacking took 4 values of each 8: put them in order.
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 scale = _mm512_set1_ps(span.scale);
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < 4; ++c) {
            const __m512 sum = _mm512_permutex2var_ps(sums[r][c & 2], c & 1 ? high : low, sums[r][(c & 2) + 1]);
            const __mmask16 mask = mask16(std::max<i64>(columns - 16 * c, 0));
            u16* out = y + r * span.n + 16 * c;
            store_bf16(out, mask, _mm512_fmadd_ps(scale, sum, load_bf16(out, mask)));
        }
}

void expand(const GroupedLora& g, i64 first, i64 last) {
    const LoraSpan* span = g.spans;
    for (i64 i = first; i < last; ++i) {
        while (span + 1 < g.spans + g.count && span[1].blocks <= i) ++span;
        const i64 column = (i - span->blocks) * lora_block, columns = std::min(span->n - column, lora_block);
        const u16 *b = span->b + column, *hidden = g.hidden + span->hidden;
        for (i64 row = span->start; row < span->stop; row += 4, hidden += 4 * hidden_stride(span->rank)) {
            u16* y = span->y + row * span->n + column;
            switch (std::min<i64>(span->stop - row, 4)) {
                case 1: block<1>(*span, columns, b, hidden, y); break;
                case 2: block<2>(*span, columns, b, hidden, y); break;
                case 3: block<3>(*span, columns, b, hidden, y); break;
                default: block<4>(*span, columns, b, hidden, y);
            }
        }
    }
}

const Lora kernels{shrink, expand};

}  // namespace

const Lora* const lora = &kernels;

}  // namespace twinlora

#else

namespace twinlora {
const Lora* const lora = nullptr;
}  // namespace twinlora

#endif
