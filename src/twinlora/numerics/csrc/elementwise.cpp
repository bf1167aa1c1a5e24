#include "elementwise.hpp"

#include "bf16.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <cmath>

namespace twinlora {
namespace {

inline __m512 round_bf16(__m512 values) { return widen(narrow(values)); }

void rms_norm(const RmsNorm& n, i64 first, i64 last) {
    const __m512 offset = _mm512_set1_ps(n.offset);
    for (i64 row = first; row < last; ++row) {
        const u16* x = n.x + row * n.width;
        __m512 squares = _mm512_setzero_ps();
        for (i64 d = 0; d < n.width; d += 16) {
            const __m512 value = load_bf16(x + d, mask16(n.width - d));
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        n.rstd[row] = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(n.width) + n.eps);
        const __m512 rstd = _mm512_set1_ps(n.rstd[row]);
        for (i64 d = 0; d < n.width; d += 16) {
            const __mmask16 mask = mask16(n.width - d);
            __m512 normal = _mm512_mul_ps(load_bf16(x + d, mask), rstd);
            if (!n.wide) normal = round_bf16(normal);
            const __m512 weight = _mm512_add_ps(load_bf16(n.weight + d, mask), offset);
            store_bf16(n.out + row * n.width + d, mask, _mm512_mul_ps(normal, weight));
        }
    }
}

// d/dx of x * rstd(x): rstd * (g - normal * mean(g * normal)), where g = dy * weight.
void rms_norm_backward(const RmsNorm& n, i64 first, i64 last) {
    const __m512 offset = _mm512_set1_ps(n.offset);
    for (i64 row = first; row < last; ++row) {
        const u16 *x = n.x + row * n.width, *dy = n.dy + row * n.width;
        const __m512 rstd = _mm512_set1_ps(n.rstd[row]);
        const auto gradient = [&](i64 d, __mmask16 mask) {
            return _mm512_mul_ps(load_bf16(dy + d, mask), _mm512_add_ps(load_bf16(n.weight + d, mask), offset));
        };
        __m512 sum = _mm512_setzero_ps();
        for (i64 d = 0; d < n.width; d += 16) {
            const __mmask16 mask = mask16(n.width - d);
            sum = _mm512_fmadd_ps(gradient(d, mask), _mm512_mul_ps(load_bf16(x + d, mask), rstd), sum);
        }
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(n.width));
        for (i64 d = 0; d < n.width; d += 16) {
            const __mmask16 mask = mask16(n.width - d);
            const __m512 normal = _mm512_mul_ps(load_bf16(x + d, mask), rstd);
            const __m512 dx = _mm512_mul_ps(_mm512_fnmadd_ps(normal, mean, gradient(d, mask)), rstd);
            store_bf16(n.out + row * n.width + d, mask, dx);
        }
    }
}

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

void swiglu(const SwiGlu& s, i64 first, i64 last) {
    for (i64 i = first; i < last; i += 16) {
        const __mmask16 mask = mask16(last - i);
        const __m512 gate = load_bf16(s.gate + i, mask), up = load_bf16(s.up + i, mask);
        store_bf16(s.out + i, mask, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up));
    }
}

void swiglu_backward(const SwiGlu& s, i64 first, i64 last) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (i64 i = first; i < last; i += 16) {
        const __mmask16 mask = mask16(last - i);
        const __m512 gate = load_bf16(s.gate + i, mask), up = load_bf16(s.up + i, mask), dy = load_bf16(s.dy + i, mask);
        const __m512 bend = sigmoid(gate), passed = _mm512_mul_ps(dy, bend);
        store_bf16(s.d_up + i, mask, _mm512_mul_ps(passed, gate));
        const __m512 slope = _mm512_fmadd_ps(gate, _mm512_sub_ps(one, bend), one);
        store_bf16(s.d_gate + i, mask, _mm512_mul_ps(_mm512_mul_ps(passed, up), slope));
    }
}

void cross_entropy(const CrossEntropy& c, i64 first, i64 last) {
    for (i64 row = first; row < last; ++row) {
        u16* x = c.logits + row * c.width;
        const float target = from_bfloat16(x[c.labels[row]]);
        __m512 largest = _mm512_set1_ps(-3.4e38f), total = _mm512_setzero_ps();
        for (i64 i = 0; i < c.width; i += 16) {
            const __mmask16 mask = mask16(c.width - i);
            largest = _mm512_mask_max_ps(largest, mask, largest, load_bf16(x + i, mask));
        }
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
        for (i64 i = 0; i < c.width; i += 16) {
            const __mmask16 mask = mask16(c.width - i);
            total = _mm512_mask_add_ps(total, mask, total, exponential(_mm512_sub_ps(load_bf16(x + i, mask), top)));
        }
        const float sum = _mm512_reduce_add_ps(total);
        const __m512 inverse = _mm512_set1_ps(1.0f / sum);
        const float lse = std::log(sum) + _mm512_cvtss_f32(top);
        c.losses[row] = lse - target;
        for (i64 i = 0; i < c.width; i += 16) {
            const __mmask16 mask = mask16(c.width - i);
            store_bf16(x + i, mask, _mm512_mul_ps(exponential(_mm512_sub_ps(load_bf16(x + i, mask), top)), inverse));
        }
        x[c.labels[row]] = to_bfloat16(std::exp(target - lse) - 1.0f);
    }
}

constexpr Elementwise kernels{rms_norm, rms_norm_backward, swiglu, swiglu_backward, cross_entropy};

}  // namespace

const Elementwise* const elementwise = &kernels;

}  // namespace twinlora

#else

namespace twinlora {
const Elementwise* const elementwise = nullptr;
}

#endif
