// torch's CPU allocator (c10) asks posix_memalign for boundaries of 64 bytes, and glibc looks for about 96 bytes more than
// the block has: a tensor's own hole is too small for the next of its size once a small object lies in the edge that was
// cut off. A training step that recomputes its activations so takes up to half as much memory again as it holds.
//
// There is no C interface to replace that allocator, and its C++ one changes from version to version. But it has two doors
// to the C library, entries in its table of addresses that the linker fills in, as profilers of memory fill them in
// again: posix_memalign and free. So libc10 alone gets its large blocks here; all other callers keep theirs.
#include "pool.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "arena.hpp"

#if defined(__linux__) && defined(__GLIBC__) && defined(__LP64__)
#define TWINLORA_POOL
#include <elf.h>
#include <link.h>
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

#if defined(TWINLORA_POOL)
constexpr std::size_t growth = std::size_t{32} << 20;

class Pool {
  public:
    // A range as large as twice the memory, of which nothing is promised yet; none where the system has no room for it.
    Pool() {
        const std::size_t memory = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
        if (is_limited()) return;
        void* range = mmap(nullptr, 2 * memory, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) return;
        start = static_cast<char*>(range);
        size = 2 * memory;
    }

    bool exists() const { return size > 0; }
    bool has(const void* block) const {
        return reinterpret_cast<std::uintptr_t>(block) - reinterpret_cast<std::uintptr_t>(start) < size;
    }

    void* take(std::size_t bytes) {
        const std::lock_guard<std::mutex> guard(lock);
        const std::size_t at = arena.place(bytes);
        if (!promise(at + bytes)) return nullptr;
        arena.take(at, bytes);
        return start + at;
    }

    void give(const void* block) {
        const std::lock_guard<std::mutex> guard(lock);
        arena.give(static_cast<const char*>(block) - start);
    }

    PoolUse use() {
        const std::lock_guard<std::mutex> guard(lock);
        return {arena.end(), arena.taken()};
    }

    std::mutex lock;

  private:
    // The range does not grow, so that a limit on the address space would never be met: what comes then is not ours.
    static bool is_limited() {
        rlimit limit{};
        return getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY;
    }

    // Whether all up to `end` can be written to.
    bool promise(std::size_t end) {
        if (end <= promised) return true;
        if (end > size || is_limited()) return false;
        const std::size_t next = std::min(size, (end + growth - 1) / growth * growth);
        if (mprotect(start + promised, next - promised, PROT_READ | PROT_WRITE) != 0) return false;
        promised = next;
        return true;
    }

    Arena arena;
    char* start = nullptr;
    std::size_t size = 0, promised = 0;
};

Pool* pool = nullptr;  // never deleted: tensors may outlive everything

int take_aligned(void** block, std::size_t alignment, std::size_t size) {
    if (size >= least && alignment <= boundary)
        if (void* taken = pool->take(rounded(size))) {
            *block = taken;
            return 0;
        }
    return posix_memalign(block, alignment, size);
}

void give_back(void* block) {
    if (pool->has(block))
        pool->give(block);
    else
        std::free(block);
}

// The dynamic section of a library: its symbols, and the slots that hold their addresses.
struct Dynamic {
    const ElfW(Sym)* symbols = nullptr;
    const char* names = nullptr;
    const ElfW(Rela)* slots[2] = {nullptr, nullptr};
    std::size_t bytes[2] = {0, 0};

    explicit Dynamic(const ElfW(Dyn)* entry) {
        for (; entry->d_tag != DT_NULL; ++entry) switch (entry->d_tag) {
            case DT_SYMTAB: symbols = reinterpret_cast<const ElfW(Sym)*>(entry->d_un.d_ptr); break;
            case DT_STRTAB: names = reinterpret_cast<const char*>(entry->d_un.d_ptr); break;
            case DT_JMPREL: slots[0] = reinterpret_cast<const ElfW(Rela)*>(entry->d_un.d_ptr); break;
            case DT_PLTRELSZ: bytes[0] = entry->d_un.d_val; break;
            case DT_RELA: slots[1] = reinterpret_cast<const ElfW(Rela)*>(entry->d_un.d_ptr); break;
            case DT_RELASZ: bytes[1] = entry->d_un.d_val; break;
        }
    }
};

// A loaded library.
struct Library {
    ElfW(Addr) base = 0;
    const ElfW(Phdr)* parts = nullptr;
    int count = 0;

    const ElfW(Phdr)* part(ElfW(Word) type) const {
        const auto* found = std::find_if(parts, parts + count, [&](const auto& p) { return p.p_type == type; });
        return found == parts + count ? nullptr : found;
    }

    // All slots with the address of that function.
    std::vector<void**> slots_of(const char* name) const {
        std::vector<void**> found;
        const ElfW(Phdr)* dynamic = part(PT_DYNAMIC);
        if (!dynamic) return found;
        const Dynamic table(reinterpret_cast<const ElfW(Dyn)*>(base + dynamic->p_vaddr));
        for (int kind : {0, 1})
            for (std::size_t i = 0; i < table.bytes[kind] / sizeof(ElfW(Rela)); ++i) {
                const ElfW(Rela)& slot = table.slots[kind][i];
                const auto symbol = ELF64_R_SYM(slot.r_info);
                if (symbol && std::strcmp(table.names + table.symbols[symbol].st_name, name) == 0)
                    found.push_back(reinterpret_cast<void**>(base + slot.r_offset));
            }
        return found;
    }

    // Whether all of these slots lead to `function` now. Some lie where the linker forbids writing once it is done.
    bool lead(const std::vector<void**>& slots, void* function) const {
        const std::uintptr_t page = sysconf(_SC_PAGESIZE);
        const ElfW(Phdr)* fixed = part(PT_GNU_RELRO);
        for (void** slot : slots) {
            const auto at = reinterpret_cast<std::uintptr_t>(slot);
            void* first = reinterpret_cast<void*>(at / page * page);
            const bool writable = !fixed || at - (base + fixed->p_vaddr) >= fixed->p_memsz;
            if (!writable && mprotect(first, page, PROT_READ | PROT_WRITE) != 0) return false;
            __atomic_store_n(slot, function, __ATOMIC_RELEASE);
            if (!writable) mprotect(first, page, PROT_READ);
        }
        return true;
    }
};

int find_c10(dl_phdr_info* info, std::size_t, void* found) {
    const char* file = info->dlpi_name ? std::strrchr(info->dlpi_name, '/') : nullptr;
    if (!file || std::strcmp(file, "/libc10.so") != 0) return 0;
    *static_cast<Library*>(found) = {info->dlpi_addr, info->dlpi_phdr, info->dlpi_phnum};
    return 1;
}

bool open_pool() {
    Library c10;
    if (!dl_iterate_phdr(find_c10, &c10)) return false;
    const std::vector<void**> takes = c10.slots_of("posix_memalign"), frees = c10.slots_of("free");
    if (takes.empty() || frees.empty()) return false;
    pool = new Pool;
    if (!pool->exists()) return false;
    pthread_atfork([] { pool->lock.lock(); }, [] { pool->lock.unlock(); }, [] { pool->lock.unlock(); });
    // free first: it must know what the other hands out.
    return c10.lead(frees, reinterpret_cast<void*>(give_back)) && c10.lead(takes, reinterpret_cast<void*>(take_aligned));
}
#endif

}  // namespace

#if defined(TWINLORA_POOL)
bool pool_torch_memory() {
    static const bool open = open_pool();
    return open;
}

PoolUse pool_use() { return pool ? pool->use() : PoolUse{0, 0}; }
#else
bool pool_torch_memory() { return false; }
PoolUse pool_use() { return {0, 0}; }
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
            Block& block = blocks.at(static_cast<std::size_t>(-event));
            if (!block.size) throw std::invalid_argument("a block is given back twice");
            if (block.size < least)
                small -= block.size;
            else
                arena.give(block.at);
            block.size = 0;
        }
    }
    return arena.end() + most;
}

}  // namespace twinlora
