// How every fused optimizer walks its tensors; the arithmetic of one element comes in as `Rule`, as in cpu/kernels.
//
// A grid-stride loop over groups of four elements, at multiples of four from the tensors' start: one 16-byte access
// each where all pointers allow it and the group lies inside the segment, element by element elsewhere.
#pragma once
#include "common.cuh"

// One kernel launch steps one segment. c and flags: include/accel/segment.h.
struct StepArgs {
    float* param;
    const void* grad;
    float* state0;
    float* state1;
    void* low;
    i64 start, stop;
    float scale;
};

template <class Rule, int G, int L>
__device__ inline void step_one(const Rule& rule, const StepArgs& a, i64 i) {
    float p = a.param[i], s0 = 0.0f, s1 = 0.0f;
    if (Rule::kStates > 0) s0 = a.state0[i];
    if (Rule::kStates > 1) s1 = a.state1[i];
    rule(p, Memory<G>::load(a.grad, i) * a.scale, s0, s1);
    a.param[i] = p;
    if (Rule::kStates > 0) a.state0[i] = s0;
    if (Rule::kStates > 1) a.state1[i] = s1;
    if (L != NONE) Memory<L>::store(a.low, i, p);
}

template <class Rule, int G, int L>
__device__ inline void step_four(const Rule& rule, const StepArgs& a, i64 i) {
    Four p = Memory<F32>::load4(a.param, i), s0 = {}, s1 = {};
    const Four g = Memory<G>::load4(a.grad, i);
    if (Rule::kStates > 0) s0 = Memory<F32>::load4(a.state0, i);
    if (Rule::kStates > 1) s1 = Memory<F32>::load4(a.state1, i);
#pragma unroll
    for (int k = 0; k < 4; ++k) rule(p.x[k], g.x[k] * a.scale, s0.x[k], s1.x[k]);
    Memory<F32>::store4(a.param, i, p);
    if (Rule::kStates > 0) Memory<F32>::store4(a.state0, i, s0);
    if (Rule::kStates > 1) Memory<F32>::store4(a.state1, i, s1);
    if (L != NONE) Memory<L>::store4(a.low, i, p);
}

template <class Rule, int G, int L>
__device__ inline void walk(const Rule& rule, const StepArgs& a) {
    const bool aligned = aligned4<F32>(a.param) && aligned4<G>(a.grad) && aligned4<F32>(a.state0) &&
                         aligned4<F32>(a.state1) && aligned4<BF16>(a.low);
    const i64 stride = i64(gridDim.x) * blockDim.x;
    const i64 last = (a.stop + 3) / 4;
    for (i64 group = a.start / 4 + i64(blockIdx.x) * blockDim.x + threadIdx.x; group < last; group += stride) {
        const i64 i = 4 * group;
        if (aligned && i >= a.start && i + 4 <= a.stop) {
            step_four<Rule, G, L>(rule, a, i);
        } else {
            for (i64 j = i < a.start ? a.start : i; j < i + 4 && j < a.stop; ++j) step_one<Rule, G, L>(rule, a, j);
        }
    }
}

// The signature that all step kernels share. scale_pointer: one fp32 on the device that takes the place of scale, or
// null: a clip factor that was computed there need not come to the host.
#define STEP_KERNEL(name)                                                                                            \
    template <int G, int L>                                                                                          \
    __global__ void name(float* param, const void* grad, float* state0, float* state1, void* low, i64 start,         \
                         i64 stop, const float* scale_pointer, float scale, float c0, float c1, float c2, float c3,  \
                         float c4, float c5, float c6, float c7, u32 flags)

#define STEP_ARGS \
    StepArgs { param, grad, state0, state1, low, start, stop, scale_pointer ? *scale_pointer : scale }

// nvcc compiles what is instantiated; NVRTC is told by name.
#ifndef __CUDACC_RTC__
#define INSTANTIATE_STEP_PAIR(name, G, L)                                                                             \
    template __global__ void name<G, L>(float*, const void*, float*, float*, void*, i64, i64, const float*, float,    \
                                        float, float, float, float, float, float, float, float, u32);
#define INSTANTIATE_STEP(name)                                                                                        \
    INSTANTIATE_STEP_PAIR(name, F32, NONE) INSTANTIATE_STEP_PAIR(name, F32, BF16)                              \
    INSTANTIATE_STEP_PAIR(name, F32, F16) INSTANTIATE_STEP_PAIR(name, BF16, NONE)                                     \
    INSTANTIATE_STEP_PAIR(name, BF16, BF16) INSTANTIATE_STEP_PAIR(name, BF16, F16)                                    \
    INSTANTIATE_STEP_PAIR(name, F16, NONE) INSTANTIATE_STEP_PAIR(name, F16, BF16)                                     \
    INSTANTIATE_STEP_PAIR(name, F16, F16)
#else
#define INSTANTIATE_STEP(name)
#endif
