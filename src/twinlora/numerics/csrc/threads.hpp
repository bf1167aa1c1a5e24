// Threads of the OpenMP runtime that torch has already loaded: a second pool would fight it over the cores.
#pragma once

#include <cstdint>
#include <functional>

namespace twinlora {

// Name of the borrowed runtime's file, or "" if none is loaded (then everything runs on the caller's thread).
const char* runtime_name();

// body(first, last) over [0, total), cut into at most `threads` contiguous ranges of at least `grain`.
void parallel_for(int threads, std::int64_t total, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace twinlora
