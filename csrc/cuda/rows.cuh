// What the inference kernels share: rows addressed by token and head, and sums over a block in one order.
#pragma once
#include "common.cuh"

// All kernels that reduce run with this many threads in a block: a row's bits do not depend on how many rows there are.
constexpr int kRowThreads = 128;

struct Rows {
    void* data;
    i64 token_stride, head_stride;  // in elements

    __device__ i64 offset(i64 row, int num_heads) const {
        return row / num_heads * token_stride + row % num_heads * head_stride;
    }
};

// The sum (or the largest) of one value a thread, in every thread.
template <bool Largest>
__device__ inline float block_reduce(float mine) {
    __shared__ float shared[kRowThreads];
    __syncthreads();  // an earlier result may still be being read
    shared[threadIdx.x] = mine;
    for (int width = kRowThreads / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) {
            const float a = shared[threadIdx.x], b = shared[threadIdx.x + width];
            shared[threadIdx.x] = Largest ? (a > b || a != a ? a : b) : a + b;  // NaN stays
        }
    }
    __syncthreads();
    return shared[0];
}
