// Heads of single tokens in bfloat16, rotated as they are read.
#pragma once

#include "attention.hpp"
#include "bf16.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace twinlora {
namespace {

// One head of one token [D], rotated if there is a rotation -> out [D].
[[maybe_unused]] inline void load_row(const Heads& a, const u16* x, i64 token, u16* out) {
    const i64 half = a.size / 2;
    if (!a.cos) {
        __builtin_memcpy(out, x, 2 * a.size);
        return;
    }
    const u16 *cos = a.cos + token * a.size, *sin = a.sin + token * a.size;
    for (i64 d = 0; d < half; d += 16) {
        const __m512 first = load_bf16(x + d), second = load_bf16(x + d + half);
        store_bf16(out + d, _mm512_fmsub_ps(first, load_bf16(cos + d), _mm512_mul_ps(second, load_bf16(sin + d))));
        store_bf16(out + d + half, _mm512_fmadd_ps(second, load_bf16(cos + d + half),
                                                   _mm512_mul_ps(first, load_bf16(sin + d + half))));
    }
}

}  // namespace
}  // namespace twinlora
#endif
