// Causal attention within sequences that lie side by side, forward and backward, without a stored square.
#pragma once

#include <cstdint>

namespace twinlora {

// Shapes: T tokens, H query heads, K key/value heads, D head size (a multiple of 32, at most 256). All bfloat16.
struct Heads {
    const std::uint16_t *q, *k, *v;             // [T, H, D], [T, K, D], [T, K, D]
    std::int64_t q_stride, k_stride, v_stride;  // between tokens
    const std::uint16_t *cos, *sin;             // [T, D]: q and k are rotated by them (rotate-half); or nullptr
    std::int64_t heads, kv_heads, size;
    float scale;
    std::int64_t window;  // keys a query sees, itself included
    std::uint16_t* out;   // [T, H, D]
};

struct Attention : Heads {
    const std::int64_t* starts;  // [sequences + 1]
    std::int64_t sequences;
    float* lse;  // [T, H]: log of the sum of exponentials
    // Backward only.
    const std::uint16_t* dout;     // [T, H, D]
    std::uint16_t *dq, *dk, *dv;   // as q, k, v, but contiguous
};

// One item of work: the queries of one key/value head in one sequence. Items are independent.
using AttentionItem = void(const Attention&, std::int64_t sequence, std::int64_t kv_head);

// One new token of several sequences against cached keys and values.
struct AttentionStep : Heads {
    std::uint16_t *keys, *values;        // caches [rows, K, capacity, D]; keys are cached rotated
    const std::int64_t *rows, *lengths;  // [T]: the sequence's row, and how many tokens it holds so far
    std::int64_t capacity;
};
using AttentionStepItem = void(const AttentionStep&, std::int64_t token, std::int64_t kv_head);

// nullptr where the compiler cannot; needs what the path avx512-bf16 needs.
extern AttentionItem* const attention_forward;
extern AttentionItem* const attention_backward;
extern AttentionStepItem* const attention_step;

}  // namespace twinlora
