// AdamW and Adam. Kingma & Ba, "Adam", arXiv:1412.6980, algorithm 1; Loshchilov & Hutter, "Decoupled Weight Decay
// Regularization", arXiv:1711.05101, algorithm 2.
#include "step.h"

namespace {

template <bool kL2>
struct Adam {
    static constexpr int kStates = 2;
    F32 one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_correction2, eps, step_size, decay, l2;

    explicit Adam(const Segment& s)
        : one_minus_beta1(splat(s.c[0])),
          beta2(splat(s.c[1])),
          one_minus_beta2(splat(s.c[2])),
          inv_sqrt_correction2(splat(s.c[3])),  // 1 / sqrt(1 - beta2^step)
          eps(splat(s.c[4])),
          step_size(splat(s.c[5])),  // lr / (1 - beta1^step)
          decay(splat(s.c[6])),      // 1 - lr * weight_decay where decoupled, else 1
          l2(splat(s.c[7])) {}

    void operator()(F32& p, F32 g, F32& m, F32& v) const {
        if (kL2) g = g + l2 * p;
        m = m + (g - m) * one_minus_beta1;
        v = v * beta2 + (g * g) * one_minus_beta2;
        const F32 denominator = square_root(v) * inv_sqrt_correction2 + eps;
        p = p * decay - (step_size * m) / denominator;
    }
};

}  // namespace

void accel::ACCEL_ISA::adam_step(const StepArgs& a, std::int64_t begin, std::int64_t end) {
    for_each_segment(a, begin, end, [&](const Segment& s, std::int64_t from, std::int64_t to) {
        if (s.flags & kFlagL2) step_segment<Adam<true>>(a, s, from, to);
        else step_segment<Adam<false>>(a, s, from, to);
    });
}
