// What stands between the products of a transformer block: one pass over memory each, rows [first, last). All bfloat16.
#pragma once

#include <cstdint>

namespace twinlora {

struct RmsNorm {
    const std::uint16_t *x, *weight;  // [rows, D], [D]
    std::int64_t width;
    float eps, offset;  // weight + offset is what multiplies
    bool wide;          // the normalised x is not rounded before it is multiplied
    std::uint16_t* out;
    float* rstd;               // [rows]: 1 / root mean square
    const std::uint16_t* dy;   // backward: out gets dx
};

struct SwiGlu {
    const std::uint16_t *gate, *up;  // [n]
    std::uint16_t* out;              // silu(gate) * up
    const std::uint16_t* dy;         // backward
    std::uint16_t *d_gate, *d_up;
};

struct CrossEntropy {
    std::uint16_t* logits;  // [rows, V]; becomes softmax less one at the label, the gradient of the loss
    const std::int64_t* labels;
    std::int64_t width;
    float* losses;  // [rows]
};

struct Elementwise {
    void (*rms_norm)(const RmsNorm&, std::int64_t first, std::int64_t last);
    void (*rms_norm_backward)(const RmsNorm&, std::int64_t first, std::int64_t last);
    void (*swiglu)(const SwiGlu&, std::int64_t first, std::int64_t last);
    void (*swiglu_backward)(const SwiGlu&, std::int64_t first, std::int64_t last);
    void (*cross_entropy)(const CrossEntropy&, std::int64_t first, std::int64_t last);
};

// nullptr where the compiler cannot; needs what the path avx512-bf16 needs.
extern const Elementwise* const elementwise;

}  // namespace twinlora
