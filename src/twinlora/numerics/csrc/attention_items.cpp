#include "attention_items.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>

#include "portable.hpp"
#include "threads.hpp"

namespace twinlora {
namespace {

using i64 = std::int64_t;

constexpr i64 items_wanted = 64;   // no item that can be cut is a larger part of the whole
constexpr i64 heads_wanted = 16;   // so many query heads are enough for the backward pass without cutting queries too
constexpr i64 depth_that_pays = 4; // squares of an item per block of keys that it reads

i64 divide_up(i64 n, i64 by) { return (n + by - 1) / by; }

// Squares of scores of one block of queries.
i64 squares_of(const Attention& a, i64 block) { return block + 1 - first_block(a, block * attention_block); }

struct Sequence {
    i64 index, length, blocks, squares;
    i64 heads, ranges;  // of an item; into how many the queries are cut
    i64 cost() const { return squares * heads / ranges; }
};

// Forward, items that share keys differ in their queries: results are the same bits however they are cut. Backward,
// they are heads first, since queries of one head add to the same dK and dV. `total`: squares of all sequences.
void cut_sequence(const Attention& a, bool backward, i64 total, Sequence& s) {
    const i64 group = a.heads / a.kv_heads, most = s.squares / (depth_that_pays * s.blocks);
    const i64 wanted = divide_up(items_wanted * s.squares, total * a.kv_heads);
    s.heads = group, s.ranges = 1;
    if (!backward) {
        s.ranges = std::max<i64>(1, std::min(wanted, most * group));
    } else if (wanted > 1 && most > 0 && group > 1) {
        s.heads = 1;
        s.ranges = std::min(divide_up(heads_wanted * s.squares, total * a.heads), most);
    }
}

// Blocks of queries at which ranges of about equal cost begin, and the end.
std::vector<i64> range_borders(const Attention& a, const Sequence& s) {
    std::vector<i64> borders{0};
    i64 seen = 0;
    for (i64 b = 0; b + 1 < s.blocks; ++b) {
        const i64 found = static_cast<i64>(borders.size()), next = squares_of(a, b + 1);
        seen += squares_of(a, b);
        // Nearer to the cost where the range should end than after the next block.
        if (found < s.ranges && (2 * seen + next) * s.ranges >= 2 * s.squares * found) borders.push_back(b + 1);
    }
    borders.push_back(s.blocks);
    return borders;
}

std::vector<Sequence> sequences_by_cost(const Attention& a, bool backward) {
    std::vector<Sequence> found;
    i64 total = 0;
    for (i64 i = 0; i < a.sequences; ++i) {
        const i64 length = a.starts[i + 1] - a.starts[i], blocks = divide_up(length, attention_block);
        Sequence s{i, length, blocks, 0, 0, 1};
        for (i64 b = 0; b < blocks; ++b) s.squares += squares_of(a, b);
        total += s.squares;
        if (length) found.push_back(s);
    }
    for (Sequence& s : found) cut_sequence(a, backward, total, s);
    std::stable_sort(found.begin(), found.end(), [](const auto& x, const auto& y) { return x.cost() > y.cost(); });
    return found;
}

// The backward pass: items are handed out in order, and what they leave in memory of their own is added in that order.
class Backward {
   public:
    Backward(const Attention& a, const AttentionKernels& kernels, const AttentionWork& work, AttentionParts parts,
             float* memory)
        : a_(a), kernels_(kernels), work_(work), parts_(work.items.size()), added_(work.first), adding_(work.first.size()) {
        for (i64 i = parts.count; i--;) free_.push_back(memory + i * parts.floats);
    }

    // What each thread does until no item is left.
    void run() {
        std::unique_lock lock(mutex_);
        while (next_ < static_cast<i64>(work_.items.size())) {
            const bool alone = count(work_.unit_of[next_]) == 1;
            // A wait ends: who waits has no item, and what is not free belongs to items at work, or waits for them.
            if (!alone && free_.empty()) {
                freed_.wait(lock);
                continue;
            }
            const i64 i = next_++;
            float* const part = alone ? nullptr : free_.back();
            if (part) free_.pop_back();
            lock.unlock();
            compute(i, part);
            lock.lock();
            if (part) parts_[i] = part, add(work_.unit_of[i], lock);
        }
    }

   private:
    i64 count(i64 unit) const { return work_.first[unit + 1] - work_.first[unit]; }

    void compute(i64 i, float* part) const {
        const AttentionItem& item = work_.items[i];
        const i64 first = work_.first[work_.unit_of[i]], whole = a_.starts[item.sequence + 1] - a_.starts[item.sequence];
        // The others are added to the unit's first, which has to have a value for every key.
        if (part && i == first && item.keys < whole)
            std::fill_n(part, 2 * a_.size * divide_up(whole, attention_block) * attention_block, 0.0f);
        kernels_.backward(a_, item, part);
    }

    // Adds what is there and next in the unit's order; one thread at a time does so for a unit.
    void add(i64 unit, std::unique_lock<std::mutex>& lock) {
        if (adding_[unit]) return;
        adding_[unit] = true;
        const i64 first = work_.first[unit], end = work_.first[unit + 1];
        for (i64& i = added_[unit]; i < end && parts_[i]; ++i) {
            if (i == first) continue;
            lock.unlock();
            kernels_.add(a_, work_.items[i], parts_[i], parts_[first]);
            lock.lock();
            release(parts_[i]);
        }
        adding_[unit] = false;
        if (added_[unit] < end) return;
        lock.unlock();
        kernels_.store(a_, work_.items[first], parts_[first]);
        lock.lock();
        release(parts_[first]);
    }

    void release(float* part) {
        free_.push_back(part);
        freed_.notify_all();
    }

    const Attention& a_;
    const AttentionKernels& kernels_;
    const AttentionWork& work_;
    std::mutex mutex_;  // of all below
    std::condition_variable freed_;
    i64 next_ = 0;
    std::vector<float*> free_, parts_;  // parts_ [items]: of those that have ended
    std::vector<i64> added_;            // [units + 1]: the item to add next
    std::vector<char> adding_;          // [units + 1]
};

}  // namespace

AttentionWork cut_attention(const Attention& a, bool backward) {
    AttentionWork work;
    const i64 group = a.heads / a.kv_heads;
    for (const Sequence& s : sequences_by_cost(a, backward)) {
        const std::vector<i64> borders = range_borders(a, s);
        for (i64 kv_head = 0; kv_head < a.kv_heads; ++kv_head) {
            if (backward) work.first.push_back(static_cast<i64>(work.items.size()));
            for (i64 head = kv_head * group; head < (kv_head + 1) * group; head += s.heads)
                for (std::size_t r = 0; r + 1 < borders.size(); ++r) {
                    const i64 query = borders[r] * attention_block, key = first_block(a, query) * attention_block;
                    const i64 stop = borders[r + 1] * attention_block;
                    if (!backward) work.first.push_back(static_cast<i64>(work.items.size()));
                    work.items.push_back(
                        {s.index, kv_head, head, head + s.heads, query, std::min(stop, s.length), key, stop - key});
                    work.unit_of.push_back(static_cast<i64>(work.first.size()) - 1);
                }
        }
    }
    work.first.push_back(static_cast<i64>(work.items.size()));
    return work;
}

AttentionParts attention_parts(const AttentionWork& work, i64 size, int threads) {
    i64 keys = 0, items = 0, fewest = static_cast<i64>(work.items.size());
    for (std::size_t u = 0; u + 1 < work.first.size(); ++u) {
        const i64 count = work.first[u + 1] - work.first[u];
        if (count == 1) continue;
        items += count, fewest = std::min(fewest, count);
        for (i64 i = work.first[u]; i < work.first[u + 1]; ++i)
            keys = std::max(keys, work.items[i].first_key + work.items[i].keys);
    }
    // Units at work: that of one thread, and those in which the other threads are side by side.
    return {2 * keys * size, items ? std::min(items, threads + 1 + divide_up(threads - 1, fewest)) : 0};
}

void run_attention(const Attention& a, const AttentionKernels& kernels, bool backward, int threads) {
    const AttentionWork work = cut_attention(a, backward);
    const i64 items = static_cast<i64>(work.items.size());
    const int used = static_cast<int>(std::min<i64>(threads, items));
    if (backward) {
        thread_local Kept<float> kept;
        const AttentionParts parts = attention_parts(work, a.size, used);
        Backward pass(a, kernels, work, parts, kept.at_least(parts.count * parts.floats));
        return parallel_for(used, used, 1, [&](i64, i64) { pass.run(); });
    }
    std::atomic<i64> next{0};
    parallel_for(used, used, 1, [&](i64, i64) {
        for (i64 i = next++; i < items; i = next++) kernels.forward(a, work.items[i]);
    });
}

}  // namespace twinlora
