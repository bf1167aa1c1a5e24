// Slots of a loaded library: places in its table of addresses which the dynamic linker fills in (ELF, as glibc lays it out).
#pragma once

#include <cstdlib>  // says whether the C library is glibc

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#define TWINLORA_SLOTS

#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace twinlora {

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

    // Whether all of these slots lead to `function` now. Some lie in pages that the linker makes read-only in the end.
    bool redirect(const std::vector<void**>& slots, void* function) const {
        const std::uintptr_t page = sysconf(_SC_PAGESIZE);
        const ElfW(Phdr)* fixed = part(PT_GNU_RELRO);
        const std::uintptr_t fixed_end = fixed ? (base + fixed->p_vaddr + fixed->p_memsz) / page * page : 0;
        for (void** slot : slots) {
            const auto at = reinterpret_cast<std::uintptr_t>(slot);
            void* first = reinterpret_cast<void*>(at / page * page);
            const bool writable = !fixed || at < base + fixed->p_vaddr || at >= fixed_end;
            if (!writable && mprotect(first, page, PROT_READ | PROT_WRITE) != 0) return false;
            __atomic_store_n(slot, function, __ATOMIC_RELEASE);
            if (!writable) mprotect(first, page, PROT_READ);
        }
        return true;
    }
};

}  // namespace twinlora
#endif
