// One block at a time, in plain C++. Everything has internal linkage, and nothing here instantiates a template of the
// library: the linker would merge copies, and the portable path would run another path's instructions.
#pragma once

#include <new>

#include "kernels.hpp"

namespace twinlora {
namespace {

// Rounding to nearest even; finite input.
[[maybe_unused]] inline std::uint16_t to_bfloat16(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

[[maybe_unused]] inline float from_bfloat16(std::uint16_t value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
}

[[maybe_unused]] inline float scale_of(const Scales& scales, std::int64_t block) {
    if (scales.plain) return scales.plain[block];
    const float product = tables.dynamic_map[scales.codes[block]] * scales.nested[block >> scales.nested_shift];
    return product + scales.offset;
}

[[maybe_unused]] inline int bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

[[maybe_unused]] inline void* at(void* base, Type type, std::int64_t index) {
    return static_cast<char*>(base) + index * bytes_of(type);
}

[[maybe_unused]] inline const void* at(const void* base, Type type, std::int64_t index) {
    return static_cast<const char*>(base) + index * bytes_of(type);
}

// IEEE half, rounding to nearest even; finite input, overflow gives infinity as a cast does.
[[maybe_unused]] inline std::uint16_t to_float16(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (bits < 0x38800000u) {  // subnormal: the addition of a half aligns the digits and rounds them
        float magnitude;
        __builtin_memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        __builtin_memcpy(&bits, &magnitude, 4);
        return static_cast<std::uint16_t>(sign | (bits - 0x3f000000u));
    }
    const std::uint32_t odd = (bits >> 13) & 1u;
    return static_cast<std::uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + odd) >> 13));
}

[[maybe_unused]] inline float from_float16(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    std::uint32_t exponent = (half >> 10) & 31u, digits = half & 1023u, bits;
    float out;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (digits << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112u) << 23) | (digits << 13);
    } else {
        out = static_cast<float>(digits) * 0x1p-24f;
        return sign ? -out : out;
    }
    __builtin_memcpy(&out, &bits, 4);
    return out;
}

[[maybe_unused]] inline float load(const void* x, Type type, std::int64_t i) {
    if (type == Type::float32) return static_cast<const float*>(x)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(x)[i];
    return type == Type::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// The first `count` weights of a block with this scale.
[[maybe_unused]] inline void dequantize_part(const std::uint8_t* packed, float scale, std::int64_t count, Type type,
                                             void* out) {
    auto code = [&](std::int64_t i) { return i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4; };
    if (type == Type::float32) {
        for (std::int64_t i = 0; i < count; ++i) static_cast<float*>(out)[i] = tables.levels[code(i)] * scale;
        return;
    }
    std::uint16_t values[16];
    for (int i = 0; i < 16; ++i) {
        const float product = tables.levels[i] * scale;
        values[i] = type == Type::bfloat16 ? to_bfloat16(product) : to_float16(product);
    }
    for (std::int64_t i = 0; i < count; ++i) static_cast<std::uint16_t*>(out)[i] = values[code(i)];
}

// The same of NF3: code i of eight lies in bits 3i to 3i + 2 of three bytes, least byte first.
[[maybe_unused]] inline void nf3_part(const std::uint8_t* packed, float scale, std::int64_t count, Type type, void* out) {
    float products[8];
    std::uint16_t values[8];
    for (int i = 0; i < 8; ++i) {
        products[i] = tables.nf3_levels[i] * scale;
        values[i] = type == Type::float16 ? to_float16(products[i]) : to_bfloat16(products[i]);
    }
    for (std::int64_t i = 0; i < count; i += 8, packed += 3) {
        std::uint32_t word = packed[0] | packed[1] << 8 | packed[2] << 16;
        for (std::int64_t j = i; j < i + 8 && j < count; ++j, word >>= 3) {
            if (type == Type::float32)
                static_cast<float*>(out)[j] = products[word & 7];
            else
                static_cast<std::uint16_t*>(out)[j] = values[word & 7];
        }
    }
}

// The same of int8. Compiled in every path, with that path's instructions.
[[maybe_unused]] inline void int8_part(const std::uint8_t* packed, float scale, std::int64_t count, Type type, void* out) {
    const float step = scale / 127.0f;
    const auto* codes = reinterpret_cast<const std::int8_t*>(packed);
    auto* halves = static_cast<std::uint16_t*>(out);
    if (type == Type::float32)
        for (std::int64_t i = 0; i < count; ++i) static_cast<float*>(out)[i] = static_cast<float>(codes[i]) * step;
    else if (type == Type::bfloat16)
        for (std::int64_t i = 0; i < count; ++i) halves[i] = to_bfloat16(static_cast<float>(codes[i]) * step);
    else
        for (std::int64_t i = 0; i < count; ++i) halves[i] = to_float16(static_cast<float>(codes[i]) * step);
}

[[maybe_unused]] inline void nf3_blocks(const std::uint8_t* packed, const Scales& scales, std::int64_t first,
                                        std::int64_t last, int block, Type type, void* out) {
    for (std::int64_t b = first; b < last; ++b)
        nf3_part(packed + b * block / 8 * 3, scale_of(scales, b), block, type, at(out, type, b * block));
}

[[maybe_unused]] inline void int8_blocks(const std::uint8_t* codes, const Scales& scales, std::int64_t first,
                                         std::int64_t last, int block, Type type, void* out) {
    for (std::int64_t b = first; b < last; ++b)
        int8_part(codes + b * block, scale_of(scales, b), block, type, at(out, type, b * block));
}

// Quantises `count` values as one block and returns its maximum. The missing half of a last byte holds level 0.
[[maybe_unused]] inline float quantize_part(const void* x, Type type, std::int64_t count, std::uint8_t* packed) {
    std::uint32_t largest = 0;  // of the bits without sign: NaN and Inf are above every number
    for (std::int64_t i = 0; i < count; ++i) {
        const float value = load(x, type, i);
        std::uint32_t bits;
        __builtin_memcpy(&bits, &value, 4);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    float maximum;
    __builtin_memcpy(&maximum, &largest, 4);
    const float limit = 3.40282346638528859811704183484516925e+38f;
    float inverse = 1.0f / maximum;
    inverse = inverse > limit ? limit : inverse;
    for (std::int64_t i = 0; i < count; i += 2) {
        int codes[2] = {0, 7};
        for (int j = 0; j < 2 && i + j < count; ++j) {
            const float value = load(x, type, i + j) * inverse;
            int code = 0;
            for (int step = 8; step; step /= 2) code += tables.borders[code + step - 1] < value ? step : 0;
            codes[j] = code;
        }
        packed[i / 2] = static_cast<std::uint8_t>(codes[0] << 4 | codes[1]);
    }
    return maximum;
}

// Scratch memory. Aligned: a vector that straddles two cache lines takes twice as long to load.
template <class T>
struct Scratch {
    explicit Scratch(std::int64_t count) : values(new (std::align_val_t(64)) T[count]) {}
    ~Scratch() { operator delete[](values, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* const values;
};

// Scratch that a thread keeps for its next call, as a `thread_local`: fresh pages cost more than the work done in them.
template <class T>
class Kept {
   public:
    T* at_least(std::int64_t count) {
        if (count > count_) {
            release();
            values_ = new (std::align_val_t(64)) T[count];
            count_ = count;
        }
        return values_;
    }
    Kept() = default;
    ~Kept() { release(); }
    Kept(const Kept&) = delete;
    Kept& operator=(const Kept&) = delete;

   private:
    void release() {
        if (values_) operator delete[](values_, std::align_val_t(64));
        values_ = nullptr;
        count_ = 0;
    }
    T* values_ = nullptr;
    std::int64_t count_ = 0;
};

[[maybe_unused]] inline float dot(const std::uint16_t* a, const std::uint16_t* b, std::int64_t count) {
    constexpr int lanes = 16;
    float sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
        for (int j = 0; j < lanes; ++j) sums[j] += from_bfloat16(a[i + j]) * from_bfloat16(b[i + j]);
    for (; i < count; ++i) sums[0] += from_bfloat16(a[i]) * from_bfloat16(b[i]);
    float total = 0;
    for (float sum : sums) total += sum;
    return total;
}

}  // namespace
}  // namespace twinlora
