// SplitMix64 (Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 14) used as a
// counter: what an element gets depends on the seed and its index alone. reference/random.py states the same in torch.
#pragma once
#include <cstdint>

namespace {  // internal linkage: this header is compiled once per instruction set

constexpr std::uint64_t kRandomStep = 0x9e3779b97f4a7c15ull;

inline std::uint64_t random_state(std::uint64_t key, std::int64_t counter) {
    return key + (std::uint64_t(counter) + 1) * kRandomStep;
}

inline std::uint64_t mixed(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

inline std::uint64_t random_64(std::uint64_t key, std::int64_t counter) { return mixed(random_state(key, counter)); }

inline std::uint32_t random_32(std::uint64_t key, std::int64_t index) {
    return std::uint32_t(random_64(key, index) >> 32);
}

}  // namespace
