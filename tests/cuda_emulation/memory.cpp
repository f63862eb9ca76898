// Device memory: a range of addresses of which none is handed out twice, so that whoever uses what was freed is found.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "internal.hpp"
#include "memory.hpp"

#ifdef MLKIT_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_emulation {

std::uintptr_t arena_begin = 0;
std::size_t arena_bytes = 0;
unsigned char* arena_state = nullptr;

namespace {

// As cudaMalloc aligns. As many bytes at least lie between two allocations.
constexpr std::size_t alignment = 256;
// 0xff all over is NaN in every type of floating point, and -1.
constexpr int garbage = 0xff;

struct allocation {
  std::size_t bytes;
  bool live;
};

struct heap {
  std::mutex mutex;
  std::map<std::uintptr_t, allocation> all;
  std::set<void*> pinned;
  std::size_t next = alignment, live_bytes = 0, live = 0;

  heap() {
    for (std::size_t bytes = std::size_t{1} << 38; bytes >= device_memory_bytes; bytes /= 4) {
      const auto take = [&] {
        return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      };
      void* memory = take();
      if (memory == MAP_FAILED) continue;
      void* states = take();
      if (states == MAP_FAILED) {
        munmap(memory, bytes);
        continue;
      }
      arena_begin = reinterpret_cast<std::uintptr_t>(memory);
      arena_state = static_cast<unsigned char*>(states);
      arena_bytes = bytes;
      return;
    }
  }
};

heap& the_heap() {
  static heap* h = new heap;  // never destroyed: static objects may free device memory later
  return *h;
}

// Lets go of what lies in whole pages.
void release(unsigned char* begin, std::size_t bytes) {
  constexpr std::uintptr_t page = 4096;
  const auto first = (reinterpret_cast<std::uintptr_t>(begin) + page - 1) / page * page;
  const auto last = (reinterpret_cast<std::uintptr_t>(begin) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace

void* take_device_memory(std::size_t bytes) {
  heap& h = the_heap();
  const std::lock_guard lock(h.mutex);
  if (bytes > device_memory_bytes - h.live_bytes || bytes + 2 * alignment > arena_bytes - h.next) return nullptr;
  auto* p = reinterpret_cast<unsigned char*>(arena_begin + h.next);
  h.all[arena_begin + h.next] = {bytes, true};
  std::memset(arena_state + h.next, unset, bytes);
  std::memset(p, garbage, bytes);
#ifdef MLKIT_EMULATION_ASAN
  ASAN_POISON_MEMORY_REGION(p - alignment, alignment);
  const std::size_t used = (bytes + 7) / 8 * 8;
  ASAN_POISON_MEMORY_REGION(p + used, alignment);
  if (used > bytes) {
    ASAN_POISON_MEMORY_REGION(p + used - 8, 8);
    ASAN_UNPOISON_MEMORY_REGION(p + used - 8, bytes + 8 - used);
  }
#endif
  h.next += (bytes + alignment + alignment - 1) / alignment * alignment;
  h.live_bytes += bytes;
  ++h.live;
  return p;
}

bool give_device_memory_back(void* p) {
  heap& h = the_heap();
  const std::lock_guard lock(h.mutex);
  const auto at = h.all.find(reinterpret_cast<std::uintptr_t>(p));
  if (at == h.all.end() || !at->second.live) return false;
  const std::size_t bytes = at->second.bytes;
  unsigned char* states = arena_state + (at->first - arena_begin);
  std::memset(states, unaddressable, bytes);
  std::memset(p, garbage, bytes);
  release(states, bytes);
  release(static_cast<unsigned char*>(p), bytes);
#ifdef MLKIT_EMULATION_ASAN
  ASAN_POISON_MEMORY_REGION(p, bytes);
#endif
  at->second.live = false;
  h.live_bytes -= bytes;
  --h.live;
  return true;
}

void reuse_device_memory(void* p) {
  heap& h = the_heap();
  const std::lock_guard lock(h.mutex);
  const auto at = h.all.find(reinterpret_cast<std::uintptr_t>(p));
  if (at == h.all.end() || !at->second.live) return;
  std::memset(arena_state + (at->first - arena_begin), unset, at->second.bytes);
  std::memset(p, garbage, at->second.bytes);
}

memory_in_use device_memory_in_use() {
  heap& h = the_heap();
  const std::lock_guard lock(h.mutex);
  return {h.live, h.live_bytes};
}

void pin(void* p) {
  heap& h = the_heap();
  const std::lock_guard lock(h.mutex);
  h.pinned.insert(p);
}
bool unpin(void* p) {
  heap& h = the_heap();
  const std::lock_guard lock(h.mutex);
  return h.pinned.erase(p) != 0;
}
bool is_pinned(const void* p) {
  heap& h = the_heap();
  const std::lock_guard lock(h.mutex);
  return h.pinned.contains(const_cast<void*>(p));
}

std::size_t addressable_bytes(const void* p, std::size_t bytes) {
  const unsigned char* states = arena_state + (reinterpret_cast<std::uintptr_t>(p) - arena_begin);
  return static_cast<std::size_t>(std::find(states, states + bytes, unaddressable) - states);
}

void mark(void* p, std::size_t bytes, unsigned char state) {
  std::memset(arena_state + (reinterpret_cast<std::uintptr_t>(p) - arena_begin), state, bytes);
}

std::string where_in_device_memory(std::uintptr_t address) {
  heap& h = the_heap();
  const std::lock_guard lock(h.mutex);
  auto at = h.all.upper_bound(address);
  if (at == h.all.begin()) return "before the first allocation of device memory";
  // What is nearer to the begin of the next than to the end of the one before lies before the next.
  if (at != h.all.end()) {
    const auto before = std::prev(at);
    const std::uintptr_t end = before->first + before->second.bytes;
    if (address >= end && at->first - address < address - end)
      return std::to_string(at->first - address) + " bytes before " + (at->second.live ? "" : "freed ") +
             "device memory of " + std::to_string(at->second.bytes) + " bytes";
  }
  --at;
  return "offset " + std::to_string(address - at->first) + " of " + (at->second.live ? "" : "freed ") +
         "device memory of " + std::to_string(at->second.bytes) + " bytes";
}

}  // namespace cuda_emulation
