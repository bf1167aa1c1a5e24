// Memory of torch's large tensors: blocks of one range, without the holes that they leave in the C library's heap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace twinlora {

struct PoolUse {
    std::size_t end, taken;  // bytes that were ever in use, and that are
};

// From now on large tensors of torch lie in the pool. False where that cannot be: another C library than glibc, a torch
// that allocates in another way, a limit on the address space.
bool pool_torch_memory();
PoolUse pool_use();

// Bytes by which these blocks would extend an empty pool, and the most that those too small for it have at once. A
// positive event takes a block of so many bytes, another gives back the one of that number (negated) in order of taking.
std::size_t pool_extent(const std::vector<std::int64_t>& events);

}  // namespace twinlora
