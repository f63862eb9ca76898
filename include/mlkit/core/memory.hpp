// Aligned memory: what tensors own and what kernels work in.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "config.hpp"

namespace MLKIT_NAMESPACE {
namespace detail {

inline constexpr std::size_t cache_line = 64;
inline constexpr std::size_t huge_page = std::size_t{2} << 20;

struct aligned_free {
  void operator()(void* p) const noexcept { std::free(p); }
};

template <class T>
using aligned_ptr = std::unique_ptr<T[], aligned_free>;

/// Uninitialised memory, aligned to a cache line; large blocks to huge pages, which spares TLB misses when streaming.
inline void* aligned_allocate(std::size_t bytes) {
  const std::size_t alignment = bytes >= 2 * huge_page ? huge_page : cache_line;
  if (bytes > SIZE_MAX - alignment) throw std::bad_alloc();
  const std::size_t rounded = bytes ? (bytes + alignment - 1) / alignment * alignment : alignment;
  void* p = std::aligned_alloc(alignment, rounded);
  if (!p) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (alignment == huge_page) (void)madvise(p, rounded, MADV_HUGEPAGE);
#endif
  return p;
}

template <class T>
aligned_ptr<T> make_aligned(index_t count) {
  return aligned_ptr<T>(static_cast<T*>(aligned_allocate(static_cast<std::size_t>(count) * sizeof(T))));
}

// Bytes that kernels hold as workspace, over all threads.
inline std::atomic<index_t> workspace_now{0};
inline std::atomic<index_t> workspace_high{0};

inline void workspace_count(index_t bytes) noexcept {
  const index_t now = workspace_now.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  index_t high = workspace_high.load(std::memory_order_relaxed);
  while (now > high && !workspace_high.compare_exchange_weak(high, now, std::memory_order_relaxed)) {
  }
}

/// Free blocks of one thread, kept for the next call.
struct workspace_cache {
  struct block {
    aligned_ptr<std::byte> data;
    std::size_t bytes = 0;
  };
  std::vector<block> free;

  block take(std::size_t bytes) {
    std::size_t best = free.size();
    for (std::size_t i = 0; i < free.size(); ++i)
      if (free[i].bytes >= bytes && (best == free.size() || free[i].bytes < free[best].bytes)) best = i;
    if (best == free.size()) {
      if (!free.empty()) free.pop_back();  // too small: its place is taken by the larger one
      return {make_aligned<std::byte>(static_cast<index_t>(bytes)), bytes};
    }
    block b = std::move(free[best]);
    free[best] = std::move(free.back());
    free.pop_back();
    return b;
  }
  void give(block b) noexcept {
    try {
      free.push_back(std::move(b));
    } catch (...) {  // no room to remember it: it is simply freed
    }
  }
};

inline workspace_cache& this_thread_workspace() {
  thread_local workspace_cache cache;
  return cache;
}

/// Scratch memory for `count` elements of T, aligned to a cache line, uninitialised; reused by later calls on this
/// thread.
template <class T>
class workspace {
 public:
  explicit workspace(index_t count)
      : block_(this_thread_workspace().take(static_cast<std::size_t>(count) * sizeof(T) + 1)),
        bytes_(count * index_t{sizeof(T)}) {
    workspace_count(bytes_);
  }
  workspace(workspace&&) = delete;
  ~workspace() {
    workspace_now.fetch_sub(bytes_, std::memory_order_relaxed);
    this_thread_workspace().give(std::move(block_));
  }
  T* data() const noexcept { return reinterpret_cast<T*>(block_.data.get()); }

 private:
  workspace_cache::block block_;
  index_t bytes_;
};

}  // namespace detail

/// The most scratch memory, in bytes and over all threads, that kernels have held at once since the last reset.
inline index_t workspace_peak_bytes() noexcept { return detail::workspace_high.load(std::memory_order_relaxed); }

/// Starts a new measurement of workspace_peak_bytes().
inline void reset_workspace_peak() noexcept {
  detail::workspace_high.store(detail::workspace_now.load(std::memory_order_relaxed), std::memory_order_relaxed);
}

/// Frees the scratch memory that the calling thread keeps for later calls.
inline void release_workspace() noexcept { detail::this_thread_workspace().free.clear(); }

}  // namespace MLKIT_NAMESPACE
