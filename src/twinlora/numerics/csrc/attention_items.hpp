// How a call of attention is cut into items of work. Its shapes alone decide, never the number of threads, so that
// results do not depend on that.
#pragma once

#include <vector>

#include "attention.hpp"

namespace twinlora {

// A unit: items side by side that add to the dK and dV of a key/value head in a sequence. Forward, each item alone.
struct AttentionWork {
    std::vector<AttentionItem> items;   // by falling cost
    std::vector<std::int64_t> unit_of;  // [items]
    std::vector<std::int64_t> first;    // [units + 1]: each unit's first item
};

// Reads of `a` the shapes alone.
AttentionWork cut_attention(const Attention& a, bool backward);

// Memory for dK and dV of items that are not alone in their unit: `count` times `floats`, for those that `threads` are at
// work on and one sum for each of their units.
struct AttentionParts {
    std::int64_t floats, count;
};
AttentionParts attention_parts(const AttentionWork& work, std::int64_t size, int threads);

void run_attention(const Attention& a, const AttentionKernels& kernels, bool backward, int threads);

}  // namespace twinlora
