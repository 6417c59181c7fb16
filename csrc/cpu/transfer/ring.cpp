#include "ring.h"

#ifdef ACCEL_HAS_URING

namespace accel::transfer {

namespace {

// Best first. Completions are then worked off only when the ring's own thread asks for them, instead of interrupting
// whatever runs; older kernels refuse the flags that they do not know.
constexpr unsigned kFlags[] = {
    IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
    IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN,
    0,
};

}  // namespace

int Ring::open(unsigned num_entries) {
    io_uring_params params;
    for (const unsigned flags : kFlags) {
        std::memset(&params, 0, sizeof params);
        params.flags = flags;
        fd_ = int(::syscall(__NR_io_uring_setup, num_entries, &params));
        if (fd_ >= 0 || errno != EINVAL) break;
    }
    if (fd_ < 0) return -errno;
    // One mapping for both queues, no completion ever dropped, entries read at submission: Linux 5.5.
    constexpr unsigned kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE;
    if ((params.features & kNeeded) != kNeeded) return -ENOTSUP;

    const std::size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    const std::size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    queues_bytes_ = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    constexpr int kProtection = PROT_READ | PROT_WRITE, kKind = MAP_SHARED | MAP_POPULATE;
    queues_ = ::mmap(nullptr, queues_bytes_, kProtection, kKind, fd_, IORING_OFF_SQ_RING);
    if (queues_ == MAP_FAILED) return -errno;
    entries_ = ::mmap(nullptr, entries_bytes_, kProtection, kKind, fd_, IORING_OFF_SQES);
    if (entries_ == MAP_FAILED) return -errno;
    // A forked child has no business with them.
    ::madvise(queues_, queues_bytes_, MADV_DONTFORK);
    ::madvise(entries_, entries_bytes_, MADV_DONTFORK);

    auto* base = static_cast<char*>(queues_);
    const auto at = [base](std::uint32_t offset) { return reinterpret_cast<unsigned*>(base + offset); };
    sq_tail_ = at(params.sq_off.tail);
    sq_mask_ = *at(params.sq_off.ring_mask);
    cq_head_ = at(params.cq_off.head);
    cq_tail_ = at(params.cq_off.tail);
    cq_mask_ = *at(params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(base + params.cq_off.cqes);
    for (unsigned k = 0; k < params.sq_entries; ++k) at(params.sq_off.array)[k] = k;
    return 0;
}

Ring::~Ring() {
    if (entries_ != MAP_FAILED) ::munmap(entries_, entries_bytes_);
    if (queues_ != MAP_FAILED) ::munmap(queues_, queues_bytes_);
    if (fd_ >= 0) ::close(fd_);
}

io_uring_sqe* Ring::push() {
    auto* sqe = static_cast<io_uring_sqe*>(entries_) + ((*sq_tail_ + num_fresh_) & sq_mask_);
    std::memset(sqe, 0, sizeof *sqe);
    ++num_fresh_;
    return sqe;
}

int Ring::enter(unsigned at_once) {
    // Published here and not in push(): by now the entries are whole.
    __atomic_store_n(sq_tail_, *sq_tail_ + num_fresh_, __ATOMIC_RELEASE);
    num_left_ += num_fresh_;
    num_fresh_ = 0;
    while (num_left_ > at_once) {
        const long took = ::syscall(__NR_io_uring_enter, fd_, at_once, 0, 0, nullptr, 0);
        if (took <= 0) break;  // the call below meets what is in the way
        num_left_ -= unsigned(took);
    }
    const long took = ::syscall(__NR_io_uring_enter, fd_, num_left_, 1, IORING_ENTER_GETEVENTS, nullptr, 0);
    if (took >= 0) {
        num_left_ -= unsigned(took);
        return 0;
    }
    if (errno == EAGAIN || errno == EBUSY) {  // short of memory: worth another attempt, but not at once
        if (__atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE) == *cq_head_) ::usleep(1000);
        return 0;
    }
    return errno == EINTR ? 0 : -errno;
}

}  // namespace accel::transfer
#endif
