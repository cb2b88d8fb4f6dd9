// Where a fiber is, and going from one to another.
//
// swapcontext asks the kernel twice at every switch (it saves the signal mask), which was nine tenths of a kernel's
// time. Once a fiber runs, switches are jumps. Sanitizers watch swapcontext and would take such jumps for errors.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>
#include <vector>

namespace megatron_dppo::emulation {

#if defined(EMULATION_ASAN) || defined(EMULATION_TSAN)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

struct Place {
  ucontext_t context;  // where it starts
  jmp_buf running;     // where it waits, once it runs
  bool started = false;
};

// Begins at `entry`, on a stack of its own.
inline void prepare(Place& place, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&place.context);
  place.context.uc_stack.ss_sp = stack;
  place.context.uc_stack.ss_size = bytes;
  makecontext(&place.context, entry, 0);
  place.started = false;
}

// Returns when somebody switches back.
inline void switch_place(Place& from, Place& to) {
  if (kSanitized) {
    swapcontext(&from.context, &to.context);
    return;
  }
  from.started = true;
  if (_setjmp(from.running) != 0) return;
  if (to.started) _longjmp(to.running, 1);
  to.started = true;
  setcontext(&to.context);
}

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;  // an overflow faults

// Kept from launch to launch: making one and writing to it for the first time costs more than a small kernel.
inline std::vector<char*>& idle_stacks() {
  static std::vector<char*> stacks;
  return stacks;
}

inline char* allocate_stack() {
  if (!idle_stacks().empty()) {
    char* const stack = idle_stacks().back();
    idle_stacks().pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char*>(memory) + kGuardBytes;
}

// No stack means two things to a sanitizer.
inline void free_stack(char* stack) {
  if (kSanitized)
    munmap(stack - kGuardBytes, kStackBytes + kGuardBytes);
  else
    idle_stacks().push_back(stack);
}

}  // namespace megatron_dppo::emulation
