// AMX: tiles of 16 rows of a weight, as they lie in memory, times 16 rows of x.
//
// One instruction multiplies 16 rows of the weight by 16 of x over 32 values of k, in the time that memory takes for a tenth
// of these rows: up to 128 rows of x a product takes what reading the weight takes. A panel of 32 rows of the weight stays
// in the second cache for all of x, and the next panel is fetched meanwhile. x is laid out anew, as pairs of k by rows.
//
// A sum takes its products in the order of k whatever M is: a row's result depends on it alone, with NF4 from three rows on.
#include "amx.hpp"
#include "products.hpp"
#include "tiles.hpp"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace twinlora {
namespace {

constexpr i64 tile = side * depth;  // its values
constexpr i64 two = 2 * side;       // rows of a panel of the weight, and of a block of x
constexpr i64 chunk_values = 256;   // of a row that are decoded at a time
constexpr i64 from_tiles = 3;       // rows of x from which on decoding into tiles pays

// Whether the processor has tiles and the kernel lets this process use them, for which it has to be asked.
bool supported() {
    unsigned a, b, c, d;
    if (!avx512.supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (d & bf16) && (d & tiles) && syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// x [M, K] -> tiles of pairs [16 pairs of k][16 rows], for each 16 rows (the last ones filled up with zeros) k by k.
// `Split`: of every 64 values those with even index, then those with odd index.
template <bool Split>
void arrange_tiles(const u16* x, i64 M, i64 K, u16* out) {
    alignas(64) u16 index[32];
    for (int i = 0; i < 32; ++i) index[i] = static_cast<u16>(2 * i);
    const __m512i even = _mm512_load_si512(index), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (i64 start = 0; start < M; start += side)
        for (i64 k = 0; k < K; k += 2 * depth, out += 2 * tile) {
            __m512i low[side], high[side];
            for (i64 m = 0; m < side; ++m) {
                const u16* at = x + (start + m) * K + k;
                const bool there = start + m < M;
                const __m512i a = there ? _mm512_loadu_si512(at) : _mm512_setzero_si512();
                const __m512i b = there ? _mm512_loadu_si512(at + depth) : _mm512_setzero_si512();
                low[m] = Split ? _mm512_permutex2var_epi16(a, even, b) : a;
                high[m] = Split ? _mm512_permutex2var_epi16(a, odd, b) : b;
            }
            transpose16(low), transpose16(high);
            for (i64 i = 0; i < side; ++i) {
                _mm512_store_si512(out + depth * i, low[i]);
                _mm512_store_si512(out + depth * i + tile, high[i]);
            }
        }
}

// Memory that is wanted next, fetched evenly: `pace` lines a step.
struct Next {
    const char *at, *end;
    i64 pace;

    Next(const void* from, i64 bytes, i64 steps)
        : at(static_cast<const char*>(from)), end(at + bytes), pace((bytes + 64 * steps - 1) / (64 * steps)) {}
    inline void step() {
        for (i64 i = 0; i < pace && at < end; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
};

// Adds to the sums of 16 or 32 rows of the weight with 16 or 32 rows of x (`Tall`, `Wide`) `steps` steps of k. The second 16
// rows of x lie `apart` values behind the first.
template <bool Wide, bool Tall>
void add_tiles(const u16* w, i64 stride, const u16* x, i64 apart, i64 steps, Next& next) {
    for (i64 s = 0; s < steps; ++s, w += depth, x += tile) {
        next.step();
        _tile_loadd(4, w, 2 * stride);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (Wide) {
            _tile_loadd(7, x + apart, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (Tall) {
            _tile_loadd(5, w + side * stride, 2 * stride);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (Wide) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

// The sums, [16 rows of x][16 rows of the weight] each, rounded -> y [M, N], of which there are `count` rows and `rows` columns.
void store_tiles(bool wide, bool tall, u16* y, i64 N, i64 count, i64 rows) {
    alignas(64) float sums[4][side * side];
    _tile_stored(0, sums[0], 64);
    if (wide) _tile_stored(1, sums[1], 64);
    if (tall) _tile_stored(2, sums[2], 64);
    if (wide && tall) _tile_stored(3, sums[3], 64);
    settle();
    for (i64 m = 0; m < count; m += side)
        for (i64 n = 0; n < rows; n += side) {
            __m512i values[side];
            for (i64 i = 0; i < side; ++i) values[i] = _mm512_load_si512(sums[m / side + n / side * 2] + side * i);
            transpose16(values);
            for (i64 i = 0; i < std::min(side, count - m); ++i)
                store_bf16(y + (m + i) * N + n, mask16(rows - n), _mm512_castsi512_ps(values[i]));
        }
}

// A panel of a weight in bfloat16, `stride` values from row to row, that is multiplied `chunk` values of k at a time.
struct Plain {
    const u16* w;
    i64 stride, chunk;

    const u16* values(i64 from, i64) const { return w + from; }
};

// One of codes, decoded a chunk at a time: into the first cache where all of x goes by at once.
struct Coded {
    const u8* packed;
    const float* scales;  // [rows, K / block]
    u16* decoded;         // [rows, stride]
    i64 stride, chunk, rows, K;
    int block;

    const u16* values(i64 from, i64 m) const {
        if (m == 0)  // with more than one block of x a chunk is all of k
            for (i64 n = 0; n < rows; ++n)
                decode_split(packed + (n * K + from) / 2, scales + (n * K + from) / block, std::min(chunk, K - from) / block,
                             block, decoded + n * stride);
        settle();
        return decoded;
    }
};

// All of x, arranged, against a panel of `rows` rows -> y [M, N].
template <class Panel>
void multiply_tiles(const Panel& panel, i64 rows, const u16* x, i64 M, i64 K, TileFile& file, Next next, u16* y, i64 N) {
    constexpr decltype(&add_tiles<false, false>) kernels[] = {add_tiles<false, false>, add_tiles<false, true>,
                                                              add_tiles<true, false>, add_tiles<true, true>};
    const bool tall = rows > side;
    file.configure(rows);
    for (i64 m = 0; m < M; m += two) {
        const bool wide = M - m > side;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (i64 from = 0; from < K; from += panel.chunk) {
            const i64 steps = std::min(panel.chunk, K - from) / depth;
            kernels[2 * wide + tall](panel.values(from, m), panel.stride, x + m * K + from * side, side * K, steps, next);
        }
        store_tiles(wide, tall, y + m * N, N, std::min(two, M - m), rows);
    }
}

i64 blocks_of(i64 M) { return (M + two - 1) / two; }

// The weight alone takes all that memory gives: what adapters want next is not fetched meanwhile.
void multiply_dense(const u16* x, const u16* w, u16* y, i64 M, i64 N, i64 K, i64 first, i64 last, const Region*, i64) {
    if (!M) return;
    thread_local Kept<u16> kept;
    u16* arranged = kept.at_least(round_up(M, side) * K);
    arrange_tiles<false>(x, M, K, arranged);
    TileFile file;
    for (i64 start = first; start < last; start += two) {
        const i64 rows = std::min(two, last - start), ahead = start + rows;
        const Next next(w + ahead * K, 2 * K * std::min(two, last - ahead), K / depth * blocks_of(M));
        multiply_tiles(Plain{w + start * K, K, K}, rows, arranged, M, K, file, next, y + start, N);
    }
}

void multiply_rows(const u16* x, const u8* packed, const Scales& scales, u16* y, i64 M, i64 N, i64 K, int block, i64 first,
                   i64 last) {
    if (M < from_tiles) return avx512.multiply_rows(x, packed, scales, y, M, N, K, block, first, last);
    const i64 chunk = M > two ? K : std::min(K, round_up(chunk_values, block));
    const i64 blocks = K / block, stride = chunk + depth;  // rows of a power of two would share few sets of the cache
    thread_local Kept<float> kept_scales;
    thread_local Kept<u16> kept_x, kept_values;
    float* decoded_scales = kept_scales.at_least(two * blocks);
    u16* arranged = kept_x.at_least(round_up(M, side) * K);
    u16* values = kept_values.at_least(two * stride);
    arrange_tiles<true>(x, M, K, arranged);
    TileFile file;
    for (i64 start = first; start < last; start += two) {
        const i64 rows = std::min(two, last - start), ahead = start + rows;
        const Next next(packed + ahead * K / 2, K / 2 * std::min(two, last - ahead), K / depth * blocks_of(M));
        decode_scales(scales, start * blocks, (start + rows) * blocks, decoded_scales);
        const Coded panel{packed + start * K / 2, decoded_scales, values, stride, chunk, rows, K, block};
        multiply_tiles(panel, rows, arranged, M, K, file, next, y + start, N);
    }
}

}  // namespace

const TileProducts tiles{supported, multiply_rows, multiply_dense};

}  // namespace twinlora

#else

namespace twinlora {
const TileProducts tiles{[] { return false; }, nullptr, nullptr};
}

#endif
