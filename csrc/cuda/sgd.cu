// SGD as torch.optim.SGD; Sutskever et al., ICML 2013, section 2. The arithmetic of cpu/kernels/sgd.cpp.
#include "step.cuh"

template <int States>
struct Sgd {
    static constexpr int kStates = States;
    float lr, momentum, one_minus_dampening, l2;
    bool has_l2, first, nesterov;

    __device__ void operator()(float& p, float g, float& buffer, float&) const {
        if (has_l2) g = g + l2 * p;
        if (States > 0) {
            buffer = first ? g : buffer * momentum + g * one_minus_dampening;
            g = nesterov ? g + buffer * momentum : buffer;
        }
        p = p - g * lr;
    }
};

STEP_KERNEL(sgd_step) {
    const bool has_l2 = (flags & 1u) != 0, first = (flags & 4u) != 0, nesterov = (flags & 8u) != 0;
    if (flags & 2u) {
        const Sgd<1> rule{c0, c1, c2, c3, has_l2, first, nesterov};
        walk<Sgd<1>, G, L>(rule, STEP_ARGS);
    } else {
        const Sgd<0> rule{c0, c1, c2, c3, has_l2, first, nesterov};
        walk<Sgd<0>, G, L>(rule, STEP_ARGS);
    }
}
INSTANTIATE_STEP(sgd_step)
