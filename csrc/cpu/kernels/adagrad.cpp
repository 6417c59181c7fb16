// Adagrad. Duchi, Hazan & Singer, "Adaptive Subgradient Methods", JMLR 12 (2011), figure 1 (diagonal), with the
// learning-rate decay of torch.optim.Adagrad.
#include "step.h"

namespace {

template <bool kL2>
struct Adagrad {
    static constexpr int kStates = 1;
    F32 step_size, eps, l2;

    explicit Adagrad(const Segment& s)
        : step_size(splat(s.c[0])),  // lr / (1 + (step - 1) * lr_decay)
          eps(splat(s.c[1])),
          l2(splat(s.c[2])) {}

    void operator()(F32& p, F32 g, F32& sum, F32&) const {
        if (kL2) g = g + l2 * p;
        sum = sum + g * g;
        p = p - (step_size * g) / (square_root(sum) + eps);
    }
};

}  // namespace

void accel::ACCEL_ISA::adagrad_step(const StepArgs& a, std::int64_t begin, std::int64_t end) {
    for_each_segment(a, begin, end, [&](const Segment& s, std::int64_t from, std::int64_t to) {
        if (s.flags & kFlagL2) step_segment<Adagrad<true>>(a, s, from, to);
        else step_segment<Adagrad<false>>(a, s, from, to);
    });
}
