// How a call's work is split over threads.
#pragma once
#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "dispatch.h"

namespace accel {
namespace {

constexpr std::int64_t kGrain = 1024;  // elements: a cache line or more of every type

// Splits [0, n) into one contiguous part a thread, at multiples of `grain`, and calls body(begin, end).
// A single thread never enters OpenMP, so small calls cost no barrier and work in a forked child.
template <class Body>
void parallel(std::int64_t n, int num_threads, Body body, std::int64_t grain = kGrain) {
    const std::int64_t grains = (n + grain - 1) / grain;
    const int threads = n < kSerialElements ? 1 : int(std::min<std::int64_t>(std::max(num_threads, 1), grains));
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const std::int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
            const std::int64_t begin = std::min(grains * t / of * grain, n);
            const std::int64_t end = std::min(grains * (t + 1) / of * grain, n);
            if (begin < end) body(begin, end);
        }
        return;
    }
#endif
    (void)threads;
    if (n > 0) body(std::int64_t(0), n);
}

}  // namespace
}  // namespace accel
