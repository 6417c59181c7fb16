// The table of serial kernels that each instruction set provides.
//
// A kernel works on the half-open range [begin, end) it is given and knows nothing about threads; dispatch.cpp
// splits the work. The same sources are compiled once per instruction set (CMakeLists.txt), each time into its
// own namespace, and fill one Kernels table.
#pragma once
#include <cstdint>

#include "accel/segment.h"

namespace accel {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, none = 3 };

inline int dtype_bytes(DType t) { return t == DType::f32 ? 4 : t == DType::none ? 0 : 2; }

struct StepArgs {
    float* param;
    const void* grad;
    DType grad_dtype;
    float* state0;
    float* state1;
    void* low;  // low-precision copy of the updated parameters, or null
    DType low_dtype;
    float grad_scale;
    const Segment* segments;
    std::int64_t num_segments;
};

struct CastArgs {
    const void* src;
    DType src_dtype;
    void* dst;
    DType dst_dtype;
    float scale;
    bool stochastic;
    std::uint64_t key;  // already mixed seed of the stochastic rounding
    bool stream;        // bypass the caches when writing
};

// Sum of squares and non-finite count of one block of at most kNormBlock elements.
struct NormPartial {
    double sum_sq;
    std::int64_t num_nonfinite;
};
constexpr std::int64_t kNormBlock = 1 << 16;
constexpr std::int64_t kLineBytes = 64;  // of a cache

// `begin` and `end` count the elements inside segments, one segment after the other.
using StepFn = void (*)(const StepArgs&, std::int64_t begin, std::int64_t end);
using CastFn = void (*)(const CastArgs&, std::int64_t begin, std::int64_t end);
using NormFn = NormPartial (*)(const void* grad, DType dtype, std::int64_t begin, std::int64_t end);
using StreamFn = void (*)(float* p, const float* g, float* m, float* v, std::int64_t begin, std::int64_t end,
                          bool non_temporal);
using MixFn = float (*)(const float* src, std::int64_t lines_read, float* dst, std::int64_t lines_written,
                        std::int64_t places, bool non_temporal);

enum Optimizer : int { kAdam = 0, kLion = 1, kAdagrad = 2, kSgd = 3, kNumOptimizers = 4 };

struct Kernels {
    StepFn step[kNumOptimizers];
    NormFn norm;
    CastFn cast;
    StreamFn stream_4r3w;
    MixFn stream_mix;
};

#define ACCEL_DECLARE_KERNELS(isa)                                                                               \
    namespace isa {                                                                                              \
    void adam_step(const StepArgs&, std::int64_t, std::int64_t);                                                 \
    void lion_step(const StepArgs&, std::int64_t, std::int64_t);                                                 \
    void adagrad_step(const StepArgs&, std::int64_t, std::int64_t);                                              \
    void sgd_step(const StepArgs&, std::int64_t, std::int64_t);                                                  \
    NormPartial norm_block(const void*, DType, std::int64_t, std::int64_t);                                      \
    void cast_copy(const CastArgs&, std::int64_t, std::int64_t);                                                 \
    void stream_4r3w(float*, const float*, float*, float*, std::int64_t, std::int64_t, bool);                    \
    float stream_mix(const float*, std::int64_t, float*, std::int64_t, std::int64_t, bool);                      \
    inline Kernels table() {                                                                                     \
        return {{adam_step, lion_step, adagrad_step, sgd_step}, norm_block, cast_copy, stream_4r3w, stream_mix}; \
    }                                                                                                            \
    }

ACCEL_DECLARE_KERNELS(baseline)
#ifdef ACCEL_X86
ACCEL_DECLARE_KERNELS(avx2)
ACCEL_DECLARE_KERNELS(avx512)
#endif
#undef ACCEL_DECLARE_KERNELS

}  // namespace accel
