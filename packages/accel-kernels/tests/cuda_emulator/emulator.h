// A CUDA block on one thread of the processor: each of its threads is a coroutine, which runs until it waits for others.
//
// Enough of CUDA for the codec kernels: thread and block indices, shared memory, barriers, shuffles and ballots of whole
// warps, rounding intrinsics. Shared memory is static, since blocks run one after the other.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __CUDACC_RTC__

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

struct float4 {
    float x, y, z, w;
};
struct ushort4 {
    unsigned short x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }

template <class To, class From>
To as(From x) {
    To y;
    static_assert(sizeof x == sizeof y);
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline float __uint_as_float(unsigned u) { return as<float>(u); }
inline unsigned __float_as_uint(float x) { return as<unsigned>(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __double2float_rn(double a) { return float(a); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }

namespace emulator {

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

struct Meeting {  // of the threads that wait for each other
    int expected = 0, arrived = 0;
    long generation = 0;
};

inline std::vector<Thread> threads;
inline std::vector<Meeting> warps;
inline Meeting block;
inline std::vector<std::uint64_t> slots;  // what each thread shows the others of its warp
inline ucontext_t scheduler;
inline const std::function<void()>* body;

inline void yield() {
    const unsigned self = threadIdx.x;
    swapcontext(&threads[self].context, &scheduler);
    threadIdx.x = self;
}

inline void meet(Meeting& meeting) {
    const long generation = meeting.generation;
    if (++meeting.arrived == meeting.expected) {
        meeting.arrived = 0;
        ++meeting.generation;
        return;
    }
    while (meeting.generation == generation) yield();
}

// What this thread has, shown to the others of its warp while `look` runs.
template <class T, class Look>
auto show(T mine, Look look) {
    static_assert(sizeof mine <= sizeof slots[0]);
    Meeting& warp = warps[threadIdx.x / 32];
    std::memcpy(&slots[threadIdx.x], &mine, sizeof mine);
    meet(warp);
    const auto seen = look();
    meet(warp);
    return seen;
}

// What thread `lane` of this warp shows.
template <class T>
T shown(unsigned lane) {
    T x;
    std::memcpy(&x, &slots[threadIdx.x / 32 * 32 + lane], sizeof x);
    return x;
}

inline void start() {
    (*body)();
    threads[threadIdx.x].done = true;
    swapcontext(&threads[threadIdx.x].context, &scheduler);
}

inline void run_block(unsigned num_threads, const std::function<void()>& kernel) {
    constexpr std::size_t kStack = 64 << 10;
    body = &kernel;
    threads = std::vector<Thread>(num_threads);
    warps.assign(num_threads / 32, Meeting{32});
    block = Meeting{int(num_threads)};
    slots.assign(num_threads, 0);
    for (Thread& thread : threads) {
        thread.stack = std::make_unique<char[]>(kStack);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStack;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, start, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (unsigned t = 0; t < num_threads; ++t) {
            if (threads[t].done) continue;
            threadIdx.x = t;
            swapcontext(&scheduler, &threads[t].context);
            left = left || !threads[t].done;
        }
    }
}

// Launches a kernel with the addresses of its arguments, as cuLaunchKernel takes them.
template <class... Arguments, std::size_t... I>
void launch(void (*kernel)(Arguments...), unsigned grid, unsigned num_threads, void** arguments, std::index_sequence<I...>) {
    gridDim.x = grid;
    blockDim.x = num_threads;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        run_block(num_threads, [&] { kernel(*static_cast<Arguments*>(arguments[I])...); });
    }
}
template <class... Arguments>
void launch(void (*kernel)(Arguments...), unsigned grid, unsigned num_threads, void** arguments) {
    launch(kernel, grid, num_threads, arguments, std::index_sequence_for<Arguments...>());
}

}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::block); }
template <class T>
T __shfl_xor_sync(unsigned, T mine, int mask) {
    return emulator::show(mine, [&] { return emulator::shown<T>(threadIdx.x % 32 ^ unsigned(mask)); });
}
template <class T>
T __shfl_down_sync(unsigned, T mine, unsigned by) {  // beyond the warp: one's own
    const unsigned lane = threadIdx.x % 32;
    return emulator::show(mine, [&] { return emulator::shown<T>(lane + by < 32 ? lane + by : lane); });
}
inline unsigned __ballot_sync(unsigned, bool mine) {
    return emulator::show(mine, [] {
        unsigned bits = 0;
        for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned(emulator::shown<bool>(lane)) << lane;
        return bits;
    });
}
