// Memory traffic with next to no arithmetic: the limits of what other kernels can reach.
#include <algorithm>

#include "../simd.h"

// That of an Adam step: four arrays read, three of them written back. benchmarks/adam_step.py takes the better of the
// two variants.

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

// That of a codec: so much read, so much written elsewhere, side by side (benchmarks/wire_codecs.py), in several
// places in turn, which the hardware's prefetchers follow together (norm.cpp).
float accel::ACCEL_ISA::stream_mix(const float* src, std::int64_t lines_read, float* dst, std::int64_t lines_written,
                                   std::int64_t places, bool non_temporal) {
    constexpr std::int64_t kPortion = 64, kLine = accel::kLineBytes / sizeof(float), kAhead = 1024;
    const bool stream = non_temporal && reinterpret_cast<std::uintptr_t>(dst) % kStreamAlign == 0;
    const std::int64_t portions = std::max(lines_read, lines_written) / kPortion + 1;
    const std::int64_t length = (portions + places - 1) / places;
    F32 sum[kLine / kLanes * 4];
    for (F32& s : sum) s = splat(0.0f);
    const auto portion = [&](std::int64_t p) {
        const std::int64_t read_end = lines_read * (p + 1) / portions, write_end = lines_written * (p + 1) / portions;
        for (std::int64_t i = lines_read * p / portions; i < read_end; ++i) {
            const float* line = src + i * kLine;
            __builtin_prefetch(reinterpret_cast<const char*>(line) + kAhead, 0, 3);
            for (int k = 0; k < kLine / kLanes; ++k) {
                F32& s = sum[(i % 4) * (kLine / kLanes) + k];
                s = s + load_f32(line + k * kLanes);
            }
        }
        for (std::int64_t i = lines_written * p / portions; i < write_end; ++i) {
            for (float* place = dst + i * kLine; place < dst + (i + 1) * kLine; place += kLanes) {
                stream ? stream_f32(place, splat(1.0f)) : store_f32(place, splat(1.0f));
            }
        }
    };
    for (std::int64_t k = 0; k < length; ++k) {
        for (std::int64_t p = k; p < portions; p += length) portion(p);
    }
    if (stream) stream_fence();
    float total = 0.0f;
    for (const F32& s : sum) {
        float lanes[kLanes];
        store_f32(lanes, s);
        for (const float lane : lanes) total += lane;
    }
    return total;
}
