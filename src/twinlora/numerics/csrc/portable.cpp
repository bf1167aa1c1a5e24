// Plain C++: the path of every machine, and the tails of the others.
#include "portable.hpp"

namespace twinlora {

Tables tables;

namespace {

bool always() { return true; }

void dequantize(const std::uint8_t* packed, const Scales& scales, std::int64_t first, std::int64_t last, int block,
                Type type, void* out) {
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t start = b * block;
        dequantize_part(packed + start / 2, scale_of(scales, b), block, type, at(out, type, start));
    }
}

void quantize(const void* x, Type type, std::int64_t first, std::int64_t last, int block, std::uint8_t* packed,
              float* scales) {
    for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t start = b * block;
        scales[b] = quantize_part(at(x, type, start), type, block, packed + start / 2);
    }
}

void multiply_rows(const std::uint16_t* x, const std::uint8_t* packed, const Scales& scales, std::uint16_t* y,
                   std::int64_t M, std::int64_t N, std::int64_t K, int block, std::int64_t first, std::int64_t last) {
    Scratch<std::uint16_t> row(K);
    for (std::int64_t n = first; n < last; ++n) {
        for (std::int64_t k = 0; k < K; k += block)
            dequantize_part(packed + (n * K + k) / 2, scale_of(scales, (n * K + k) / block), block, Type::bfloat16, row.values + k);
        for (std::int64_t m = 0; m < M; ++m) y[m * N + n] = to_bfloat16(dot(x + m * K, row.values, K));
    }
}

}  // namespace

const Path portable{"portable", always, dequantize, nf3_blocks, int8_blocks, quantize, multiply_rows, nullptr};

}  // namespace twinlora
