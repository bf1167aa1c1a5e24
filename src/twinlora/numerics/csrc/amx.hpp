// What the users of AMX tiles share: a configuration of the eight tiles for as long as a thread needs it.
//
// Internal linkage throughout, as in portable.hpp.
#pragma once

#include "bf16.hpp"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <algorithm>

namespace twinlora {
namespace {

constexpr i64 side = 16;   // rows of a tile
constexpr i64 depth = 32;  // values of k in a tile

// GCC's tile instructions do not say that they read and write memory.
[[maybe_unused]] inline void settle() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3 hold sums (first and second 16 rows of the left side, each by the first and second 16 columns of the right
// one), 4 and 5 the left side, 6 and 7 the right. oneDNN keeps a configuration of its own in the same threads, which is
// given back.
class TileFile {
public:
    TileFile() {
        _tile_storeconfig(&before_);
        settle();
    }
    ~TileFile() {
        settle();
        _tile_loadconfig(&before_);
    }
    TileFile(const TileFile&) = delete;
    TileFile& operator=(const TileFile&) = delete;

    // For `rows` rows of the left side, at most 32.
    void configure(i64 rows) {
        if (rows == rows_) return;
        Config config{};
        config.palette = 1;
        for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = side;
        for (const int t : {0, 1, 4}) config.rows[t] = static_cast<u8>(std::min(rows, side));
        if (rows > side)
            for (const int t : {2, 3, 5}) config.rows[t] = static_cast<u8>(rows - side);
        settle();
        _tile_loadconfig(&config);
        rows_ = rows;
    }

private:
    struct alignas(64) Config {
        u8 palette, start, reserved[14];
        u16 bytes[16];  // of a row
        u8 rows[16];
    };
    Config before_;
    i64 rows_ = 0;
};

}  // namespace
}  // namespace twinlora
#endif
