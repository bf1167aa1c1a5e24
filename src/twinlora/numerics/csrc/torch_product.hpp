// torch's product of bfloat16 matrices by torch's stable C interface, whose addresses cpu.py hands over: nothing here
// links to torch. It may be called from any thread; on one of OpenMP's it uses that thread alone.
#pragma once

#include <array>
#include <cstdint>

namespace twinlora {

class TorchProduct {
  public:
    struct Matrix {
        void* at;
        std::array<std::int64_t, 2> sizes, strides;
    };

    TorchProduct() = default;
    TorchProduct(std::uintptr_t from_blob, std::uintptr_t mm_out, std::uintptr_t release, std::int32_t bfloat16,
                 std::int32_t cpu)
        : from_blob(reinterpret_cast<FromBlob>(from_blob)), mm_out(reinterpret_cast<MmOut>(mm_out)),
          release(reinterpret_cast<Release>(release)), bfloat16(bfloat16), cpu(cpu) {}

    // out = left @ right; whether it succeeded.
    bool multiply(const Matrix& left, const Matrix& right, const Matrix& out) const {
        const std::array<Tensor, 3> tensors{view(out), view(left), view(right)};
        const bool made = tensors[0] && tensors[1] && tensors[2];
        const bool done = made && mm_out(tensors[0], tensors[1], tensors[2]) == 0;
        for (Tensor tensor : tensors)
            if (tensor) release(tensor);
        return done;
    }

  private:
    using Tensor = void*;
    using FromBlob = int (*)(void*, std::int64_t, const std::int64_t*, const std::int64_t*, std::int64_t, std::int32_t,
                             std::int32_t, std::int32_t, Tensor*);
    using MmOut = int (*)(Tensor, Tensor, Tensor);
    using Release = int (*)(Tensor);

    Tensor view(const Matrix& matrix) const {
        Tensor tensor = nullptr;
        const int failed = from_blob(matrix.at, 2, matrix.sizes.data(), matrix.strides.data(), 0, bfloat16, cpu, 0, &tensor);
        return failed ? nullptr : tensor;
    }

    FromBlob from_blob = nullptr;
    MmOut mm_out = nullptr;
    Release release = nullptr;
    std::int32_t bfloat16 = 0, cpu = 0;
};

}  // namespace twinlora
