#include "threads.hpp"

#include <algorithm>
#include <string>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace twinlora {
namespace {

// The entry points that gcc's OpenMP ABI gives to outlined code; LLVM's and Intel's runtimes have them too.
struct Runtime {
    std::string name;
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread)() = nullptr;
    int (*count)() = nullptr;
};

#if defined(__linux__)
int consider(dl_phdr_info* info, std::size_t, void* found) {
    const std::string path = info->dlpi_name ? info->dlpi_name : "";
    const std::string file = path.substr(path.rfind('/') + 1);
    const bool openmp = file.rfind("libgomp", 0) == 0 || file.rfind("libiomp5", 0) == 0 || file.rfind("libomp", 0) == 0;
    if (!openmp) return 0;
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return 0;
    auto& runtime = *static_cast<Runtime*>(found);
    runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(dlsym(library, "GOMP_parallel"));
    runtime.thread = reinterpret_cast<decltype(runtime.thread)>(dlsym(library, "omp_get_thread_num"));
    runtime.count = reinterpret_cast<decltype(runtime.count)>(dlsym(library, "omp_get_num_threads"));
    if (!runtime.parallel || !runtime.thread || !runtime.count) return 0;
    runtime.name = file;
    return 1;
}
#endif

const Runtime& runtime() {
    static const Runtime found = [] {
        Runtime r;
#if defined(__linux__)
        dl_iterate_phdr(consider, &r);
#endif
        return r;
    }();
    return found;
}

struct Work {
    std::int64_t total;
    const std::function<void(std::int64_t, std::int64_t)>* body;
};

void run_share(void* data) {
    const auto& work = *static_cast<const Work*>(data);
    const std::int64_t count = runtime().count(), number = runtime().thread();
    const std::int64_t first = work.total * number / count, last = work.total * (number + 1) / count;
    if (first < last) (*work.body)(first, last);
}

}  // namespace

const char* runtime_name() { return runtime().name.c_str(); }

void parallel_for(int threads, std::int64_t total, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
    const std::int64_t useful = std::min<std::int64_t>(threads, total / std::max<std::int64_t>(grain, 1));
    if (useful <= 1 || runtime().name.empty()) {
        if (total > 0) body(0, total);
        return;
    }
    Work work{total, &body};
    runtime().parallel(run_share, &work, static_cast<unsigned>(useful), 0);
}

}  // namespace twinlora
