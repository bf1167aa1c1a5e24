// Attention on AMX tiles: sums of 32 rows by 32 columns in four of them.
#include "amx.hpp"
#include "attention_blocks.hpp"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

namespace twinlora {
namespace {

class Tiles {
public:
    Tiles() { file_.configure(2 * side); }

    template <bool Add>
    void multiply(const u16* left, i64 stride, i64 steps, const u32* packed, float* out) const {
        constexpr i64 row = 2 * side * sizeof(float);  // bytes from row to row of `out`
        float* const second = out + side * 2 * side;
        settle();
        if constexpr (Add) {
            _tile_loadd(0, out, row);
            _tile_loadd(1, out + side, row);
            _tile_loadd(2, second, row);
            _tile_loadd(3, second + side, row);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (i64 s = 0; s < steps; ++s, left += depth, packed += step_pairs) {
            _tile_loadd(4, left, 2 * stride);
            _tile_loadd(6, packed, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, packed + step_pairs / 2, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, left + side * stride, 2 * stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, row);
        _tile_stored(1, out + side, row);
        _tile_stored(2, second, row);
        _tile_stored(3, second + side, row);
        settle();
    }

private:
    TileFile file_;
};

}  // namespace

const AttentionKernels attention_amx = kernels_with<Tiles>;

}  // namespace twinlora

#else

namespace twinlora {
const AttentionKernels attention_amx{};
}  // namespace twinlora

#endif
