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

constexpr std::int64_t attention_block = 32;  // keys, and queries, of a square of scores

// The first block of keys that the block of queries from `query` on sees. (Internal linkage, as in portable.hpp.)
namespace {
[[maybe_unused]] inline std::int64_t first_block(const Heads& a, std::int64_t query) {
    return query < a.window ? 0 : (query - a.window + 1) / attention_block;
}
}  // namespace

// One item of work: queries of some heads that share a key/value head, in one sequence. Items are independent.
struct AttentionItem {
    std::int64_t sequence, kv_head;
    std::int64_t first_head, last_head;    // up to, not with, the last; so too the queries
    std::int64_t first_query, last_query;  // from the sequence's start; the first is a block's first
    std::int64_t first_key, keys;          // whole blocks: what these queries see, and what rounds it up
};
using AttentionForward = void(const Attention&, const AttentionItem&);

// `part` has room for float32 dK and dV of the item's sequence and key/value head (2 * D values a key, keys rounded up to
// whole blocks). The item writes those of its own keys; `add` adds them to another's, and `store` writes
// a sum to dk and dv. An item that is alone with its keys has nullptr and does so itself.
using AttentionBackward = void(const Attention&, const AttentionItem&, float* part);
using AttentionAdd = void(const Attention&, const AttentionItem&, float* part, float* total);
using AttentionStore = void(const Attention&, const AttentionItem&, float* total);

// New tokens of several sequences against cached keys and values; of one sequence they follow each other.
struct AttentionStep : Heads {
    std::uint16_t *keys, *values;        // caches [rows, K, capacity, D]; keys are cached rotated
    const std::int64_t *rows, *lengths;  // [T]: the sequence's row, and how many tokens it holds so far
    std::int64_t capacity;
};
// For the heads of a key/value head: `append` caches the token's key and value, `step` attends to those up to its own, which
// must be there.
using AttentionStepItem = void(const AttentionStep&, std::int64_t token, std::int64_t kv_head);

// nullptr where the compiler cannot. They need what the paths avx512-bf16 and amx-bf16 need, the last two the former.
struct AttentionKernels {
    AttentionForward* forward;
    AttentionBackward* backward;
    AttentionAdd* add;
    AttentionStore* store;
};
extern const AttentionKernels attention_avx512, attention_amx;
extern AttentionStepItem* const attention_append;
extern AttentionStepItem* const attention_step;

}  // namespace twinlora
