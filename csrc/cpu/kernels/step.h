// How every fused optimizer walks its tensors; the arithmetic of one element comes in as `Rule`.
//
// A Rule is built from a Segment, says how many state tensors it has (kStates: 0, 1 or 2) and updates a vector of
// parameters and states from a vector of scaled fp32 gradients: rule(p, g, s0, s1).
//
// Ordinary stores for what was just read: its lines are in the cache, and streaming stores would cost 40 %.
#pragma once
#include <algorithm>

#include "../simd.h"

namespace {

using accel::Segment;
using accel::StepArgs;

// Bytes ahead of the loads: six cache lines. Measured on Zen 4: 2-3 % faster than none, while from 1 KiB on it is
// 10 % slower than none, since it gets in the way of the hardware's own prefetching.
constexpr int kPrefetchBytes = 384;

template <class Rule, DType G, DType L>
struct Walk {
    using Grad = typename Memory<G>::Element;
    // Without a low-precision copy any 16-bit type will do: it is never touched.
    static constexpr bool kLow = L != DType::none;
    using LowMemory = Memory<kLow ? L : DType::bf16>;
    using Low = typename LowMemory::Element;

    const Rule rule;
    const F32 scale;
    float* p;
    const Grad* g;
    float* s0;
    float* s1;
    Low* low;

    void prefetch(std::int64_t i) const {
        constexpr int kFloats = kPrefetchBytes / 4;
        __builtin_prefetch(p + i + kFloats, 1, 3);
        __builtin_prefetch(g + i + kPrefetchBytes / int(sizeof(Grad)), 0, 3);
        if (Rule::kStates > 0) __builtin_prefetch(s0 + i + kFloats, 1, 3);
        if (Rule::kStates > 1) __builtin_prefetch(s1 + i + kFloats, 1, 3);
    }

    F32 update(std::int64_t i) {
        F32 x = load_f32(p + i), a = {}, b = {};
        if (Rule::kStates > 0) a = load_f32(s0 + i);
        if (Rule::kStates > 1) b = load_f32(s1 + i);
        rule(x, Memory<G>::load(g + i) * scale, a, b);
        store_f32(p + i, x);
        if (Rule::kStates > 0) store_f32(s0 + i, a);
        if (Rule::kStates > 1) store_f32(s1 + i, b);
        return x;
    }

    // Fewer than a vector's elements, by way of padded copies, so that they take the same vector code.
    void partial(std::int64_t i, std::int64_t count) {
        alignas(64) float pp[kLanes] = {}, pa[kLanes] = {}, pb[kLanes] = {};
        alignas(64) Grad pg[kLanes] = {};
        alignas(64) Low pl[kLanes];
        std::memcpy(pp, p + i, count * sizeof(float));
        std::memcpy(pg, g + i, count * sizeof(Grad));
        if (Rule::kStates > 0) std::memcpy(pa, s0 + i, count * sizeof(float));
        if (Rule::kStates > 1) std::memcpy(pb, s1 + i, count * sizeof(float));
        Walk padded{rule, scale, pp, pg, pa, pb, pl};
        const F32 x = padded.update(0);
        std::memcpy(p + i, pp, count * sizeof(float));
        if (Rule::kStates > 0) std::memcpy(s0 + i, pa, count * sizeof(float));
        if (Rule::kStates > 1) std::memcpy(s1 + i, pb, count * sizeof(float));
        if (kLow) {
            LowMemory::store(pl, x);
            std::memcpy(low + i, pl, count * sizeof(Low));
        }
    }

    template <bool kStream>
    std::int64_t pairs(std::int64_t i, std::int64_t end) {
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
            prefetch(i);
            const F32 x = update(i);
            if (kLanes * sizeof(float) == 64) prefetch(i + kLanes);
            const F32 y = update(i + kLanes);
            if (kLow && kStream) LowMemory::stream2(low + i, x, y);
            if (kLow && !kStream) {
                LowMemory::store(low + i, x);
                LowMemory::store(low + i + kLanes, y);
            }
        }
        return i;
    }

    void run(std::int64_t i, std::int64_t end) {
        // The low-precision copy is only written, so streaming it saves the read that a plain store would cause.
        std::int64_t head = kLow ? elements_to_alignment(low + i) : elements_to_alignment(p + i);
        for (head = std::min(head, end - i); head > 0;) {
            const std::int64_t count = std::min<std::int64_t>(head, kLanes);
            partial(i, count);
            i += count;
            head -= count;
        }
        i = kLow ? pairs<true>(i, end) : pairs<false>(i, end);
        for (; i < end; i += kLanes) partial(i, std::min<std::int64_t>(end - i, kLanes));
    }
};

template <class Rule, DType G, DType L>
void walk_segment(const StepArgs& a, const Segment& s, std::int64_t begin, std::int64_t end) {
    using W = Walk<Rule, G, L>;
    W walk{Rule(s),  splat(a.grad_scale), a.param, static_cast<const typename W::Grad*>(a.grad),
           a.state0, a.state1,            static_cast<typename W::Low*>(a.low)};
    walk.run(begin, end);
}

template <class Rule, DType G>
void choose_low(const StepArgs& a, const Segment& s, std::int64_t begin, std::int64_t end) {
    switch (a.low_dtype) {
        case DType::bf16: return walk_segment<Rule, G, DType::bf16>(a, s, begin, end);
        case DType::f16: return walk_segment<Rule, G, DType::f16>(a, s, begin, end);
        default: return walk_segment<Rule, G, DType::none>(a, s, begin, end);
    }
}

template <class Rule>
void step_segment(const StepArgs& a, const Segment& s, std::int64_t begin, std::int64_t end) {
    switch (a.grad_dtype) {
        case DType::bf16: return choose_low<Rule, DType::bf16>(a, s, begin, end);
        case DType::f16: return choose_low<Rule, DType::f16>(a, s, begin, end);
        default: return choose_low<Rule, DType::f32>(a, s, begin, end);
    }
}

// Calls visit(segment, begin, end) for the parts of the segments between the begin-th and end-th covered element.
template <class Visit>
void for_each_segment(const StepArgs& a, std::int64_t begin, std::int64_t end, Visit visit) {
    std::int64_t before = 0;  // covered elements in the segments already passed
    for (std::int64_t k = 0; k < a.num_segments && before < end; ++k) {
        const Segment& s = a.segments[k];
        const std::int64_t length = s.stop - s.start;
        const std::int64_t from = std::max<std::int64_t>(begin - before, 0);
        const std::int64_t to = std::min<std::int64_t>(end - before, length);
        if (from < to) visit(s, s.start + from, s.start + to);
        before += length;
    }
    stream_fence();
}

}  // namespace
