// Lion; arXiv:2302.06675 program 1. The arithmetic of cpu/kernels/lion.cpp.
#include "step.cuh"

struct Lion {
    static constexpr int kStates = 1;
    float beta1, one_minus_beta1, beta2, one_minus_beta2, lr, decay;

    __device__ void operator()(float& p, float g, float& m, float&) const {
        const float x = m * beta1 + g * one_minus_beta1;
        const float sign = float((x > 0.0f) - (x < 0.0f));
        p = p * decay - sign * lr;
        m = m * beta2 + g * one_minus_beta2;
    }
};

STEP_KERNEL(lion_step) {
    const Lion rule{c0, c1, c2, c3, c4, c5};
    walk<Lion, G, L>(rule, STEP_ARGS);
}
INSTANTIATE_STEP(lion_step)
