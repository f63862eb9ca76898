// What the compiler calls under -fsanitize=thread at each access to memory. No part of ThreadSanitizer is linked: these
// stand in for it, and look at what kernels touch.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "internal.hpp"

namespace {

using namespace cuda_emulation;

[[noreturn]] void host_touches(const void* p) {
  std::fprintf(stderr, "CUDA emulation: host code uses a pointer to device memory, %s\n",
               where_in_device_memory(reinterpret_cast<std::uintptr_t>(p)).c_str());
  std::abort();
}

inline void seen(const void* p, std::size_t bytes, access_kind how) {
  if (!watching) {
    if (is_device_memory(p) && !now.on_fiber) host_touches(p);
    return;
  }
  watching = false;
  check(p, bytes, how);
  watching = true;
}

// By an access that the compiler takes to be aligned.
template <std::size_t Bytes>
inline void aligned(const void* p, access_kind how) {
  if (!watching) {
    if (__builtin_expect(is_device_memory(p), 0) && !now.on_fiber) host_touches(p);
    return;
  }
  watching = false;
  if (reinterpret_cast<std::uintptr_t>(p) % Bytes != 0) touch(p, Bytes, Bytes, how == access_kind::write);
  check(p, Bytes, how);
  watching = true;
}

}  // namespace

extern "C" {

void __tsan_init() { instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

#define MLKIT_ACCESS(n)                                                                                       \
  void __tsan_read##n(void* p) { aligned<n>(p, access_kind::read); }                                          \
  void __tsan_write##n(void* p) { aligned<n>(p, access_kind::write); }                                        \
  void __tsan_read##n##_pc(void* p, void*) { aligned<n>(p, access_kind::read); }                              \
  void __tsan_write##n##_pc(void* p, void*) { aligned<n>(p, access_kind::write); }                            \
  void __tsan_volatile_read##n(void* p) { aligned<n>(p, access_kind::read); }                                 \
  void __tsan_volatile_write##n(void* p) { aligned<n>(p, access_kind::write); }                               \
  void __tsan_unaligned_read##n(void* p) { seen(p, n, access_kind::read); }                                   \
  void __tsan_unaligned_write##n(void* p) { seen(p, n, access_kind::write); }                                 \
  void __tsan_unaligned_volatile_read##n(void* p) { seen(p, n, access_kind::read); }                          \
  void __tsan_unaligned_volatile_write##n(void* p) { seen(p, n, access_kind::write); }                        \
  void __tsan_read_write##n(void* p) { aligned<n>(p, access_kind::read), aligned<n>(p, access_kind::write); } \
  void __tsan_unaligned_read_write##n(void* p) { seen(p, n, access_kind::read), seen(p, n, access_kind::write); }
MLKIT_ACCESS(1)
MLKIT_ACCESS(2)
MLKIT_ACCESS(4)
MLKIT_ACCESS(8)
MLKIT_ACCESS(16)
#undef MLKIT_ACCESS

void __tsan_read_range(void* p, std::size_t bytes) { seen(p, bytes, access_kind::read); }
void __tsan_write_range(void* p, std::size_t bytes) { seen(p, bytes, access_kind::write); }

#ifdef MLKIT_EMULATION_WRAPS
// Where the linker is told to --wrap them, calls come here: of copies that the compiler makes of large objects, too.
void* __real_memcpy(void*, const void*, std::size_t);
void* __real_memmove(void*, const void*, std::size_t);
void* __real_memset(void*, int, std::size_t);
void* __wrap_memcpy(void* to, const void* from, std::size_t bytes) {
  if (watching) seen(from, bytes, access_kind::read), seen(to, bytes, access_kind::write);
  return __real_memcpy(to, from, bytes);
}
void* __wrap_memmove(void* to, const void* from, std::size_t bytes) {
  if (watching) seen(from, bytes, access_kind::read), seen(to, bytes, access_kind::write);
  return __real_memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int value, std::size_t bytes) {
  if (watching) seen(to, bytes, access_kind::write);
  return __real_memset(to, value, bytes);
}
#endif
// Later versions of Clang call these instead.
void* __tsan_memcpy(void* to, const void* from, std::size_t bytes) {
  seen(from, bytes, access_kind::read), seen(to, bytes, access_kind::write);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, std::size_t bytes) {
  seen(from, bytes, access_kind::read), seen(to, bytes, access_kind::write);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, std::size_t bytes) {
  seen(to, bytes, access_kind::write);
  return std::memset(to, value, bytes);
}

// Atomic operations are of host code only; device code has functions of its own for them.
#define MLKIT_ATOMIC(bits, T)                                                                                         \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }             \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }             \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }     \
  T __tsan_atomic##bits##_fetch_xor(volatile T* p, T v, int) { return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_nand(volatile T* p, T v, int) { return __atomic_fetch_nand(p, v, __ATOMIC_SEQ_CST); } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* c, T v, int, int) {                             \
    return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                           \
  }                                                                                                                   \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* c, T v, int, int) {                               \
    return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                           \
  }                                                                                                                   \
  T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T c, T v, int, int) {                                   \
    __atomic_compare_exchange_n(p, &c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                 \
    return c;                                                                                                         \
  }
MLKIT_ATOMIC(8, std::uint8_t)
MLKIT_ATOMIC(16, std::uint16_t)
MLKIT_ATOMIC(32, std::uint32_t)
MLKIT_ATOMIC(64, std::uint64_t)
#undef MLKIT_ATOMIC
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
