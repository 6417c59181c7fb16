// AdamW and Adam; arXiv:1412.6980 algorithm 1, arXiv:1711.05101 algorithm 2. The arithmetic of cpu/kernels/adam.cpp.
#include "step.cuh"

struct Adam {
    static constexpr int kStates = 2;
    float beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_correction2, eps, step_size, decay;
    bool l2;  // decay is then added to the gradient instead

    __device__ void operator()(float& p, float g, float& m, float& v) const {
        if (l2) g = g + decay * p;
        m = m * beta1 + g * one_minus_beta1;
        v = v * beta2 + (g * g) * one_minus_beta2;
        const float denominator = __fsqrt_rn(v) * inv_sqrt_correction2 + eps;
        const float kept = l2 ? p : p * decay;
        p = kept - __fdiv_rn(step_size * m, denominator);
    }
};

STEP_KERNEL(adam_step) {
    const Adam rule{c0, c1, c2, c3, c4, c5, c6, c7, (flags & 1u) != 0};
    walk<Adam, G, L>(rule, STEP_ARGS);
}
INSTANTIATE_STEP(adam_step)
