// Registered memory: which slots of the kernel's table hold which bytes. Bookkeeping alone; no system call.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace accel::transfer {

// The kernel's slots hold at most 1 GiB each, so a buffer may take several in a row.
class Buffers {
  public:
    static constexpr int kNumSlots = 1024;
    static constexpr std::int64_t kSlotBytes = std::int64_t(1) << 30;

    struct Span {
        std::int64_t nbytes;
        int first_slot;
        int num_slots;
    };

    static int num_slots(std::int64_t nbytes) { return int((nbytes + kSlotBytes - 1) / kSlotBytes); }

    // The slot that all these bytes lie in, or -1.
    int slot(const std::byte* memory, std::int64_t nbytes) const {
        auto it = spans_.upper_bound(memory);
        if (it == spans_.begin()) return -1;
        --it;
        const std::int64_t begin = memory - it->first, end = begin + nbytes;
        if (end > it->second.nbytes || begin / kSlotBytes != (end - 1) / kSlotBytes) return -1;
        return it->second.first_slot + int(begin / kSlotBytes);
    }

    // The first of so many free slots in a row, or -1.
    int room(int count) const {
        int from = 0;
        for (int k = 0; k < kNumSlots; ++k) {
            if (used_[std::size_t(k)]) from = k + 1;
            if (k - from + 1 == count) return from;
        }
        return -1;
    }

    void add(const std::byte* memory, const Span& span) {
        spans_[memory] = span;
        mark(span, true);
    }

    // No op finds the memory any more; its slots stay taken until free().
    Span forget(int first_slot) {
        for (auto it = spans_.begin(); it != spans_.end(); ++it) {
            if (it->second.first_slot != first_slot) continue;
            const Span span = it->second;
            spans_.erase(it);
            return span;
        }
        return {0, 0, 0};
    }

    void mark(const Span& span, bool used) {
        std::fill_n(used_.begin() + span.first_slot, span.num_slots, used);
    }

  private:
    std::map<const std::byte*, Span> spans_;
    std::vector<bool> used_ = std::vector<bool>(kNumSlots);
};

}  // namespace accel::transfer
