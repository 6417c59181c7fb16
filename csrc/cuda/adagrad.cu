// Adagrad; Duchi, Hazan & Singer, JMLR 12 (2011). The arithmetic of cpu/kernels/adagrad.cpp.
#include "step.cuh"

struct Adagrad {
    static constexpr int kStates = 1;
    float step_size, eps, l2;
    bool has_l2;

    __device__ void operator()(float& p, float g, float& sum, float&) const {
        if (has_l2) g = g + l2 * p;
        sum = sum + g * g;
        p = p - __fdiv_rn(step_size * g, __fsqrt_rn(sum) + eps);
    }
};

STEP_KERNEL(adagrad_step) {
    const Adagrad rule{c0, c1, c2, (flags & 1u) != 0};
    walk<Adagrad, G, L>(rule, STEP_ARGS);
}
INSTANTIATE_STEP(adagrad_step)
