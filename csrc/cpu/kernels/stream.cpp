// The memory traffic of an Adam step and next to no arithmetic: four arrays read, three of them written back.
// benchmarks/adam_step.py takes the better of the two variants as the limit of what adam_step can reach.
#include "../simd.h"

void accel::ACCEL_ISA::stream_4r3w(float* __restrict p, const float* __restrict g, float* __restrict m,
                                   float* __restrict v, std::int64_t i, std::int64_t end, bool non_temporal) {
    const bool aligned = ((reinterpret_cast<std::uintptr_t>(p + i) | reinterpret_cast<std::uintptr_t>(m + i) |
                           reinterpret_cast<std::uintptr_t>(v + i)) % kStreamAlign) == 0;
    if (non_temporal && aligned) {
        for (; i + kLanes <= end; i += kLanes) {
            const F32 x = load_f32(g + i);
            stream_f32(p + i, load_f32(p + i) + x);
            stream_f32(m + i, load_f32(m + i) + x);
            stream_f32(v + i, load_f32(v + i) + x);
        }
        stream_fence();
    }
    for (; i < end; ++i) {  // plain C: the compiler vectorizes it
        p[i] += g[i];
        m[i] += g[i];
        v[i] += g[i];
    }
}
