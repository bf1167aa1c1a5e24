// What every instruction-set path offers. All arithmetic is defined by numerics/reference.py; a path may only be faster.
//
// A block of NF4 weights shares one scale, so it has 16 values at most: every path computes those 16 products in
// float32, rounds each once to the output type, and then only looks codes up. That is why all paths agree bit for bit.
// NF3 is alike, with 8 values; an int8 weight is its code times the block's step, one product in float32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace twinlora {

enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// The tables of numerics/nf4.py, handed over once from Python so that they exist in one place.
struct Tables {
    float levels[16];         // NF4 codebook, ascending
    float borders[16];        // 15 decision borders, padded with +inf
    float dynamic_map[256];   // signed 8-bit dynamic map, ascending
    float dynamic_borders[256];  // 255 borders, padded with +inf
    float nf3_levels[8];         // NF3 codebook, ascending
};
extern Tables tables;

// Scales of blocks: float32, or codes of the dynamic map with a scale per nested block and an offset.
struct Scales {
    const float* plain;          // nullptr if nested
    const std::uint8_t* codes;
    const float* nested;
    float offset;
    int nested_shift;  // log2 of the nested block size
};

// Memory that is read after a product, fetched while it runs where it leaves some of the memory's rate unused.
struct Region {
    const void* at;
    std::int64_t bytes;
};

struct Path {
    const char* name;
    bool (*supported)();
    // Whole blocks [first, last) of `block` weights; `packed` and `out` point at the tensor's start.
    void (*dequantize)(const std::uint8_t* packed, const Scales&, std::int64_t first, std::int64_t last, int block, Type,
                       void* out);
    // The same for NF3 (eight codes in three bytes) and for int8.
    void (*dequantize_nf3)(const std::uint8_t* packed, const Scales&, std::int64_t first, std::int64_t last, int block,
                           Type, void* out);
    void (*dequantize_int8)(const std::uint8_t* codes, const Scales&, std::int64_t first, std::int64_t last, int block,
                            Type, void* out);
    // Whole blocks [first, last) of x; writes codes and block maxima. NaN and Inf show in the maximum.
    void (*quantize)(const void* x, Type, std::int64_t first, std::int64_t last, int block, std::uint8_t* packed,
                     float* scales);
    // y[m, n] = x[m, :] · W[n, :] for rows n in [first, last) of the NF4 weight W [N, K], all bfloat16, float32 sums.
    // K is a multiple of block, block of 64; x [M, K], y [M, N].
    void (*multiply_rows)(const std::uint16_t* x, const std::uint8_t* packed, const Scales&, std::uint16_t* y,
                          std::int64_t M, std::int64_t N, std::int64_t K, int block, std::int64_t first,
                          std::int64_t last);
    // The same for a dense W; K a multiple of 64. nullptr where a GEMM library does as well.
    void (*multiply_dense)(const std::uint16_t* x, const std::uint16_t* w, std::uint16_t* y, std::int64_t M,
                           std::int64_t N, std::int64_t K, std::int64_t first, std::int64_t last, const Region* soon,
                           std::int64_t regions);
};

extern const Path portable, avx2, avx512;

// Products on AMX tiles, for a processor that has the rest from avx512.
struct TileProducts {
    bool (*supported)();
    decltype(Path::multiply_rows) multiply_rows;
    decltype(Path::multiply_dense) multiply_dense;
};

extern const TileProducts tiles;

}  // namespace twinlora
