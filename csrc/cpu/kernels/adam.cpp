// AdamW and Adam. Kingma & Ba, "Adam", arXiv:1412.6980, algorithm 1; Loshchilov & Hutter, "Decoupled Weight Decay
// Regularization", arXiv:1711.05101, algorithm 2.
#include "step.h"

namespace {

template <bool kL2>
struct Adam {
    static constexpr int kStates = 2;
    F32 beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_correction2, eps, step_size, decay;

    explicit Adam(const Segment& s)
        : beta1(splat(s.c[0])),
          one_minus_beta1(splat(s.c[1])),
          beta2(splat(s.c[2])),
          one_minus_beta2(splat(s.c[3])),
          inv_sqrt_correction2(splat(s.c[4])),  // 1 / sqrt(1 - beta2^step)
          eps(splat(s.c[5])),
          step_size(splat(s.c[6])),  // lr / (1 - beta1^step)
          decay(splat(s.c[7])) {}    // 1 - lr * weight_decay; with L2 regularization the weight decay

    void operator()(F32& p, F32 g, F32& m, F32& v) const {
        if (kL2) g = g + decay * p;
        m = m * beta1 + g * one_minus_beta1;
        v = v * beta2 + (g * g) * one_minus_beta2;
        const F32 denominator = square_root(v) * inv_sqrt_correction2 + eps;
        const F32 kept = kL2 ? p : p * decay;
        p = kept - (step_size * m) / denominator;
    }
};

}  // namespace

void accel::ACCEL_ISA::adam_step(const StepArgs& a, std::int64_t begin, std::int64_t end) {
    for_each_segment(a, begin, end, [&](const Segment& s, std::int64_t from, std::int64_t to) {
        if (s.flags & kFlagL2) step_segment<Adam<true>>(a, s, from, to);
        else step_segment<Adam<false>>(a, s, from, to);
    });
}
