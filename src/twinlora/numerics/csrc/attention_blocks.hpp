// Everything is key-major: scores lie as [keys, queries], so that maxima, sums and masks of 16 queries are vertical, and
// probabilities turn into a packed right-hand side by interleaving two rows. Scores of 32 queries against all their keys
// are at hand at once; nothing is rescaled on the way.
//
// The backward pass (FlashAttention-2, arXiv 2307.08691, in other blocks) takes 256 queries at a time past blocks of 32
// keys: dV and dK of a block are products over all these queries, dQ is one over all keys at the end.
//
// `Products` multiplies: `multiply<Add>(left, stride, steps, packed, out)` is out [32, 32] = left [32, 32 * steps] (rows
// `stride` apart) times the packed panel; with `Add`, out + that. An object of it lives as long as a thread works on an item.
#pragma once

#include "attention_rows.hpp"
#include "tiles.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <cmath>

namespace twinlora {
namespace {

constexpr i64 block = attention_block;
constexpr i64 queries_at_once = 256;

// The gradient of load_row: float32 [D] -> bfloat16.
inline void store_gradient(const Attention& a, const float* g, i64 token, u16* out) {
    const i64 half = a.size / 2;
    if (!a.cos) {
        for (i64 d = 0; d < a.size; d += 16) store_bf16(out + d, _mm512_load_ps(g + d));
        return;
    }
    const u16 *cos = a.cos + token * a.size, *sin = a.sin + token * a.size;
    for (i64 d = 0; d < half; d += 16) {
        const __m512 first = _mm512_load_ps(g + d), second = _mm512_load_ps(g + d + half);
        store_bf16(out + d, _mm512_fmadd_ps(first, load_bf16(cos + d),
                                            _mm512_mul_ps(second, load_bf16(sin + d + half))));
        store_bf16(out + d + half, _mm512_fmsub_ps(second, load_bf16(cos + d + half),
                                                   _mm512_mul_ps(first, load_bf16(sin + d))));
    }
}

// Rows [first, first + count) of a sequence's head, the missing ones zeros -> out [count, D].
inline void load_rows(const Attention& a, const u16* x, i64 stride, i64 start, i64 length, i64 first, i64 count, bool rotate,
               u16* out) {
    for (i64 i = first; i < first + count; ++i, out += a.size) {
        const i64 token = start + i;
        if (i >= length)
            __builtin_memset(out, 0, 2 * a.size);
        else if (rotate)
            load_row(a, x + token * stride, token, out);
        else
            __builtin_memcpy(out, x + token * stride, 2 * a.size);
    }
}

// rows [count, D] -> out [D, count]; count % 32 == 0. `scratch` holds D / 32 steps of a panel.
inline void transpose_rows(const u16* rows, i64 size, i64 count, u32* scratch, u16* out) {
    const __m512i even = _mm512_setr_epi32(0x00020000, 0x00060004, 0x000a0008, 0x000e000c, 0x00120010, 0x00160014,
                                           0x001a0018, 0x001e001c, 0x00220020, 0x00260024, 0x002a0028, 0x002e002c,
                                           0x00320030, 0x00360034, 0x003a0038, 0x003e003c);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (i64 first = 0; first < count; first += 32) {
        pack_rows(rows + first * size, size, size, scratch);
        for (i64 d = 0; d < size; d += 2) {
            const u32* pairs = scratch + d / step_depth * step_pairs + d % step_depth / 2 * 16;
            const __m512i low = _mm512_load_si512(pairs), high = _mm512_load_si512(pairs + 256);
            _mm512_storeu_si512(out + d * count + first, _mm512_permutex2var_epi16(low, even, high));
            _mm512_storeu_si512(out + (d + 1) * count + first, _mm512_permutex2var_epi16(low, odd, high));
        }
    }
}

// float32 [32, 32] transposed, its columns scaled -> rows of out, `stride` apart.
inline void transpose_block(const float* in, const __m512* scale, float* out, i64 stride) {
    for (i64 r = 0; r < 32; r += 16)
        for (i64 c = 0; c < 32; c += 16) {
            __m512i t[16];
            for (i64 i = 0; i < 16; ++i)
                t[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(in + (r + i) * 32 + c), scale[c / 16]));
            transpose16(t);
            for (i64 i = 0; i < 16; ++i) _mm512_store_si512(out + (c + i) * stride + r, t[i]);
        }
}

// Which of 16 queries, from `query` on, see `key`.
inline __mmask16 visible(const Attention& a, i64 key, i64 query) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i behind = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(query - key)));
    const int window = static_cast<int>(a.window < (1 << 30) ? a.window : (1 << 30));
    return _mm512_cmpge_epi32_mask(behind, _mm512_setzero_si512()) &
           _mm512_cmplt_epi32_mask(behind, _mm512_set1_epi32(window));
}

// Whether some of the block's queries do not see some of its keys.
inline bool partial(const Attention& a, i64 key, i64 query) {
    return key + block > query + 1 || query + block - key > a.window;
}

// Two rows of 16 values as pairs.
inline __m512i pairs_of(__m512 even, __m512 odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(narrow(even)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(odd)), 16));
}

template <class Products>
void forward(const Attention& a, const AttentionItem& item) {
    const i64 start = a.starts[item.sequence], length = a.starts[item.sequence + 1] - start, padded = item.keys;
    const i64 D = a.size, steps = D / step_depth, from = item.first_key;
    thread_local Kept<u16> kept_keys, kept_rows, kept_values;
    thread_local Kept<u32> kept_panel, kept_weights;
    thread_local Kept<float> kept_scores, kept_result;
    u16 *keys = kept_keys.at_least(padded * D), *rows = kept_rows.at_least(padded * D);
    u16* values_t = kept_values.at_least(D * padded);  // [D, padded]
    u32* panel = kept_panel.at_least(steps * step_pairs);
    u32* weights = kept_weights.at_least(padded / block * step_pairs);  // probabilities, not yet divided by their sums
    float *scores = kept_scores.at_least(padded * block), *result = kept_result.at_least(block * D);
    alignas(64) float product[1024], sums[block], tops[block];
    const Products products;

    load_rows(a, a.v + item.kv_head * D, a.v_stride, start, length, from, padded, false, rows);
    transpose_rows(rows, D, padded, panel, values_t);
    load_rows(a, a.k + item.kv_head * D, a.k_stride, start, length, from, padded, true, keys);
    const __m512 scale = _mm512_set1_ps(a.scale), lowest = _mm512_set1_ps(-3.0e38f);
    for (i64 head = item.first_head; head < item.last_head; ++head)
        for (i64 query = item.first_query; query < item.last_query; query += block) {
            load_rows(a, a.q + head * D, a.q_stride, start, length, query, block, true, rows);
            pack_rows(rows, D, D, panel);
            const i64 first = first_block(a, query), count = query / block + 1 - first;
            __m512 top[2] = {lowest, lowest};
            for (i64 j = 0; j < count; ++j) {
                const i64 key = (first + j) * block;
                float* s = scores + j * 1024;
                products.template multiply<false>(keys + (key - from) * D, D, steps, panel, s);
                const bool masked = partial(a, key, query);
                for (i64 r = 0; r < block; ++r)
                    for (int h = 0; h < 2; ++h) {
                        __m512 value = _mm512_load_ps(s + 32 * r + 16 * h);
                        if (masked) {
                            value = _mm512_mask_mov_ps(lowest, visible(a, key + r, query + 16 * h), value);
                            _mm512_store_ps(s + 32 * r + 16 * h, value);
                        }
                        top[h] = _mm512_max_ps(top[h], value);
                    }
            }
            __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int h = 0; h < 2; ++h) {
                top[h] = _mm512_mul_ps(top[h], scale);
                for (i64 r = 0; r < count * block; r += 2) {
                    __m512 p[2];
                    for (int i = 0; i < 2; ++i) {
                        const __m512 s = _mm512_load_ps(scores + 32 * (r + i) + 16 * h);
                        p[i] = exponential(_mm512_fmsub_ps(s, scale, top[h]));
                        p[i] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(s, lowest, _CMP_GT_OQ), p[i]);
                        total[h] = _mm512_add_ps(total[h], p[i]);
                    }
                    u32* pairs = weights + r / block * step_pairs + r % block / 2 * 16 + 256 * h;
                    _mm512_store_si512(pairs, pairs_of(p[0], p[1]));
                }
                _mm512_store_ps(sums + 16 * h, total[h]);
                _mm512_store_ps(tops + 16 * h, top[h]);
                total[h] = _mm512_div_ps(_mm512_set1_ps(1.0f), total[h]);
            }
            for (i64 d = 0; d < D; d += 32) {
                products.template multiply<false>(values_t + d * padded + first * block - from, padded, count, weights, product);
                transpose_block(product, total, result + d, D);
            }
            const i64 last = length - query < block ? length - query : block;
            for (i64 i = 0; i < last; ++i) {
                const i64 row = (start + query + i) * a.heads + head;
                for (i64 d = 0; d < D; d += 16) store_bf16(a.out + row * D + d, _mm512_load_ps(result + i * D + d));
                a.lse[row] = tops[i] + std::log(sums[i]);
            }
        }
}

struct Queries {
    i64 first, blocks;            // of the sequence
    u32 *across, *d_across;       // per block of queries: [D, 32] panels of q and of dout, for scores and for dP
    u32 *down, *d_down;           // per 32 values of D: [queries, 32] panels, for dK and dV
    u16 *weights, *d_scores;      // P and dS of one block of keys [32, queries]
    u32* d_scores_down;           // per block of queries: dS [keys, 32] as a panel
    float *lse, *delta;           // [queries]
};

// Probabilities and the gradient of the scores of one square, into the rows of a strip and into a panel.
inline void square(const Attention& a, const Queries& q, const float* s, const float* dp, i64 key, i64 i, u32* panel) {
    const i64 query = q.first + i * block, stride = q.blocks * block;
    const __m512 scale = _mm512_set1_ps(a.scale);
    const bool masked = partial(a, key, query);
    for (int h = 0; h < 2; ++h) {
        const __m512 lse = _mm512_load_ps(q.lse + i * block + 16 * h), delta = _mm512_load_ps(q.delta + i * block + 16 * h);
        for (i64 r = 0; r < block; r += 2) {
            __m512 ds[2];
            for (i64 k = 0; k < 2; ++k) {
                const i64 at = 32 * (r + k) + 16 * h, strip = (r + k) * stride + i * block + 16 * h;
                __m512 p = exponential(_mm512_fmsub_ps(_mm512_load_ps(s + at), scale, lse));
                if (masked) p = _mm512_maskz_mov_ps(visible(a, key + r + k, query + 16 * h), p);
                const __m512 centred = _mm512_sub_ps(_mm512_load_ps(dp + at), delta);
                ds[k] = _mm512_mul_ps(_mm512_mul_ps(p, scale), centred);
                store_bf16(q.weights + strip, p);
                store_bf16(q.d_scores + strip, ds[k]);
            }
            _mm512_store_si512(panel + r / 2 * 16 + 256 * h, pairs_of(ds[0], ds[1]));
        }
    }
}

// Float32 dK and dV of a key/value head in a sequence: each [keys / 32][D / 32] of [32, 32], for all its keys.
struct Sums {
    float *dk, *dv;
};

inline Sums sums_in(const Attention& a, const AttentionItem& item, float* memory) {
    return {memory, memory + round_up(a.starts[item.sequence + 1] - a.starts[item.sequence], block) * a.size};
}

inline void add(const Attention& a, const AttentionItem& item, float* part, float* total) {
    const Sums from = sums_in(a, item, part), to = sums_in(a, item, total);
    for (i64 i = item.first_key * a.size; i < (item.first_key + item.keys) * a.size; i += 16) {
        _mm512_store_ps(to.dk + i, _mm512_add_ps(_mm512_load_ps(to.dk + i), _mm512_load_ps(from.dk + i)));
        _mm512_store_ps(to.dv + i, _mm512_add_ps(_mm512_load_ps(to.dv + i), _mm512_load_ps(from.dv + i)));
    }
}

inline void store(const Attention& a, const AttentionItem& item, float* total) {
    const Sums sums = sums_in(a, item, total);
    alignas(64) float row[256];
    for (i64 i = 0; i < a.starts[item.sequence + 1] - a.starts[item.sequence]; ++i) {
        const i64 token = a.starts[item.sequence] + i, target = (token * a.kv_heads + item.kv_head) * a.size;
        const i64 source = i / block * block * a.size + i % block * 32;
        for (i64 d = 0; d < a.size; d += 16) {
            const i64 at = source + d / 32 * 1024 + d % 32;
            _mm512_store_ps(row + d, _mm512_load_ps(sums.dk + at));
            store_bf16(a.dv + target + d, _mm512_load_ps(sums.dv + at));
        }
        store_gradient(a, row, token, a.dk + target);
    }
}

template <class Products>
void backward(const Attention& a, const AttentionItem& item, float* part) {
    const i64 start = a.starts[item.sequence], length = a.starts[item.sequence + 1] - start;
    const i64 from = item.first_key, padded = item.keys, key_blocks = padded / block, end = from + padded;
    const i64 queries = end - item.first_query, most = queries < queries_at_once ? queries : queries_at_once;
    const i64 D = a.size, steps = D / step_depth, panel = steps * step_pairs;
    thread_local Kept<u16> kept_keys, kept_keys_t, kept_values, kept_rows, kept_strips;
    thread_local Kept<u32> kept_panels, kept_scores;
    thread_local Kept<float> kept_sums, kept_rows32;
    u16 *keys = kept_keys.at_least(padded * D), *values = kept_values.at_least(padded * D);
    u16* keys_t = kept_keys_t.at_least(D * padded);
    u16 *q_rows = kept_rows.at_least(2 * most * D), *d_rows = q_rows + most * D;
    const i64 panels = most / block * panel;  // words of all queries' panels, across or down
    Queries q{};
    q.across = kept_panels.at_least(4 * panels);
    q.d_across = q.across + panels, q.down = q.across + 2 * panels, q.d_down = q.across + 3 * panels;
    q.weights = kept_strips.at_least(2 * block * most), q.d_scores = q.weights + block * most;
    q.d_scores_down = kept_scores.at_least(most / block * key_blocks * step_pairs);
    float *sums = part ? part : kept_sums.at_least(2 * padded * D), *result = kept_rows32.at_least(block * D);
    float *dk = sums_in(a, item, sums).dk + from * D, *dv = sums_in(a, item, sums).dv + from * D;
    alignas(64) float s[1024], dp[1024], lse[queries_at_once], delta[queries_at_once];
    q.lse = lse, q.delta = delta;
    const Products products;

    load_rows(a, a.v + item.kv_head * D, a.v_stride, start, length, from, padded, false, values);
    load_rows(a, a.k + item.kv_head * D, a.k_stride, start, length, from, padded, true, keys);
    transpose_rows(keys, D, padded, q.across, keys_t);
    __builtin_memset(dk, 0, 4 * padded * D), __builtin_memset(dv, 0, 4 * padded * D);
    const __m512 ones[2] = {_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f)};
    for (i64 head = item.first_head; head < item.last_head; ++head)
        for (q.first = item.first_query; q.first < end; q.first += most) {
            const i64 count = end - q.first < most ? end - q.first : most;
            q.blocks = count / block;
            load_rows(a, a.q + head * D, a.q_stride, start, length, q.first, count, true, q_rows);
            load_rows(a, a.dout + head * D, a.heads * D, start, length, q.first, count, false, d_rows);
            for (i64 i = 0; i < count; ++i) {
                // Rows past the end have dout = 0: with any finite lse they add nothing.
                const i64 row = (start + q.first + i) * a.heads + head;
                const bool real = q.first + i < length;
                lse[i] = real ? a.lse[row] : 0.0f;
                __m512 total = _mm512_setzero_ps();
                for (i64 d = 0; real && d < D; d += 16)
                    total = _mm512_fmadd_ps(load_bf16(a.out + row * D + d), load_bf16(d_rows + i * D + d), total);
                delta[i] = _mm512_reduce_add_ps(total);
            }
            for (i64 i = 0; i < q.blocks; ++i) {
                pack_rows(q_rows + i * block * D, D, D, q.across + i * panel);
                pack_rows(d_rows + i * block * D, D, D, q.d_across + i * panel);
            }
            const i64 depth = q.blocks * step_pairs;  // words of a panel down
            for (i64 d = 0; d < steps; ++d) {
                pack_columns(q_rows + d * 32, D, count, q.down + d * depth);
                pack_columns(d_rows + d * 32, D, count, q.d_down + d * depth);
            }
            for (i64 j = first_block(a, q.first); j < (q.first + count) / block; ++j) {
                const i64 key = j * block, row = key - from, first = key > q.first ? (key - q.first) / block : 0;
                // The last query that sees the block's last key is `window - 1` behind it.
                i64 to = q.blocks;
                if (a.window < length) {
                    const i64 past = (key + block - 1 + a.window - q.first + block - 1) / block;
                    to = past < to ? past : to;
                }
                if (first >= to) continue;
                for (i64 i = first; i < to; ++i) {
                    products.template multiply<false>(keys + row * D, D, steps, q.across + i * panel, s);
                    products.template multiply<false>(values + row * D, D, steps, q.d_across + i * panel, dp);
                    square(a, q, s, dp, key, i, q.d_scores_down + (i * key_blocks + row / block) * step_pairs);
                }
                for (i64 d = 0; d < steps; ++d) {
                    const i64 target = row * D + d * 1024, skip = d * depth + first * step_pairs;
                    products.template multiply<true>(q.weights + first * block, count, to - first, q.d_down + skip, dv + target);
                    products.template multiply<true>(q.d_scores + first * block, count, to - first, q.down + skip, dk + target);
                }
            }
            for (i64 i = 0; i < q.blocks; ++i) {
                const i64 query = q.first + i * block, row = first_block(a, query) * block - from;
                const i64 blocks = (query + block - from - row) / block;
                for (i64 d = 0; d < D; d += 32) {
                    products.template multiply<false>(keys_t + d * padded + row, padded, blocks,
                                   q.d_scores_down + (i * key_blocks + row / block) * step_pairs, s);
                    transpose_block(s, ones, result + d, D);
                }
                for (i64 r = 0; r < block && query + r < length; ++r) {
                    const i64 token = start + query + r;
                    store_gradient(a, result + r * D, token, a.dq + (token * a.heads + head) * D);
                }
            }
        }
    if (!part) store(a, item, sums);
}

template <class Products>
constexpr AttentionKernels kernels_with{forward<Products>, backward<Products>, add, store};

}  // namespace
}  // namespace twinlora
#endif
