// torch's CPU allocator (c10) asks posix_memalign for boundaries of 64 bytes. glibc takes about 96 bytes more, cuts the
// edges off and gives them to small objects: a freed tensor's hole is then a little too small for the same tensor again.
// A training step that recomputes its activations so takes up to half as much memory again as it holds.
//
// There is no C interface to replace that allocator, and its C++ one changes from version to version. But it has two doors
// to the C library, slots in its table of addresses, which the linker fills in: posix_memalign and free. They are filled
// in again here, so that libc10 alone gets its large blocks from the pool; all other callers keep theirs. Where somebody
// has done so before (a profiler of memory, which puts its own back in the end), it is left at that.
#include "pool.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>

#include "arena.hpp"
#include "slots.hpp"

#if defined(TWINLORA_SLOTS)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace twinlora {
namespace {

constexpr std::size_t boundary = 64;     // of torch's CPU allocator
constexpr std::size_t least = 64 << 10;  // bytes of a block that counts as large

std::size_t rounded(std::size_t size) { return (size + boundary - 1) & ~(boundary - 1); }

#if defined(TWINLORA_SLOTS)
constexpr std::size_t growth = std::size_t{32} << 20;

// Twice the memory is reserved at once, so that a limit on the address space would not see the pool grow: under one, the
// C library's heap is used.
bool is_limited() {
    rlimit limit{};
    return getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY;
}

class Pool {
  public:
    // Of nothing, where the system has no room for the range. None of it is promised yet.
    Pool() {
        const std::size_t bytes = 2 * page * static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES));
        void* range = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (range == MAP_FAILED) return;
        start = static_cast<char*>(range);
        size = bytes;
    }

    bool exists() const { return size > 0; }
    bool has(const void* block) const {
        return reinterpret_cast<std::uintptr_t>(block) - reinterpret_cast<std::uintptr_t>(start) < size;
    }

    // Null where the system does not promise as much.
    void* take(std::size_t bytes) try {
        const std::lock_guard<std::mutex> guard(lock);
        const std::size_t at = arena.place(bytes);
        if (!promise(at + bytes)) return nullptr;
        arena.take(at, bytes);
        return start + at;
    } catch (const std::bad_alloc&) {  // not even room for the bookkeeping
        return nullptr;
    }

    // Whether a block starts there.
    bool give(const void* block) {
        const std::lock_guard<std::mutex> guard(lock);
        return arena.give(static_cast<const char*>(block) - start);
    }

    std::pair<std::size_t, std::size_t> use() {
        const std::lock_guard<std::mutex> guard(lock);
        return {arena.end(), arena.taken()};
    }

    void trim() {
        const std::lock_guard<std::mutex> guard(lock);
        arena.each_hole([this](std::size_t at, std::size_t bytes) {
            const std::size_t first = (at + page - 1) / page * page, end = (at + bytes) / page * page;
            if (first < end) madvise(start + first, end - first, MADV_DONTNEED);
        });
    }

    std::mutex lock;

  private:
    // Whether all up to `end` can be written to.
    bool promise(std::size_t end) {
        if (end <= promised) return true;
        if (end > size || is_limited()) return false;
        const std::size_t next = std::min(size, (end + growth - 1) / growth * growth);
        if (mprotect(start + promised, next - promised, PROT_READ | PROT_WRITE) != 0) return false;
        promised = next;
        return true;
    }

    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    Arena arena;
    char* start = nullptr;
    std::size_t size = 0, promised = 0;
};

Pool* pool = nullptr;  // never deleted: tensors may outlive everything

// Instead of posix_memalign.
int take_aligned(void** block, std::size_t alignment, std::size_t size) {
    const std::size_t bytes = rounded(size);
    void* taken = bytes >= least && alignment <= boundary ? pool->take(bytes) : nullptr;
    if (!taken) return posix_memalign(block, alignment, size);
    *block = taken;
    return 0;
}

// Instead of free.
void give_back(void* block) noexcept {
    if (!pool->has(block)) return std::free(block);
    if (pool->give(block)) return;
    std::fputs("twinlora: a block of the pool was freed that is not in use\n", stderr);
    std::abort();
}

int find_c10(dl_phdr_info* info, std::size_t, void* found) {
    const char* file = info->dlpi_name ? std::strrchr(info->dlpi_name, '/') : nullptr;
    if (!file || std::strcmp(file, "/libc10.so") != 0) return 0;
    *static_cast<Library*>(found) = {info->dlpi_addr, info->dlpi_phdr, info->dlpi_phnum};
    return 1;
}

// The slots of torch's allocator, and why they are not to be filled in again.
struct Doors {
    Library c10;
    std::vector<void**> take_slots, free_slots;
    std::string refusal;

    Doors() {
        if (std::getenv("TWINLORA_POOL") && std::strcmp(std::getenv("TWINLORA_POOL"), "off") == 0) {
            refusal = "TWINLORA_POOL=off";
            return;
        }
        if (dl_iterate_phdr(find_c10, &c10)) {
            take_slots = c10.slots_of("posix_memalign");
            free_slots = c10.slots_of("free");
        }
        if (take_slots.empty() || free_slots.empty())
            refusal = "this build of torch has an allocator of its own";
        else if (!lead(take_slots, "posix_memalign") || !lead(free_slots, "free"))
            refusal = "something else, like a profiler of memory, has taken torch's allocations over";
        else if (is_limited())
            refusal = "the address space is limited (ulimit -v)";
    }

  private:
    // Whether they all lead where everybody's do.
    static bool lead(const std::vector<void**>& slots, const char* function) {
        void* const there = dlsym(RTLD_DEFAULT, function);
        return std::all_of(slots.begin(), slots.end(), [&](void** slot) { return *slot == there; });
    }
};
#endif

}  // namespace

#if defined(TWINLORA_SLOTS)
std::string pool_refusal() {
    if (pool) return pool->exists() ? "" : "the system has no address space for it";
    return Doors().refusal;
}

void pool_torch_memory() {
    if (pool) return;
    const Doors doors;
    if (!doors.refusal.empty()) return;
    pool = new Pool;
    if (!pool->exists()) return;
    pthread_atfork([] { pool->lock.lock(); }, [] { pool->lock.unlock(); }, [] { pool->lock.unlock(); });
    // free first: it must know what the other hands out.
    if (doors.c10.redirect(doors.free_slots, reinterpret_cast<void*>(give_back)))
        doors.c10.redirect(doors.take_slots, reinterpret_cast<void*>(take_aligned));
}

std::pair<std::size_t, std::size_t> pool_use() { return pool ? pool->use() : std::pair<std::size_t, std::size_t>{}; }

void pool_trim() {
    if (pool) pool->trim();
}
#else
std::string pool_refusal() { return "it is for glibc on x86-64 and AArch64"; }
void pool_torch_memory() {}
std::pair<std::size_t, std::size_t> pool_use() { return {0, 0}; }
void pool_trim() {}
#endif

std::size_t pool_extent(const std::vector<std::int64_t>& events) {
    struct Block {
        std::size_t at, size;
    };
    Arena arena;
    std::vector<Block> blocks;
    std::size_t small = 0, most = 0;
    for (const std::int64_t event : events) {
        if (event > 0) {
            const std::size_t size = rounded(static_cast<std::size_t>(event)), at = size < least ? 0 : arena.place(size);
            if (size < least)
                most = std::max(most, small += size);
            else
                arena.take(at, size);
            blocks.push_back({at, size});
        } else {
            Block& block = blocks.at(-static_cast<std::size_t>(event));
            if (!block.size || (block.size >= least && !arena.give(block.at)))
                throw std::invalid_argument("a block is given back twice");
            if (block.size < least) small -= block.size;
            block.size = 0;
        }
    }
    return arena.end() + most;
}

}  // namespace twinlora
