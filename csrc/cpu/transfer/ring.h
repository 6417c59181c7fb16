// One io_uring: system calls and the two shared queues, nothing of what travels in them.
//
// ACCEL_HAS_URING says whether the headers of this build know enough of io_uring (Linux 5.19); what the running kernel
// knows is found out when a ring is opened.
#pragma once
#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#endif
#if defined(IORING_RSRC_REGISTER_SPARSE) && defined(IORING_SETUP_COOP_TASKRUN)
#define ACCEL_HAS_URING 1

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)  // Linux 6.0
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)  // Linux 6.1
#endif

namespace accel::transfer {

class Ring {
  public:
    Ring() = default;
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // 0 or -errno. The calling thread must be the only one that uses the ring.
    int open(unsigned num_entries);

    // An entry to fill in, zeroed. The caller keeps count: never more under way than were opened.
    io_uring_sqe* push();

    // Hands entries to the kernel, so many a call, and sleeps until a completion is there; 0 or -errno. May return
    // early: call again.
    int enter(unsigned at_once);

    // Calls take(user_data, result) for each completion that is there.
    template <class Take>
    void reap(Take take) {
        unsigned head = *cq_head_;
        const unsigned tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
        for (; head != tail; ++head) {
            const io_uring_cqe cqe = cqes_[head & cq_mask_];
            take(cqe.user_data, cqe.res);
        }
        __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
    }

    int register_with(unsigned opcode, const void* argument, unsigned size) const {
        return ::syscall(__NR_io_uring_register, fd_, opcode, argument, size) < 0 ? -errno : 0;
    }

  private:
    int fd_ = -1;
    unsigned num_fresh_ = 0;  // pushed, not yet shown to the kernel
    unsigned num_left_ = 0;   // shown, not yet taken
    void* queues_ = MAP_FAILED;
    std::size_t queues_bytes_ = 0;
    void* entries_ = MAP_FAILED;
    std::size_t entries_bytes_ = 0;
    unsigned* sq_tail_ = nullptr;
    unsigned sq_mask_ = 0;
    unsigned* cq_head_ = nullptr;
    unsigned* cq_tail_ = nullptr;
    unsigned cq_mask_ = 0;
    io_uring_cqe* cqes_ = nullptr;
};

}  // namespace accel::transfer
#endif
