// What AddressSanitizer and ThreadSanitizer must be told about fibers and about CUDA's ordering. No-ops without them.
//
// Build with -DEMULATION_ASAN or -DEMULATION_TSAN. Under ThreadSanitizer the scheduler itself is compiled without
// instrumentation: it is the machine, and only what the emulated program does may count as an access.
#pragma once

#include <cstddef>

#if defined(EMULATION_ASAN)
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
#endif
#if defined(EMULATION_TSAN)
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_destroy_fiber(void* fiber);
extern "C" void* __tsan_get_current_fiber();
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_set_fiber_name(void* fiber, const char* name);
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace megatron_dppo::emulation {

#if defined(EMULATION_TSAN)
constexpr bool kThreadSanitizer = true;
inline void* create_tsan_fiber(const char* name) {
  void* fiber = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber, name);
  return fiber;
}
inline void destroy_tsan_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void* current_tsan_fiber() { return __tsan_get_current_fiber(); }
// 1: the switch itself orders nothing. Fibers of one system thread stand for threads that run at the same time.
inline void switch_tsan_fiber(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
// What happened before release(key) happened before what follows a later acquire(key).
inline void release(void* key) { __tsan_release(key); }
inline void acquire(void* key) { __tsan_acquire(key); }
inline void ignore_writes(bool begin) {
  begin ? AnnotateIgnoreWritesBegin(__FILE__, __LINE__) : AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}
#else
constexpr bool kThreadSanitizer = false;
inline void* create_tsan_fiber(const char*) { return nullptr; }
inline void destroy_tsan_fiber(void*) {}
inline void* current_tsan_fiber() { return nullptr; }
inline void switch_tsan_fiber(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
inline void ignore_writes(bool) {}
#endif

#if defined(EMULATION_ASAN)
inline void start_switch(void** save, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(save, stack, size);
}
inline void finish_switch(void* saved, const void** old_stack, size_t* old_size) {
  __sanitizer_finish_switch_fiber(saved, old_stack, old_size);
}
#else
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
#endif

}  // namespace megatron_dppo::emulation
