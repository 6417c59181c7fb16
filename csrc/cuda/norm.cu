// Sum of squares (fp64) and count of non-finite elements, in one read and two kernels.
//
// Every block writes its own pair, and one block adds the pairs in a fixed order: no atomics, so the same gradients
// give the same bits each time on one device.
#include "common.cuh"

// Both kernels run with this many threads in a block.
constexpr int kThreads = 256;

struct Pair {
    double sum_sq;
    double num_nonfinite;  // exact: below 2^53
};

// The sum over the block, in thread 0.
__device__ inline Pair block_sum(Pair mine) {
    __shared__ Pair shared[kThreads];
    shared[threadIdx.x] = mine;
    for (int width = kThreads / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) {
            shared[threadIdx.x].sum_sq += shared[threadIdx.x + width].sum_sq;
            shared[threadIdx.x].num_nonfinite += shared[threadIdx.x + width].num_nonfinite;
        }
    }
    return shared[0];  // written by thread 0, which alone uses it
}

__device__ inline void add(Pair& total, float x) {
    total.sum_sq += double(x) * double(x);
    total.num_nonfinite += (__float_as_uint(x) & 0x7fffffffu) >= 0x7f800000u ? 1.0 : 0.0;
}

template <int G>
__global__ void norm_partial(const void* grad, i64 numel, double* partial) {
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 stride = i64(gridDim.x) * blockDim.x;
    const i64 groups = aligned4<G>(grad) ? numel / 4 : 0;
    Pair total = {0.0, 0.0};
    for (i64 k = thread; k < groups; k += stride) {
        const Four g = Memory<G>::load4(grad, 4 * k);
#pragma unroll
        for (int j = 0; j < 4; ++j) add(total, g.x[j]);
    }
    for (i64 i = 4 * groups + thread; i < numel; i += stride) add(total, Memory<G>::load(grad, i));
    total = block_sum(total);
    if (threadIdx.x == 0) {
        partial[2 * blockIdx.x] = total.sum_sq;
        partial[2 * blockIdx.x + 1] = total.num_nonfinite;
    }
}

// One block: out += [scale^2 * sum of squares, count].
__global__ void norm_finish(const double* partial, int num_partial, double scale, double* out) {
    Pair total = {0.0, 0.0};
    for (int k = threadIdx.x; k < num_partial; k += kThreads) {
        total.sum_sq += partial[2 * k];
        total.num_nonfinite += partial[2 * k + 1];
    }
    total = block_sum(total);
    if (threadIdx.x == 0) {
        out[0] += total.sum_sq * (scale * scale);
        out[1] += total.num_nonfinite;
    }
}

#ifndef __CUDACC_RTC__
template __global__ void norm_partial<F32>(const void*, i64, double*);
template __global__ void norm_partial<BF16>(const void*, i64, double*);
template __global__ void norm_partial<F16>(const void*, i64, double*);
#endif
