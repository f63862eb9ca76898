// cpu: the executor that runs kernels on the cores of this machine, and parallel_for over it.
#pragma once

#include <algorithm>
#include <concepts>
#include <exception>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "config.hpp"
#include "error.hpp"

#if MLKIT_USE_OPENMP
#include <omp.h>
#else
#include <atomic>
#include <condition_variable>
#include <deque>
#include <thread>
#endif

namespace MLKIT_NAMESPACE {

/// A pool of threads of the user's own. `size()` says how many tasks run at once; `run(n, f)` calls f(0) .. f(n-1),
/// each once, in any order and on any threads, and returns when all have returned. f does not throw.
template <class Pool>
concept thread_pool = requires(Pool& pool, void (*f)(int)) {
  { pool.size() } -> std::convertible_to<int>;
  pool.run(0, f);
};

namespace detail {

/// A reference to a callable void(int), without owning or allocating.
class task_ref {
 public:
  template <class F>
    requires(!std::same_as<std::remove_cvref_t<F>, task_ref>)
  task_ref(F& f)
  noexcept
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, int i) { (*static_cast<F*>(object))(i); }) {}
  void operator()(int i) const { call_(object_, i); }

 private:
  void* object_;
  void (*call_)(void*, int);
};

}  // namespace detail

/// A reference to the user's own pool, or to none.
class pool_ref {
 public:
  pool_ref() = default;
  template <thread_pool Pool>
    requires(!std::same_as<std::remove_cvref_t<Pool>, pool_ref>)
  pool_ref(Pool& pool)
  noexcept
      : pool_(&pool),
        size_([](void* p) { return static_cast<int>(static_cast<Pool*>(p)->size()); }),
        run_([](void* p, int n, detail::task_ref f) { static_cast<Pool*>(p)->run(n, f); }) {}
  explicit operator bool() const noexcept { return pool_ != nullptr; }
  int size() const { return size_(pool_); }
  void run(int n, detail::task_ref f) const { run_(pool_, n, f); }

 private:
  void* pool_ = nullptr;
  int (*size_)(void*) = nullptr;
  void (*run_)(void*, int, detail::task_ref) = nullptr;
};

/// The most threads that may be asked for; the machine's own may be more. An operating system refuses to start ever
/// more of them, and OpenMP's answer to that is to end the program.
inline constexpr int most_threads = 1024;

/// Runs kernels on this machine's cores.
///
/// A value: cheap to make and to copy, safe to use from several threads at once and from within a task (where the inner
/// call runs on the calling thread alone). Results are the same bits for any number of threads and any pool.
/// Threads come from `pool` if given, else from OpenMP where the program is compiled with it, else from a pool of
/// std::threads that the process shares. Calls throw value_error for a `threads` that is negative, or above both
/// most_threads and the number of the machine's own.
struct cpu {
  int threads = 0;     ///< how many threads to use; 0 means all that the process may run on
  pool_ref pool = {};  ///< the user's own threads
};

namespace detail {
template <class E>
inline constexpr bool is_executor = false;
template <>
inline constexpr bool is_executor<cpu> = true;
}  // namespace detail

/// What runs kernels: cpu, or cuda where core/cuda.cuh is included.
template <class E>
concept executor = detail::is_executor<std::remove_cvref_t<E>>;

namespace detail {

inline int hardware_threads() noexcept {
#if MLKIT_USE_OPENMP
  return omp_get_max_threads();
#else
  static const int n = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return n;
#endif
}

// Set while this thread runs a task, so that nested parallel calls run serially.
inline thread_local bool inside_task = false;

#if !MLKIT_USE_OPENMP

inline void spin_pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// The process-wide threads used where OpenMP is not. Idle threads spin for some microseconds, so that calls in a row
/// are cheap, then sleep.
///
/// A call publishes its task with one store of `call_` (its number and how many workers take part). Worker i runs part
/// i; the caller runs part 0 and then every part that no worker has begun, so that it never waits for a thread that
/// sleeps or that could not be started. A part is claimed by writing the number of the call into the worker's slot,
/// which a worker that wakes late, with the number of a past call, cannot do: all of that call's parts were claimed
/// then.
class shared_threads {
 public:
  static shared_threads& instance() {
    static shared_threads pool;
    return pool;
  }

  /// Calls f(0) .. f(n-1), f(0) on the calling thread. If another thread's call is in flight, all run on this one.
  void run(int n, task_ref f) {
    std::unique_lock busy(busy_, std::try_to_lock);
    const int helpers = busy.owns_lock() ? grow(std::min(n - 1, most_workers)) : 0;
    if (helpers == 0) {
      for (int i = 0; i < n; ++i) f(i);
      return;
    }
    // More threads than cores must not spin: each turn that one spins is a turn that another does not work.
    spins_.store(n <= hardware_threads() ? spins_before_sleep : 0, std::memory_order_relaxed);
    task_ = &f;
    pending_.store(helpers, std::memory_order_relaxed);
    const std::uint64_t number = ++number_;
    call_.store(number * (most_workers + 1) + static_cast<unsigned>(helpers));
    if (sleeping_.load() != 0) {
      {
        std::lock_guard lock(mutex_);
      }  // whoever is about to sleep has either seen call_ or waits for the notification
      wake_.notify_all();
    }
    f(0);
    for (int i = helpers + 1; i < n; ++i) f(i);
    int done = 0;
    for (int i = helpers; i > 0; --i)
      if (claim(workers_[static_cast<std::size_t>(i - 1)], number)) {
        f(i);
        ++done;
      }
    if (pending_.fetch_sub(done) != done) wait_for_helpers();
  }

  ~shared_threads() {
    {
      std::lock_guard lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (worker& w : workers_) w.thread.join();
  }

 private:
  static constexpr int most_workers = (1 << 16) - 1;
  static constexpr int spins_before_sleep = 1000;  // of some 40 (Zen) to 140 (Skylake and later) cycles

  struct alignas(64) worker {
    std::atomic<std::uint64_t> claimed{0};  // the last call whose part was begun, by the worker or by the caller
    std::thread thread;
  };

  static bool claim(worker& w, std::uint64_t number) noexcept {
    std::uint64_t last = w.claimed.load(std::memory_order_relaxed);
    return last < number && w.claimed.compare_exchange_strong(last, number);
  }

  // Starts workers until there are `count`, or no more can be had; how many there are, `count` at most.
  int grow(int count) noexcept {
    try {
      while (static_cast<int>(workers_.size()) < count) {
        const int id = static_cast<int>(workers_.size()) + 1;
        worker& w = workers_.emplace_back();
        try {
          w.thread = std::thread([this, id, &w, seen = call_.load()] { work(id, w, seen); });
        } catch (...) {
          workers_.pop_back();
          throw;
        }
      }
    } catch (...) {
    }
    return std::min(count, static_cast<int>(workers_.size()));
  }

  void work(int id, worker& self, std::uint64_t seen) {
    for (;;) {
      std::uint64_t call = call_.load();
      for (int spin = spins_.load(std::memory_order_relaxed); spin > 0 && call == seen; --spin) {
        spin_pause();
        call = call_.load(std::memory_order_acquire);
      }
      if (call == seen) {
        std::unique_lock lock(mutex_);
        sleeping_.fetch_add(1);  // before the last look at call_: the caller looks at it after it has written call_
        wake_.wait(lock, [&] { return (call = call_.load()) != seen || stop_.load(); });
        sleeping_.fetch_sub(1);
      }
      if (stop_.load()) return;
      seen = call;
      const int helpers = static_cast<int>(call % (most_workers + 1));
      if (id <= helpers && claim(self, call / (most_workers + 1))) {
        (*task_)(id);
        if (pending_.fetch_sub(1) == 1 && waiting_.load()) {
          { std::lock_guard lock(mutex_); }
          finished_.notify_one();
        }
      }
    }
  }

  void wait_for_helpers() {
    for (int spin = spins_.load(std::memory_order_relaxed); spin > 0; --spin) {
      if (pending_.load(std::memory_order_acquire) == 0) return;
      spin_pause();
    }
    std::unique_lock lock(mutex_);
    waiting_.store(true);
    finished_.wait(lock, [&] { return pending_.load() == 0; });
    waiting_.store(false);
  }

  std::mutex busy_;  // held for the length of a call
  std::uint64_t number_ = 0;
  const task_ref* task_ = nullptr;
  std::deque<worker> workers_;  // which stay where they are as it grows
  alignas(64) std::atomic<std::uint64_t> call_{0};
  alignas(64) std::atomic<int> pending_{0};
  std::atomic<bool> waiting_{false}, stop_{false};
  std::atomic<int> sleeping_{0}, spins_{0};
  std::mutex mutex_;  // for sleeping only
  std::condition_variable wake_, finished_;
};

#endif

/// Refuses numbers of threads that nothing can run on.
inline void check_executor(const cpu& exec) {
  if (exec.threads < 0) fail_value("cpu: threads = ", exec.threads, " is negative");
  if (!exec.pool && exec.threads > most_threads && exec.threads > hardware_threads())
    fail_value("cpu: threads = ", exec.threads, " is above ", std::max(most_threads, hardware_threads()));
}

/// How many threads a call on `exec` may use.
inline int concurrency(const cpu& exec) {
  check_executor(exec);
  if (inside_task) return 1;
#if MLKIT_USE_OPENMP
  if (!exec.pool && omp_in_parallel()) return 1;
#endif
  const int available = exec.pool ? exec.pool.size() : hardware_threads();
  return std::max(1, exec.threads == 0 ? available : exec.pool ? std::min(exec.threads, available) : exec.threads);
}

/// Calls f(begin, end) for a static partition of [0, n) into contiguous, balanced ranges, one a thread. The partition
/// depends on n and the thread count alone; what f computes for an index must not depend on the range it came in.
/// If ranges throw, the exception of the lowest one is rethrown here, after all have ended.
template <std::invocable<index_t, index_t> F>
void parallel_ranges(const cpu& exec, index_t n, F&& f) {
  if (n <= 0) return;
  const int parts = static_cast<int>(std::min<index_t>(n, concurrency(exec)));
  if (parts == 1) {
    f(index_t{0}, n);
    return;
  }
  std::exception_ptr failure;
  int failed = parts;
  std::mutex failing;
  const auto part = [&](int i) noexcept {
    const bool outer = std::exchange(inside_task, true);
    try {
      f(n * i / parts, n * (i + 1) / parts);
    } catch (...) {
      std::lock_guard lock(failing);
      if (i < failed) {
        failed = i;
        failure = std::current_exception();
      }
    }
    inside_task = outer;
  };
  if (exec.pool) {
    exec.pool.run(parts, task_ref(part));
  } else {
#if MLKIT_USE_OPENMP
#pragma omp parallel for schedule(static) num_threads(parts)
    for (int i = 0; i < parts; ++i) part(i);
#else
    shared_threads::instance().run(parts, task_ref(part));
#endif
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace detail

/// Calls f(i) for every i in [0, n), spread over the executor's threads in contiguous ranges. The first exception that
/// f throws is rethrown after all ranges have ended.
template <std::invocable<index_t> F>
void parallel_for(const cpu& exec, index_t n, F&& f) {
  detail::parallel_ranges(exec, n, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace MLKIT_NAMESPACE
