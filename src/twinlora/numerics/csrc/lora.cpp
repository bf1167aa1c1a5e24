// See lora.hpp.
#include "lora.hpp"

#include "bf16.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

#include <algorithm>

namespace twinlora {
namespace {

// Each weight is used once a pass, and matrices end before the hardware has seen where the reading goes.
constexpr i64 ahead = 1024;  // weights of A, whose rows follow each other

inline void fetch(const u16* weights) { _mm_prefetch(reinterpret_cast<const char*>(weights), _MM_HINT_T0); }

// hidden[row, j] of `Rows` rows: their products with row j of A, which is read once.
template <int Rows>
void products(const u16* x, const u16* a, i64 k, float* out, i64 between) {
    __m512 sums[Rows];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (i64 i = 0; i < k; i += 32) {
        const __mmask32 mask = k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1;
        const __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + i);
        fetch(a + i + ahead);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
            sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * k + i), weights);
    }
    for (int r = 0; r < Rows; ++r) {
        const __m256i rounded = narrow(_mm512_set1_ps(_mm512_reduce_add_ps(sums[r])));
        out[r * between] = _mm512_cvtss_f32(widen(rounded));
    }
}

void shrink(const GroupedLora& g, i64 first, i64 last) {
    for (i64 s = 0; s < g.count; ++s) {
        const LoraSpan& span = g.spans[s];
        const i64 from = std::max<i64>(first - span.ranks, 0), to = std::min(last - span.ranks, span.rank);
        for (i64 j = from; j < to; ++j) {
            const u16* a = span.a + j * g.k;
            float* out = g.hidden + span.hidden + j;
            for (i64 row = span.start; row < span.stop; row += 4, out += 4 * span.rank) {
                const u16* x = g.x + row * g.k;
                switch (std::min<i64>(span.stop - row, 4)) {
                    case 1: products<1>(x, a, g.k, out, span.rank); break;
                    case 2: products<2>(x, a, g.k, out, span.rank); break;
                    case 3: products<3>(x, a, g.k, out, span.rank); break;
                    default: products<4>(x, a, g.k, out, span.rank);
                }
            }
        }
    }
}

// y[row, column …] of `Rows` rows and a block of at most 64 columns; B's block is read once.
template <int Rows>
void block(const LoraSpan& span, i64 columns, const u16* b, const float* hidden, u16* y) {
    __mmask16 masks[4];
    for (i64 c = 0; c < 4; ++c) masks[c] = mask16(std::max<i64>(columns - 16 * c, 0));
    __m512 sums[Rows][4];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    for (i64 j = 0; j < span.rank; ++j) {
        __m512 weights[4];
        fetch(b + j * span.n + 2 * lora_block);
        fetch(b + j * span.n + 2 * lora_block + 32);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) weights[c] = load_bf16(b + j * span.n + 16 * c, masks[c]);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            const __m512 factor = _mm512_set1_ps(hidden[r * span.rank + j]);
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) sums[r][c] = _mm512_fmadd_ps(factor, weights[c], sums[r][c]);
        }
    }
    const __m512 scale = _mm512_set1_ps(span.scale);
    for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < 4; ++c) {
            u16* out = y + r * span.n + 16 * c;
            store_bf16(out, masks[c], _mm512_fmadd_ps(scale, sums[r][c], load_bf16(out, masks[c])));
        }
}

void expand(const GroupedLora& g, i64 first, i64 last) {
    const LoraSpan* span = g.spans;
    for (i64 i = first; i < last; ++i) {
        while (span + 1 < g.spans + g.count && span[1].blocks <= i) ++span;
        const i64 column = (i - span->blocks) * lora_block, columns = std::min(span->n - column, lora_block);
        const float* hidden = g.hidden + span->hidden;
        const u16* b = span->b + column;
        for (i64 row = span->start; row < span->stop; row += 4, hidden += 4 * span->rank) {
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
