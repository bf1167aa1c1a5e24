// Many adapters in one batch: every row of y gets what its own adapter makes of its row of x. All bfloat16.
#pragma once

#include <cstdint>

namespace twinlora {

struct LoraSpan {
    const std::uint16_t *a, *b;      // A [rank, K], and B transposed [rank, N]
    std::int64_t rank, start, stop;  // rows [start, stop)
    float scale;
    std::uint16_t* y;  // [rows, N]
    std::int64_t n;
    std::int64_t ranks, blocks, hidden;  // before this span: rank rows, blocks of columns, products in `hidden`
};

struct GroupedLora {
    const std::uint16_t* x;  // [rows, K]
    std::int64_t k;
    const LoraSpan* spans;
    std::int64_t count;
    std::uint16_t* hidden;  // of each span [rows, hidden_stride(rank)]: x · A; zeros before
};

// Products of two rows of B are taken together.
constexpr std::int64_t hidden_stride(std::int64_t rank) { return (rank + 1) / 2 * 2; }

constexpr std::int64_t lora_block = 64;  // columns of y at once

struct Lora {
    void (*shrink)(const GroupedLora&, std::int64_t first, std::int64_t last);  // rank rows of all spans
    void (*expand)(const GroupedLora&, std::int64_t first, std::int64_t last);  // blocks of columns of all spans
};

// nullptr where the compiler cannot; needs what the path avx512-bf16 needs.
extern const Lora* const lora;

}  // namespace twinlora
