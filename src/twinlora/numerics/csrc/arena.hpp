// Where blocks lie in a range that grows at its end: bookkeeping alone, so that a plan can ask what the pool will do.
#pragma once

#include <cstddef>
#include <iterator>
#include <map>
#include <set>
#include <utility>

namespace twinlora {

class Arena {
  public:
    // Where a block of that size goes: into the smallest hole that holds it (of equal ones the first), else to the end.
    std::size_t place(std::size_t size) const {
        const auto hole = holes.lower_bound({size, 0});
        if (hole != holes.end()) return hole->second;
        return !blocks.empty() && blocks.rbegin()->second.free ? blocks.rbegin()->first : end_;
    }

    void take(std::size_t at, std::size_t size) {
        const auto hole = blocks.find(at);
        if (hole != blocks.end()) {
            const std::size_t there = hole->second.size;
            if (there > size) add_hole(at + size, there - size);
            holes.erase({there, at});
        }
        blocks[at] = {size, false};
        if (at + size > end_) end_ = at + size;
        taken_ += size;
    }

    // False where no block starts.
    bool give(std::size_t at) {
        auto block = blocks.find(at);
        if (block == blocks.end() || block->second.free) return false;
        std::size_t size = block->second.size;
        taken_ -= size;
        const auto next = std::next(block);
        if (next != blocks.end() && next->second.free) {
            size += next->second.size;
            holes.erase({next->second.size, next->first});
            blocks.erase(next);
        }
        if (block != blocks.begin() && std::prev(block)->second.free) {
            const auto before = std::prev(block);
            at = before->first;
            size += before->second.size;
            holes.erase({before->second.size, at});
            blocks.erase(block);
        }
        add_hole(at, size);
        return true;
    }

    // Calls `visit(place, size)` for all holes.
    template <class Visit>
    void each_hole(Visit visit) const {
        for (const auto& [size, at] : holes) visit(at, size);
    }

    std::size_t end() const { return end_; }
    std::size_t taken() const { return taken_; }

  private:
    struct Block {
        std::size_t size;
        bool free;
    };

    void add_hole(std::size_t at, std::size_t size) {
        blocks[at] = {size, true};
        holes.insert({size, at});
    }

    std::map<std::size_t, Block> blocks;                  // by place; together they fill [0, end)
    std::set<std::pair<std::size_t, std::size_t>> holes;  // sizes and places of those that are free
    std::size_t end_ = 0, taken_ = 0;
};

}  // namespace twinlora
