// SPDX-License-Identifier: Apache-2.0
// The threads of one CUDA block as fibers of one host thread. A fiber runs until it waits for
// others, so whatever a kernel reads without a barrier is either still poisoned or depends on the
// order of the fibers, which SPO_EMULATE_REVERSE=1 turns round.
#pragma once
#include <c10/util/Exception.h>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace spo::emulate {

// A copy into shared memory that has been asked for but not waited for.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  jmp_buf jump;
  bool started = false, done = true, waiting = false;
  std::vector<Copy> open;                // not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

// Lanes of a warp that meet: the last to arrive acts for all.
struct Meeting {
  const char* what = nullptr;
  uint32_t arrived = 0;
  void* lanes[32];
};

class Block {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  static Block& get() {
    static Block block;
    return block;
  }

  // Runs body() once per thread.
  void run(int threads, const std::function<void()>& body) {
    body_ = &body;
    while (static_cast<int>(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    live_ = threads_ = threads, arrived_ = 0, error_ = nullptr;
    meetings_.assign(threads, {});
    for (int i = 0; i < threads; i++) prepare(*fibers_[i]);
    const bool reverse = std::getenv("SPO_EMULATE_REVERSE") != nullptr;
    while (live_ > 0) {
      bool progress = false;
      for (int k = 0; k < threads; k++) {
        const int i = reverse ? threads - 1 - k : k;
        if (fibers_[i]->done || fibers_[i]->waiting) continue;
        resume(i), progress = true;
        if (error_) abandon();
      }
      if (!progress) deadlock();
    }
  }

  Fiber& fiber() { return *fibers_[current_]; }

  void sync_block() {
    arrived_++;
    at_block_barrier_.push_back(current_);
    if (arrived_ == live_)
      release_block();
    else
      suspend();
  }

  // Calls act(void** lanes) once all lanes of `mask` have come with their `mine`.
  template <class Act>
  void meet(const char* what, uint32_t mask, void* mine, const Act& act) {
    const int lane = current_ % 32, warp = current_ - lane;
    TORCH_CHECK(mask >> lane & 1, what, ": lane ", lane, " is not in its own mask");
    Meeting& meeting = meetings_[warp + __builtin_ctz(mask)];
    if (meeting.arrived == 0) meeting.what = what;
    TORCH_CHECK(!std::strcmp(meeting.what, what), "lanes of one warp meet in ", meeting.what,
                " and ", what);
    meeting.arrived |= 1u << lane;
    meeting.lanes[lane] = mine;
    if (meeting.arrived != mask) return suspend();
    meeting.arrived = 0;
    act(meeting.lanes);
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) fibers_[warp + i]->waiting = false;
  }

 private:
  void prepare(Fiber& f) {
    f.waiting = f.done = false;
    f.open.clear(), f.groups.clear();
    if (f.started) return;
    if (!f.stack) f.stack.reset(new char[kStackBytes]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
  }

  // A fiber outlives its thread: finished, it waits for the next block. Exceptions do not cross
  // stacks: run() throws them again.
  static void enter() {
    Block& block = get();
    block.arrived_on_stack();
    for (;;) {
      try {
        (*block.body_)();
      } catch (...) {
        block.error_ = std::current_exception();
      }
      block.fiber().done = true;
      block.live_--;
      if (block.arrived_ > 0 && block.arrived_ == block.live_) block.release_block();
      block.switch_out();
    }
  }

  void suspend() {
    fiber().waiting = true;
    switch_out();
  }

  void release_block() {
    for (const int i : at_block_barrier_) fibers_[i]->waiting = false;
    at_block_barrier_.clear();
    arrived_ = 0;
  }

  [[noreturn]] void abandon() {
    for (int i = 0; i < threads_; i++) fibers_[i]->started &= fibers_[i]->done;
    at_block_barrier_.clear();
    std::rethrow_exception(error_);
  }

  [[noreturn]] void deadlock() {
    const int at_barrier = arrived_, live = live_;
    error_ = std::make_exception_ptr(c10::Error(
        {__func__, __FILE__, __LINE__},
        c10::str("deadlock in block (", blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z,
                 "): ", at_barrier, " of ", live,
                 " threads are at __syncthreads, the others wait in ", meeting_names())));
    abandon();
  }

  std::string meeting_names() const {
    std::string names;
    for (const Meeting& m : meetings_)
      if (m.arrived) names += c10::str(m.what, " (lanes ", m.arrived, ") ");
    return names;
  }

#if defined(__SANITIZE_ADDRESS__)
  // The sanitizer must be told of every change of stack, and knows swapcontext.
  void resume(int i) {
    current_ = i, threadIdx.x = i;
    Fiber& f = *fibers_[i];
    f.started = true;
    __sanitizer_start_switch_fiber(&fake_, f.stack.get(), kStackBytes);
    swapcontext(&home_, &f.context);
    __sanitizer_finish_switch_fiber(fake_, nullptr, nullptr);
  }
  void switch_out() {
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, home_stack_, home_size_);
    swapcontext(&fiber().context, &home_);
    __sanitizer_finish_switch_fiber(fake, &home_stack_, &home_size_);
  }
  void arrived_on_stack() { __sanitizer_finish_switch_fiber(nullptr, &home_stack_, &home_size_); }
  void* fake_ = nullptr;
  const void* home_stack_ = nullptr;
  size_t home_size_ = 0;
  ucontext_t home_;
#else
  // swapcontext asks the system for the signal mask each time; _setjmp does not.
  void resume(int i) {
    current_ = i, threadIdx.x = i;
    if (_setjmp(home_)) return;
    if (fibers_[i]->started) _longjmp(fibers_[i]->jump, 1);
    fibers_[i]->started = true;
    setcontext(&fibers_[i]->context);
  }
  void switch_out() {
    if (!_setjmp(fiber().jump)) _longjmp(home_, 1);
  }
  void arrived_on_stack() {}
  jmp_buf home_;
#endif

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> meetings_;  // of a warp and a mask: at the mask's first lane
  std::vector<int> at_block_barrier_;
  const std::function<void()>* body_ = nullptr;
  int threads_ = 0, live_ = 0, arrived_ = 0, current_ = 0;
  std::exception_ptr error_;
};

}  // namespace spo::emulate
