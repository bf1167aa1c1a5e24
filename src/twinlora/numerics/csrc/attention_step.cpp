// Attention of few new tokens a sequence: bound by reading the cached keys and values, so one row at a time.
#include "attention_rows.hpp"
#include "tiles.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace twinlora {
namespace {

// The sum of `count` rows [16 * Width], `between` apart, each times its weight, times `scale` -> out.
template <int Width>
void weighted_sum(const u16* rows, i64 between, const float* weights, i64 count, __m512 scale, u16* out) {
    __m512 sums[2][Width];  // of even and odd rows: they hide each other's latency
    for (auto& part : sums)
        for (auto& sum : part) sum = _mm512_setzero_ps();
    const auto add = [&](i64 t, __m512* part) {
        const __m512 weight = _mm512_set1_ps(weights[t]);
#pragma GCC unroll 4
        for (int i = 0; i < Width; ++i) part[i] = _mm512_fmadd_ps(weight, load_bf16(rows + t * between + 16 * i), part[i]);
    };
    i64 t = 0;
    for (; t + 2 <= count; t += 2) add(t, sums[0]), add(t + 1, sums[1]);
    if (t < count) add(t, sums[0]);
    for (int i = 0; i < Width; ++i) store_bf16(out + 16 * i, _mm512_mul_ps(_mm512_add_ps(sums[0][i], sums[1][i]), scale));
}

// Where the cached keys, and values, of a token's sequence begin.
inline i64 cached(const AttentionStep& a, i64 token, i64 kv_head) {
    return (a.rows[token] * a.kv_heads + kv_head) * a.capacity * a.size;
}

void append(const AttentionStep& a, i64 token, i64 kv_head) {
    const i64 D = a.size, at = cached(a, token, kv_head) + a.lengths[token] * D;
    load_row(a, a.k + token * a.k_stride + kv_head * D, token, a.keys + at);
    __builtin_memcpy(a.values + at, a.v + token * a.v_stride + kv_head * D, 2 * D);
}

void step(const AttentionStep& a, i64 token, i64 kv_head) {
    const i64 D = a.size, group = a.heads / a.kv_heads, length = a.lengths[token] + 1;
    const i64 base = cached(a, token, kv_head);
    const i64 first = length > a.window ? length - a.window : 0, seen = length - first;
    const u16 *keys = a.keys + base + first * D, *values = a.values + base + first * D;
    thread_local Kept<float> kept;
    float* scores = kept.at_least(round_up(seen, 16));
    alignas(64) u16 q[256];
    for (i64 head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        load_row(a, a.q + token * a.q_stride + head * D, token, q);
        __m512 top = _mm512_set1_ps(-3.0e38f);
        for (i64 t = 0; t < seen; t += 16) {
            __m512 products[16];
            for (i64 i = 0; i < 16; ++i) {
                const u16* key = keys + (t + i < seen ? t + i : seen - 1) * D;
                products[i] = _mm512_setzero_ps();
                for (i64 d = 0; d < D; d += 32)
                    products[i] = _mm512_dpbf16_ps(products[i], (__m512bh)_mm512_load_si512(q + d),
                                                   (__m512bh)_mm512_loadu_si512(key + d));
            }
            const __m512 s = _mm512_mul_ps(sums_of(products, 1), _mm512_set1_ps(a.scale));
            top = _mm512_max_ps(top, s);
            _mm512_store_ps(scores + t, s);
        }
        top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        __m512 total = _mm512_setzero_ps();
        for (i64 t = 0; t < seen; t += 16) {
            const __m512 p = exponential(_mm512_sub_ps(_mm512_load_ps(scores + t), top));
            total = _mm512_mask_add_ps(total, mask16(seen - t), total, p);
            _mm512_store_ps(scores + t, p);
        }
        const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
        u16* out = a.out + (token * a.heads + head) * D;
        i64 d = 0;
        for (; d + 64 <= D; d += 64) weighted_sum<4>(values + d, D, scores, seen, inverse, out + d);
        if (d < D) weighted_sum<2>(values + d, D, scores, seen, inverse, out + d);
    }
}

}  // namespace

AttentionStepItem* const attention_append = append;
AttentionStepItem* const attention_step = step;

}  // namespace twinlora

#else

namespace twinlora {
AttentionStepItem* const attention_append = nullptr;
AttentionStepItem* const attention_step = nullptr;
}  // namespace twinlora

#endif
