// Lion. Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, program 1.
#include "step.h"

namespace {

struct Lion {
    static constexpr int kStates = 1;
    F32 beta1, one_minus_beta1, beta2, one_minus_beta2, lr, decay;

    explicit Lion(const Segment& s)
        : beta1(splat(s.c[0])),
          one_minus_beta1(splat(s.c[1])),
          beta2(splat(s.c[2])),
          one_minus_beta2(splat(s.c[3])),
          lr(splat(s.c[4])),
          decay(splat(s.c[5])) {}  // 1 - lr * weight_decay

    void operator()(F32& p, F32 g, F32& m, F32&) const {
        const F32 direction = sign(m * beta1 + g * one_minus_beta1);
        p = p * decay - direction * lr;
        m = m * beta2 + g * one_minus_beta2;
    }
};

}  // namespace

void accel::ACCEL_ISA::lion_step(const StepArgs& a, std::int64_t begin, std::int64_t end) {
    for_each_segment(a, begin, end, [&](const Segment& s, std::int64_t from, std::int64_t to) {
        step_segment<Lion>(a, s, from, to);
    });
}
