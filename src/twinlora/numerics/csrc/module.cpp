// The Python module: checked by numerics/cpu.py, which hands over addresses of contiguous tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention_items.hpp"
#include "elementwise.hpp"
#include "lora.hpp"
#include "pool.hpp"
#include "portable.hpp"
#include "threads.hpp"
#include "torch_product.hpp"

namespace nb = nanobind;
using namespace twinlora;

namespace {

using Address = std::uintptr_t;
constexpr std::int64_t grain = 1 << 14;  // weights; less is not worth a second thread

// Put together here, where nothing is assumed of the processor.
const Path amx{"amx-bf16", tiles.supported, avx512.dequantize, avx512.dequantize_nf3, avx512.dequantize_int8, avx512.quantize,
               tiles.multiply_rows, tiles.multiply_dense};
const Path* const paths[] = {&amx, &avx512, &avx2, &portable};
const Path* path = nullptr;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

std::vector<std::string> supported_paths() {
    std::vector<std::string> names;
    for (const Path* candidate : paths)
        if (candidate->supported()) names.emplace_back(candidate->name);
    return names;
}

void use_path(const std::string& name) {
    for (const Path* candidate : paths)
        if (candidate->name == name && candidate->supported()) {
            path = candidate;
            return;
        }
    throw std::invalid_argument("this processor has no path " + name);
}

void set_tables(const std::vector<float>& levels, const std::vector<float>& borders, const std::vector<float>& map,
                const std::vector<float>& map_borders, const std::vector<float>& nf3_levels) {
    const float infinity = std::numeric_limits<float>::infinity();
    std::fill(std::begin(tables.borders), std::end(tables.borders), infinity);
    std::fill(std::begin(tables.dynamic_borders), std::end(tables.dynamic_borders), infinity);
    if (levels.size() != 16 || borders.size() != 15 || map.size() != 256 || map_borders.size() != 255 ||
        nf3_levels.size() != 8)
        throw std::invalid_argument("tables of other sizes than 16, 15, 256, 255 and 8");
    std::copy(levels.begin(), levels.end(), tables.levels);
    std::copy(borders.begin(), borders.end(), tables.borders);
    std::copy(map.begin(), map.end(), tables.dynamic_map);
    std::copy(map_borders.begin(), map_borders.end(), tables.dynamic_borders);
    std::copy(nf3_levels.begin(), nf3_levels.end(), tables.nf3_levels);
}

Scales scales_of(Address scales, Address nested, float offset, std::int64_t nested_block) {
    if (!nested) return {pointer<const float>(scales), nullptr, nullptr, 0.0f, 0};
    return {nullptr, pointer<const std::uint8_t>(scales), pointer<const float>(nested), offset,
            __builtin_ctzll(static_cast<unsigned long long>(nested_block))};
}

void dequantize(Address packed, Address scales, Address nested, float offset, std::int64_t nested_block,
                std::int64_t count, int block, int bits, int type, Address out, int threads) {
    const Scales by_block = scales_of(scales, nested, offset, nested_block);
    const auto* codes = pointer<const std::uint8_t>(packed);
    void* target = pointer<void>(out);
    const std::int64_t whole = count / block, rest = count % block;
    const auto blocks = bits == 4 ? path->dequantize : bits == 3 ? path->dequantize_nf3 : path->dequantize_int8;
    const auto part = bits == 4 ? dequantize_part : bits == 3 ? nf3_part : int8_part;
    parallel_for(threads, whole, grain / block, [&](std::int64_t first, std::int64_t last) {
        blocks(codes, by_block, first, last, block, Type(type), target);
    });
    if (rest)
        part(codes + whole * block * bits / 8, scale_of(by_block, whole), rest, Type(type), at(target, Type(type), whole * block));
}

void quantize(Address x, int type, std::int64_t count, int block, Address packed, Address scales, int threads) {
    const void* source = pointer<const void>(x);
    auto* codes = pointer<std::uint8_t>(packed);
    auto* maxima = pointer<float>(scales);
    const std::int64_t whole = count / block, rest = count % block;
    parallel_for(threads, whole, grain / block, [&](std::int64_t first, std::int64_t last) {
        path->quantize(source, Type(type), first, last, block, codes, maxima);
    });
    if (rest)
        maxima[whole] = quantize_part(at(source, Type(type), whole * block), Type(type), rest, codes + whole * block / 2);
}

// Block scales less their mean, as codes of the dynamic map with a scale per nested block.
void quantize_scales(Address scales, float offset, std::int64_t count, std::int64_t block, Address out, Address nested,
                     int threads) {
    const auto* values = pointer<const float>(scales);
    auto* codes = pointer<std::uint8_t>(out);
    auto* maxima = pointer<float>(nested);
    parallel_for(threads, (count + block - 1) / block, 16, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t b = first; b < last; ++b) {
            const std::int64_t start = b * block, stop = std::min(count, start + block);
            float maximum = 0.0f;
            for (std::int64_t i = start; i < stop; ++i) maximum = std::max(maximum, std::fabs(values[i] - offset));
            const float inverse = std::min(1.0f / maximum, std::numeric_limits<float>::max());
            for (std::int64_t i = start; i < stop; ++i) {
                const float value = (values[i] - offset) * inverse;
                int code = 0;
                for (int step = 128; step; step /= 2) code += tables.dynamic_borders[code + step - 1] < value ? step : 0;
                codes[i] = static_cast<std::uint8_t>(code);
            }
            maxima[b] = maximum;
        }
    });
}

// packed, scales, nested scales or 0, offset, nested block, rows, and where its product goes.
using Weight = std::tuple<Address, Address, Address, float, std::int64_t, std::int64_t, Address>;

// Several weights times the same x [rows, k], in one parallel region.
void multiply_rows(Address x, const std::vector<Weight>& weights, std::int64_t rows, std::int64_t k, int block,
                   int threads) {
    std::int64_t total = 0;
    for (const Weight& w : weights) total += std::get<5>(w);
    parallel_for(threads, total, std::max<std::int64_t>(1, grain / k), [&](std::int64_t first, std::int64_t last) {
        std::int64_t start = 0;
        for (const auto& [packed, scales, nested, offset, nested_block, n, y] : weights) {
            const std::int64_t from = std::max<std::int64_t>(first - start, 0), to = std::min(last - start, n);
            if (from < to)
                path->multiply_rows(pointer<const std::uint16_t>(x), pointer<const std::uint8_t>(packed),
                                    scales_of(scales, nested, offset, nested_block), pointer<std::uint16_t>(y), rows, n, k,
                                    block, from, to);
            start += n;
        }
    });
}

// For attention and what stands between the products: in AVX-512 or not at all.
bool has_blocks() { return (path == &avx512 || path == &amx) && attention_avx512.forward && elementwise; }

constexpr std::int64_t element_grain = 1 << 13;  // values of a thread's share, at least

// What is common to the passes; tensors: q, k, v, cos, sin, out.
void set_heads(Heads& a, const std::vector<Address>& tensors, const std::vector<std::int64_t>& strides, std::int64_t heads,
               std::int64_t kv_heads, std::int64_t size, float scale, std::int64_t window) {
    using T = std::uint16_t;
    a.q = pointer<const T>(tensors[0]), a.k = pointer<const T>(tensors[1]), a.v = pointer<const T>(tensors[2]);
    a.q_stride = strides[0], a.k_stride = strides[1], a.v_stride = strides[2];
    a.cos = pointer<const T>(tensors[3]), a.sin = pointer<const T>(tensors[4]), a.out = pointer<T>(tensors[5]);
    a.heads = heads, a.kv_heads = kv_heads, a.size = size, a.scale = scale, a.window = window;
}

// Tensors: those, then lse, and for the backward pass dout, dq, dk, dv.
void attend(bool backward, const std::vector<Address>& tensors, const std::vector<std::int64_t>& strides,
            const std::vector<std::int64_t>& starts, std::int64_t heads, std::int64_t kv_heads, std::int64_t size,
            float scale, std::int64_t window, int threads) {
    using T = std::uint16_t;
    Attention a{};
    set_heads(a, tensors, strides, heads, kv_heads, size, scale, window);
    a.starts = starts.data(), a.sequences = static_cast<std::int64_t>(starts.size()) - 1;
    a.lse = pointer<float>(tensors[6]);
    if (backward) {
        a.dout = pointer<const T>(tensors[7]);
        a.dq = pointer<T>(tensors[8]), a.dk = pointer<T>(tensors[9]), a.dv = pointer<T>(tensors[10]);
    }
    run_attention(a, path == &amx ? attention_amx : attention_avx512, backward, threads);
}

// Per item of `attend`: sequence, heads [first, last), queries [first, last), keys. And the bytes for parts of dK and dV.
std::tuple<std::vector<std::array<std::int64_t, 6>>, std::int64_t> attention_work(
    bool backward, const std::vector<std::int64_t>& starts, std::int64_t heads, std::int64_t kv_heads, std::int64_t size,
    std::int64_t window, int threads) {
    Attention a{};
    a.heads = heads, a.kv_heads = kv_heads, a.size = size, a.window = window;
    a.starts = starts.data(), a.sequences = static_cast<std::int64_t>(starts.size()) - 1;
    const AttentionWork work = cut_attention(a, backward);
    std::vector<std::array<std::int64_t, 6>> items;
    for (const AttentionItem& i : work.items)
        items.push_back({i.sequence, i.first_head, i.last_head, i.first_query, i.last_query, i.keys});
    const AttentionParts parts = attention_parts(work, size, threads);
    return {items, parts.count * parts.floats * static_cast<std::int64_t>(sizeof(float))};
}

// Tensors: those, then keys, values.
void attend_step(const std::vector<Address>& tensors, const std::vector<std::int64_t>& strides,
                 const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& lengths, std::int64_t capacity,
                 std::int64_t heads, std::int64_t kv_heads, std::int64_t size, float scale, std::int64_t window,
                 int threads) {
    AttentionStep a{};
    set_heads(a, tensors, strides, heads, kv_heads, size, scale, window);
    a.keys = pointer<std::uint16_t>(tensors[6]), a.values = pointer<std::uint16_t>(tensors[7]);
    a.rows = rows.data(), a.lengths = lengths.data(), a.capacity = capacity;
    const std::int64_t count = static_cast<std::int64_t>(rows.size()), items = count * kv_heads;
    const std::int64_t seen = std::accumulate(lengths.begin(), lengths.end(), count);
    const std::int64_t each = std::max<std::int64_t>(1, seen * heads * size / items);  // multiplications of an item
    // Where a token sees others of this call, all must be cached before.
    const bool apart = std::adjacent_find(rows.begin(), rows.end()) == rows.end();
    const auto run = [&](bool append, bool attend, std::int64_t least) {
        parallel_for(threads, items, least, [&](std::int64_t first, std::int64_t last) {
            for (std::int64_t i = first; i < last; ++i) {
                if (append) attention_append(a, i / kv_heads, i % kv_heads);
                if (attend) attention_step(a, i / kv_heads, i % kv_heads);
            }
        });
    };
    if (!apart) run(true, false, std::max<std::int64_t>(1, element_grain / size));
    run(apart, true, (element_grain + each - 1) / each);
}

void rms_norm(Address x, Address weight, std::int64_t rows, std::int64_t width, float eps, float offset, bool wide,
              Address out, Address rstd, int threads) {
    using T = std::uint16_t;
    const RmsNorm n{pointer<const T>(x), pointer<const T>(weight), width, eps, offset, wide, pointer<T>(out),
                    pointer<float>(rstd), nullptr};
    parallel_for(threads, rows, std::max<std::int64_t>(1, element_grain / width),
                 [&](std::int64_t first, std::int64_t last) { elementwise->rms_norm(n, first, last); });
}

void rms_norm_backward(Address dy, Address x, Address weight, Address rstd, std::int64_t rows, std::int64_t width,
                       float offset, Address dx, int threads) {
    using T = std::uint16_t;
    const RmsNorm n{pointer<const T>(x), pointer<const T>(weight), width, 0.0f, offset, false, pointer<T>(dx),
                    pointer<float>(rstd), pointer<const T>(dy)};
    parallel_for(threads, rows, std::max<std::int64_t>(1, element_grain / width),
                 [&](std::int64_t first, std::int64_t last) { elementwise->rms_norm_backward(n, first, last); });
}

void swiglu(Address gate, Address up, std::int64_t count, Address out, int threads) {
    using T = std::uint16_t;
    const SwiGlu s{pointer<const T>(gate), pointer<const T>(up), pointer<T>(out), nullptr, nullptr, nullptr};
    parallel_for(threads, count, element_grain,
                 [&](std::int64_t first, std::int64_t last) { elementwise->swiglu(s, first, last); });
}

void swiglu_backward(Address dy, Address gate, Address up, std::int64_t count, Address d_gate, Address d_up, int threads) {
    using T = std::uint16_t;
    const SwiGlu s{pointer<const T>(gate), pointer<const T>(up), nullptr, pointer<const T>(dy), pointer<T>(d_gate), pointer<T>(d_up)};
    parallel_for(threads, count, element_grain,
                 [&](std::int64_t first, std::int64_t last) { elementwise->swiglu_backward(s, first, last); });
}

void cross_entropy(Address logits, Address labels, std::int64_t rows, std::int64_t width, Address losses, int threads) {
    const CrossEntropy c{pointer<std::uint16_t>(logits), pointer<const std::int64_t>(labels), width, pointer<float>(losses)};
    parallel_for(threads, rows, 1, [&](std::int64_t first, std::int64_t last) { elementwise->cross_entropy(c, first, last); });
}

// y, its columns, and a table [size, 4] of adapters by number: addresses of A and of the transposed B (0: none), rank, the
// scale's bits.
using Layer = std::tuple<Address, std::int64_t, Address, std::int64_t>;

// What a pass adds to layers that share x [rows, k]; `route` [count, 3] has adapters' numbers and their rows [start, stop).
struct Adapters {
    std::vector<LoraSpan> spans;
    std::int64_t k, ranks = 0, blocks = 0, products = 0;

    Adapters(const std::vector<Layer>& layers, std::int64_t k, Address route, std::int64_t count) : k(k) {
        const auto* rows = pointer<const std::int64_t>(route);
        for (const auto* r = rows; r < rows + 3 * count; r += 3)
            for (const auto& [y, n, table, size] : layers) {
                const auto* p = pointer<const std::int64_t>(table) + 4 * r[0];
                if (r[0] >= size || !p[0]) continue;
                double scale;
                std::memcpy(&scale, p + 3, sizeof scale);
                spans.push_back({pointer<const std::uint16_t>(p[0]), pointer<const std::uint16_t>(p[1]), p[2], r[1], r[2],
                                 static_cast<float>(scale), pointer<std::uint16_t>(y), n, ranks, blocks, products});
                ranks += p[2], blocks += (n + lora_block - 1) / lora_block, products += hidden_stride(p[2]) * (r[2] - r[1]);
            }
    }

    std::int64_t used() const { return static_cast<std::int64_t>(spans.size()); }

    void add(Address x, int threads) const {
        if (spans.empty()) return;
        std::vector<std::uint16_t> hidden(products);
        const GroupedLora g{pointer<const std::uint16_t>(x), k, spans.data(), used(), hidden.data()};
        const auto shares = (used() + threads - 1) / threads;
        if (2 * shares * threads <= 3 * used()) {  // enough for every thread to go from A to B: none waits for another
            parallel_for(threads, used(), 1, [&](std::int64_t first, std::int64_t last) {
                const bool end = last == used();
                lora->shrink(g, spans[first].ranks, end ? ranks : spans[last].ranks);
                lora->expand(g, spans[first].blocks, end ? blocks : spans[last].blocks);
            });
            return;
        }
        const std::int64_t weights = std::max<std::int64_t>(1, ranks / used() * lora_block);
        parallel_for(threads, ranks, std::max<std::int64_t>(1, grain / k),
                     [&](std::int64_t first, std::int64_t last) { lora->shrink(g, first, last); });
        parallel_for(threads, blocks, std::max<std::int64_t>(1, grain / weights),
                     [&](std::int64_t first, std::int64_t last) { lora->expand(g, first, last); });
    }

    // Where spans [first, last) lie in memory.
    std::vector<Region> regions(std::int64_t first, std::int64_t last) const {
        std::vector<Region> found;
        for (std::int64_t i = first; i < last; ++i) {
            found.push_back({spans[i].a, 2 * spans[i].rank * k});
            found.push_back({spans[i].b, 2 * spans[i].rank * spans[i].n});
        }
        return found;
    }
};

void grouped_lora(const std::vector<Layer>& layers, Address x, Address route, std::int64_t count, std::int64_t k,
                  int threads) {
    Adapters(layers, k, route, count).add(x, threads);
}

// Each layer's y gets the product of its dense weight with the same x [rows, k], and what its adapters add. Meanwhile, on
// AVX-512, their weights come from memory, mostly by the thread that will want them.
void multiply_dense(Address x, const std::vector<Address>& weights, const std::vector<Layer>& layers, Address route,
                    std::int64_t count, std::int64_t rows, std::int64_t k, int threads) {
    const Adapters adapters(layers, k, route, count);
    std::int64_t total = 0;
    for (const Layer& layer : layers) total += std::get<1>(layer);
    parallel_for(threads, total, std::max<std::int64_t>(1, grain / k), [&](std::int64_t first, std::int64_t last) {
        const std::int64_t used = path == &avx512 ? adapters.used() : 0;  // tiles fetch nothing beside the weight
        const auto soon = adapters.regions(used * first / total, used * last / total);
        const auto share = [&](std::int64_t done) { return static_cast<std::int64_t>(soon.size()) * done / (last - first); };
        std::int64_t start = 0;
        for (std::size_t i = 0; i < layers.size(); ++i) {
            const std::int64_t n = std::get<1>(layers[i]);
            const std::int64_t from = std::max(first, start), to = std::min(last, start + n);
            if (from < to)
                path->multiply_dense(pointer<const std::uint16_t>(x), pointer<const std::uint16_t>(weights[i]),
                                     pointer<std::uint16_t>(std::get<0>(layers[i])), rows, n, k, from - start, to - start,
                                     soon.data() + share(from - first), share(to - first) - share(from - first));
            start += n;
        }
    });
    adapters.add(x, threads);
}

bool has_dense() { return path->multiply_dense; }

TorchProduct torch_product;

// y [rows, n] = x [rows, k] times a matrix [k, n] of these strides: each thread's columns are a product of their own.
void multiply_columns(Address x, Address matrix, Address y, std::int64_t rows, std::int64_t k, std::int64_t n,
                      std::array<std::int64_t, 2> strides, int threads) {
    constexpr std::int64_t unit = 32;  // columns
    std::atomic<bool> done = true;
    parallel_for(threads, (n + unit - 1) / unit, 1, [&](std::int64_t first, std::int64_t last) {
        const std::int64_t from = first * unit, columns = std::min(n, last * unit) - from;
        const bool multiplied = torch_product.multiply({pointer<void>(x), {rows, k}, {k, 1}},
                                                       {pointer<void>(matrix + 2 * from * strides[1]), {k, columns}, strides},
                                                       {pointer<void>(y + 2 * from), {rows, columns}, {n, 1}});
        if (!multiplied) done = false;
    });
    if (!done) throw std::runtime_error("torch's product of matrices failed; its own message stands above");
}

}  // namespace

NB_MODULE(_cpu, m) {
    using release = nb::call_guard<nb::gil_scoped_release>;
    use_path(supported_paths().front());
    m.attr("sources") = TWINLORA_SOURCES;  // SHA-256 over the files of this directory
    m.def("paths", &supported_paths, "Instruction-set paths of this processor, the best first.");
    m.def("path", [] { return std::string(path->name); }, "The path in use.");
    m.def("use_path", &use_path);
    m.def("runtime", [] { return std::string(runtime_name()); }, "File of the OpenMP runtime whose threads are used.");
    m.def("set_tables", &set_tables);
    m.def("dequantize", &dequantize, release());
    m.def("quantize", &quantize, release());
    m.def("quantize_scales", &quantize_scales, release());
    m.def("multiply_rows", &multiply_rows, release());
    m.def("multiply_dense", &multiply_dense, release());
    m.def("set_product", [](Address from_blob, Address mm_out, Address release, std::int32_t bfloat16, std::int32_t cpu) {
        torch_product = TorchProduct(from_blob, mm_out, release, bfloat16, cpu);
    });
    m.def("multiply_columns", &multiply_columns, release());
    m.def("has_dense", &has_dense, "Whether the path in use multiplies few rows with a dense weight.");
    m.def("has_blocks", &has_blocks, "Whether the path in use has kernels for attention, norms, SwiGLU and the loss.");
    m.def("attend", &attend, release());
    m.def("attention_work", &attention_work);
    m.def("attend_step", &attend_step, release());
    m.def("grouped_lora", &grouped_lora, release());
    m.def("rms_norm", &rms_norm, release());
    m.def("rms_norm_backward", &rms_norm_backward, release());
    m.def("swiglu", &swiglu, release());
    m.def("swiglu_backward", &swiglu_backward, release());
    m.def("cross_entropy", &cross_entropy, release());
    m.def("pool_refusal", &pool_refusal);
    m.def("pool_torch_memory", &pool_torch_memory);
    m.def("pool_trim", &pool_trim, release());
    m.def("pool_use", &pool_use);
    m.def("pool_extent", &pool_extent, release());
}
