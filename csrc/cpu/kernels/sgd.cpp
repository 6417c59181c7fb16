// SGD with momentum, as torch.optim.SGD defines it; Sutskever et al., "On the importance of initialization and
// momentum in deep learning", ICML 2013, section 2 (Nesterov).
#include "step.h"

namespace {

template <bool kMomentum>
struct Sgd {
    static constexpr int kStates = kMomentum ? 1 : 0;
    F32 lr, momentum, one_minus_dampening, l2;
    bool has_l2, first, nesterov;

    explicit Sgd(const Segment& s)
        : lr(splat(s.c[0])),
          momentum(splat(s.c[1])),
          one_minus_dampening(splat(s.c[2])),
          l2(splat(s.c[3])),
          has_l2(s.flags & accel::kFlagL2),
          first(s.flags & accel::kFlagFirst),
          nesterov(s.flags & accel::kFlagNesterov) {}

    void operator()(F32& p, F32 g, F32& buffer, F32&) const {
        if (has_l2) g = g + l2 * p;
        if (kMomentum) {
            buffer = first ? g : buffer * momentum + g * one_minus_dampening;
            g = nesterov ? g + buffer * momentum : buffer;
        }
        p = p - g * lr;
    }
};

}  // namespace

void accel::ACCEL_ISA::sgd_step(const StepArgs& a, std::int64_t begin, std::int64_t end) {
    for_each_segment(a, begin, end, [&](const Segment& s, std::int64_t from, std::int64_t to) {
        if (s.flags & kFlagMomentum) step_segment<Sgd<true>>(a, s, from, to);
        else step_segment<Sgd<false>>(a, s, from, to);
    });
}
