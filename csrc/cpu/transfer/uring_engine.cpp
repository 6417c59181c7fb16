// Transfers through io_uring: one thread owns the ring, keeps `queue_depth` ops in the kernel, and sleeps there.
//
// The ring's thread alone talks to the ring, which is what lets the kernel skip its locks and interrupts. Others leave
// requests in the queue and ring a bell: an eventfd that the ring polls.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <future>
#include <stdexcept>
#include <thread>

#include "bounce.h"
#include "buffers.h"
#include "engine.h"
#include "ring.h"

#ifdef ACCEL_HAS_URING

#include <csignal>
#include <sys/eventfd.h>
#include <sys/uio.h>

namespace accel::transfer {

namespace {

// The kernel holds back a batch of more than two entries and merges neighbours in it, up to the largest request that
// the device takes. For large blocks that undoes what the caller chose, and fewer requests are under way: 8 % of a
// disk's speed in a virtual machine. Small ones gain by it.
constexpr unsigned kFewAtOnce = 2;
constexpr std::int64_t kLargeBlock = std::int64_t(128) << 10;

constexpr std::uint64_t kBell = ~std::uint64_t(0);  // the bell's completion, among those of ops

class UringEngine : public Engine {
  public:
    explicit UringEngine(const Settings& settings)
        : Engine(settings),
          ops_(std::size_t(settings.queue_depth)),
          slots_(std::size_t(settings.queue_depth)),
          bounces_(std::size_t(settings.queue_depth)),
          bell_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
        if (bell_ < 0) throw std::runtime_error(std::string("eventfd: ") + std::strerror(errno));
        std::promise<int> opened;
        // Signals are Python's: they go to the threads that were there before.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            thread_ = std::thread([&] { run(opened); });
        } catch (...) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            ::close(bell_);
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        const int error = opened.get_future().get();
        if (error != 0) {
            thread_.join();
            ::close(bell_);
            throw std::runtime_error(std::string("io_uring_setup: ") + std::strerror(-error));
        }
    }

    ~UringEngine() override {
        UringEngine::close();
        ::close(bell_);
    }

    void close() override {
        std::lock_guard<std::mutex> one_closes(close_mutex_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
            wake();
        }
        if (thread_.joinable()) thread_.join();
    }

    int add_buffer(std::byte* memory, std::int64_t nbytes) override {
        std::promise<int> added;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (closing_) return -ECANCELED;
            errands_.push_back([&] { added.set_value(add_here(memory, nbytes)); });
            wake();
        }
        return added.get_future().get();
    }

    void remove_buffer(int id) override {
        std::lock_guard<std::mutex> lock(mutex_);
        if (closing_) return;  // the ring's end lets go of everything
        const Buffers::Span span = buffers_.forget(id);  // now: the address may soon be another buffer's
        errands_.push_back([this, span] { set_slots(span, nullptr), free_slots(span); });
        wake();
    }

  protected:
    void wake() override {
        if (rung_) return;
        rung_ = true;
        const std::uint64_t one = 1;
        // Fails only where the counter is full, which wakes just as well.
        (void)!::write(bell_, &one, sizeof one);
    }

  private:
    void run(std::promise<int>& opened) {
        Ring ring;
        ring_ = &ring;
        const int error = ring.open(unsigned(settings_.queue_depth) + 1);
        opened.set_value(error);
        if (error != 0) return;
        io_uring_rsrc_register table{};
        table.nr = Buffers::kNumSlots;
        table.flags = IORING_RSRC_REGISTER_SPARSE;
        table_error_ = ring.register_with(IORING_REGISTER_BUFFERS2, &table, sizeof table);
        for (int k = settings_.queue_depth; k-- > 0;) free_.push_back(k);
        const unsigned at_once = settings_.block_bytes < kLargeBlock ? ~0U : kFewAtOnce;
        listen();
        while (take()) {
            for (const int k : taken_) push(k);
            taken_.clear();
            const int failed = ring.enter(at_once);
            if (!broken_) ring.reap([this](std::uint64_t who, int result) { completed(who, result); });
            if (failed != 0) give_up(failed);
            settle();
        }
    }

    // Has the kernel watch the bell.
    void listen() {
        io_uring_sqe* sqe = ring_->push();
        sqe->opcode = IORING_OP_POLL_ADD;
        sqe->fd = bell_;
        sqe->poll32_events = 1;  // POLLIN
        sqe->user_data = kBell;
    }

    // Errands first, then ops into free places; false when there is nothing more to come.
    bool take() {
        std::vector<std::function<void()>> errands;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            errands.swap(errands_);
        }
        for (const auto& errand : errands) errand();
        std::lock_guard<std::mutex> lock(mutex_);
        while (!free_.empty()) {
            const int k = free_.back();
            Op& op = ops_[std::size_t(k)];
            if (!next(op)) break;
            slots_[std::size_t(k)] = op.bounce ? -1 : buffers_.slot(op.memory, op.nbytes);
            free_.pop_back();
            taken_.push_back(k);
        }
        const bool none_under_way = free_.size() == ops_.size();
        return !(closing_ && none_under_way && idle() && errands_.empty());
    }

    void push(int k) {
        const Op& op = ops_[std::size_t(k)];
        std::byte* memory = op.memory;
        if (op.bounce) {
            memory = bounces_[std::size_t(k)].fill(op, settings_.block_bytes);
            if (memory == nullptr) {
                done_.push_back({k, -ENOMEM});
                std::lock_guard<std::mutex> lock(mutex_);
                wake();  // enter() finds a completion then, and comes back
                return;
            }
        }
        const bool fixed = slots_[std::size_t(k)] >= 0;
        io_uring_sqe* sqe = ring_->push();
        sqe->opcode = op.request->writes ? (fixed ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE)
                                         : (fixed ? IORING_OP_READ_FIXED : IORING_OP_READ);
        sqe->fd = op.descriptor();
        sqe->off = std::uint64_t(op.offset);
        sqe->addr = reinterpret_cast<std::uintptr_t>(memory);
        sqe->len = unsigned(op.nbytes);
        if (fixed) sqe->buf_index = std::uint16_t(slots_[std::size_t(k)]);
        sqe->user_data = std::uint64_t(k);
    }

    void completed(std::uint64_t who, int result) {
        if (who == kBell) {
            std::uint64_t count;
            (void)!::read(bell_, &count, sizeof count);
            heard_ = true;
            return;
        }
        const Op& op = ops_[std::size_t(who)];
        if (op.bounce) bounces_[std::size_t(who)].drain(op, result);
        done_.push_back({int(who), result});
    }

    void settle() {
        if (heard_) listen();
        std::lock_guard<std::mutex> lock(mutex_);
        if (heard_) heard_ = rung_ = false;
        for (const auto& [k, result] : done_) {
            finish(std::move(ops_[std::size_t(k)]), result);
            free_.push_back(k);
        }
        done_.clear();
    }

    // The ring itself is broken, as when somebody closed its descriptor: everything under way has failed.
    void give_up(int error) {
        broken_ = true;  // what completes now belongs to ops that have been given up
        std::vector<bool> waits(ops_.size(), true);
        for (const int k : free_) waits[std::size_t(k)] = false;
        for (const auto& each : done_) waits[std::size_t(each.k)] = false;
        for (int k = 0; k < int(waits.size()); ++k) {
            if (waits[std::size_t(k)]) done_.push_back({k, error});
        }
        ::usleep(10'000);  // nothing wakes this thread any more
    }

    int add_here(std::byte* memory, std::int64_t nbytes) {
        if (table_error_ != 0) return table_error_;
        Buffers::Span span{nbytes, 0, Buffers::num_slots(nbytes)};
        span.first_slot = buffers_.room(span.num_slots);
        if (span.first_slot < 0) return -ENOSPC;
        const int error = set_slots(span, memory);
        if (error != 0) {
            set_slots(span, nullptr);
            return error;
        }
        std::lock_guard<std::mutex> lock(mutex_);
        buffers_.add(memory, span);
        return span.first_slot;
    }

    // Fills the slots of a span with a buffer's memory, or empties them; 0 or -errno.
    int set_slots(const Buffers::Span& span, std::byte* memory) const {
        for (int k = 0; k < span.num_slots; ++k) {
            const std::int64_t begin = k * Buffers::kSlotBytes;
            iovec part{};
            if (memory != nullptr) {
                part.iov_base = memory + begin;
                part.iov_len = std::size_t(std::min(span.nbytes - begin, Buffers::kSlotBytes));
            }
            io_uring_rsrc_update2 update{};
            update.offset = unsigned(span.first_slot + k);
            update.data = reinterpret_cast<std::uintptr_t>(&part);
            update.nr = 1;
            const int error = ring_->register_with(IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update);
            if (error != 0) return error;
        }
        return 0;
    }

    void free_slots(const Buffers::Span& span) {
        std::lock_guard<std::mutex> lock(mutex_);
        buffers_.mark(span, false);
    }

    struct Done {
        int k;
        int result;
    };

    // Guarded by mutex_.
    bool rung_ = false;
    std::vector<std::function<void()>> errands_;
    Buffers buffers_;

    // The ring's thread alone.
    Ring* ring_ = nullptr;
    int table_error_ = 0;
    bool heard_ = false;
    bool broken_ = false;
    std::vector<Op> ops_;      // by place: what is in the kernel
    std::vector<int> slots_;   // by place: the slot of its buffer, or -1
    std::vector<Bounce> bounces_;
    std::vector<int> free_;    // places
    std::vector<int> taken_;   // places to be pushed
    std::vector<Done> done_;

    const int bell_;
    std::mutex close_mutex_;
    std::thread thread_;
};

std::string refusal(int error) {
    if (error == -ENOSYS) return "this kernel has no io_uring (or a seccomp filter hides it)";
    if (error == -EPERM || error == -EACCES) {
        return "io_uring is not allowed here (a seccomp filter, or the sysctl kernel.io_uring_disabled)";
    }
    if (error == -ENOTSUP || error == -EINVAL) return "this kernel's io_uring is too old (Linux 5.6 is needed)";
    if (error == -ENOMEM) return "io_uring: not enough lockable memory (ulimit -l)";
    return std::string("io_uring_setup: ") + std::strerror(-error);
}

}  // namespace

std::string why_no_uring() {
    Ring ring;
    int error = ring.open(2);
    if (error != 0) return refusal(error);
    // Plain reads and writes are younger than rings.
    constexpr unsigned kNumOps = IORING_OP_WRITE + 1;
    alignas(io_uring_probe) unsigned char space[sizeof(io_uring_probe) + kNumOps * sizeof(io_uring_probe_op)] = {};
    error = ring.register_with(IORING_REGISTER_PROBE, space, kNumOps);
    if (error != 0) return refusal(error);
    const auto* ops = reinterpret_cast<const io_uring_probe_op*>(space + sizeof(io_uring_probe));
    for (const unsigned op : {unsigned(IORING_OP_READ), unsigned(IORING_OP_WRITE)}) {
        if ((ops[op].flags & IO_URING_OP_SUPPORTED) == 0) return refusal(-ENOTSUP);
    }
    return "";
}

std::shared_ptr<Engine> make_uring_engine(const Settings& settings) {
    return make_shared_here<UringEngine>(settings);
}

}  // namespace accel::transfer

#else

namespace accel::transfer {

std::string why_no_uring() { return "built without io_uring: the system's headers lack it or are too old"; }

std::shared_ptr<Engine> make_uring_engine(const Settings&) { throw std::runtime_error(why_no_uring()); }

}  // namespace accel::transfer

#endif
