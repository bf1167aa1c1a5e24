// Attention in AVX-512 registers: sums of 8 rows by 32 columns.
#include "attention_blocks.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

namespace twinlora {
namespace {

struct Registers {
    template <bool Add>
    static void multiply(const u16* left, i64 stride, i64 steps, const u32* packed, float* out) {
        for (i64 row = 0; row < 32; row += 8, left += 8 * stride, out += 8 * 32) {
            __m512 sums[8][2];
    #pragma GCC unroll 8
            for (int r = 0; r < 8; ++r)
    #pragma GCC unroll 2
                for (int h = 0; h < 2; ++h)
                    sums[r][h] = Add ? _mm512_load_ps(out + 32 * r + 16 * h) : _mm512_setzero_ps();
            const u32* pairs = packed;
            const u16* x = left;
            for (i64 s = 0; s < steps; ++s, pairs += 256)
                for (i64 pair = 0; pair < 16; ++pair, pairs += 16, x += 2) {
                    const __m512bh first = (__m512bh)_mm512_load_si512(pairs);
                    const __m512bh second = (__m512bh)_mm512_load_si512(pairs + 256);
    #pragma GCC unroll 8
                    for (int r = 0; r < 8; ++r) {
                        u32 value;
                        __builtin_memcpy(&value, x + r * stride, 4);
                        const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(value));
                        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, first);
                        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, second);
                    }
                }
    #pragma GCC unroll 8
            for (int r = 0; r < 8; ++r)
    #pragma GCC unroll 2
                for (int h = 0; h < 2; ++h) _mm512_store_ps(out + 32 * r + 16 * h, sums[r][h]);
        }
    }
};

}  // namespace

const AttentionKernels attention_avx512 = kernels_with<Registers>;

}  // namespace twinlora

#else

namespace twinlora {
const AttentionKernels attention_avx512{};
}  // namespace twinlora

#endif
