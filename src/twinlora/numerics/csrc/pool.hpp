// Memory of torch's large tensors: blocks of one range, without the holes that they leave in the C library's heap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace twinlora {

// Why torch's large tensors cannot lie in the pool; empty where they can, or do.
std::string pool_refusal();

// From now on they do, unless that is refused.
void pool_torch_memory();
std::pair<std::size_t, std::size_t> pool_use();  // bytes that were ever in use, and that are

// Gives the system what is free back.
void pool_trim();

// How far these blocks would extend an empty pool, plus the most that those too small for it have at once, in bytes. A
// positive event takes a block of so many bytes, another gives back the one of that number (negated) in order of taking.
std::size_t pool_extent(const std::vector<std::int64_t>& events);

}  // namespace twinlora
