// SplitMix64 as a counter: the arithmetic of cpu/random.h.
#pragma once
#include "common.cuh"

__device__ inline u64 random_64(u64 key, i64 counter) {
    u64 z = key + (u64(counter) + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

__device__ inline u32 random_32(u64 key, i64 index) { return u32(random_64(key, index) >> 32); }
