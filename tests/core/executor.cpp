// The cpu executor: every index once, for any number of threads, any pool, nested and concurrent use, and exceptions.
// Built twice, with std::threads and with OpenMP.
#include <mlkit/core/cpu.hpp>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <climits>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

// A user's own pool: starts a thread per task, in reverse order.
struct own_pool {
  int threads = 3;
  int runs = 0;
  int size() const { return threads; }
  template <class F>
  void run(int n, F f) {
    ++runs;
    std::vector<std::thread> all;
    for (int i = n - 1; i >= 0; --i) all.emplace_back([=] { f(i); });
    for (std::thread& t : all) t.join();
  }
};
static_assert(mlkit::thread_pool<own_pool>);
static_assert(!mlkit::thread_pool<int>);
static_assert(mlkit::executor<mlkit::cpu> && mlkit::executor<const mlkit::cpu&> && !mlkit::executor<own_pool>);

void check_each_once(const mlkit::cpu& exec, mlkit::index_t n) {
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
  mlkit::parallel_for(exec, n, [&](mlkit::index_t i) { ++seen[static_cast<std::size_t>(i)]; });
  mlkit::index_t once = 0;
  for (const auto& s : seen) once += s == 1;
  REQUIRE(once == n);
}

}  // namespace

TEST_CASE("parallel_for calls every index exactly once, for any number of threads", "[executor]") {
  for (int threads = 0; threads <= 9; ++threads)
    for (mlkit::index_t n : {0, 1, 2, 3, 7, 8, 9, 64, 1000, 4097}) check_each_once({.threads = threads}, n);
  check_each_once({.threads = 200}, 1000);  // more than the machine has, which is what was asked for
}

TEST_CASE("parallel_ranges gives contiguous, balanced ranges that depend on n and the thread count alone",
          "[executor]") {
  for (int threads = 1; threads <= 9; ++threads)
    for (mlkit::index_t n : {1, 5, 100, 1001}) {
      std::mutex mutex;
      std::set<std::pair<mlkit::index_t, mlkit::index_t>> ranges;
      mlkit::detail::parallel_ranges({.threads = threads}, n, [&](mlkit::index_t begin, mlkit::index_t end) {
        const std::lock_guard lock(mutex);
        ranges.insert({begin, end});
      });
      REQUIRE(static_cast<mlkit::index_t>(ranges.size()) == std::min<mlkit::index_t>(threads, n));
      mlkit::index_t at = 0;
      for (const auto& [begin, end] : ranges) {
        CHECK(begin == at);
        CHECK(end - begin >= n / static_cast<mlkit::index_t>(ranges.size()));
        CHECK(end - begin <= n / static_cast<mlkit::index_t>(ranges.size()) + 1);
        at = end;
      }
      CHECK(at == n);
    }
}

TEST_CASE("nothing is called for n = 0 or less", "[executor]") {
  for (mlkit::index_t n : {0, -1, -100})
    mlkit::parallel_for(mlkit::cpu{.threads = 4}, n, [](mlkit::index_t) { FAIL("called"); });
}

TEST_CASE("the user's own pool does the work", "[executor]") {
  own_pool pool;
  const mlkit::cpu exec{.pool = pool};
  CHECK(mlkit::detail::concurrency(exec) == 3);
  for (mlkit::index_t n : {1, 2, 3, 1000}) check_each_once(exec, n);
  CHECK(pool.runs == 3);  // n = 1 runs on the caller
  CHECK(mlkit::detail::concurrency({.threads = 2, .pool = pool}) == 2);
  CHECK(mlkit::detail::concurrency({.threads = 50, .pool = pool}) == 3);  // no more than the pool has
  pool.threads = 0;
  CHECK(mlkit::detail::concurrency(exec) == 1);
}

TEST_CASE("numbers of threads that cannot be are refused before anything starts", "[executor]") {
  std::atomic<bool> called{false};
  const auto call = [&](mlkit::index_t) { called = true; };
  CHECK_THROWS_WITH(mlkit::parallel_for(mlkit::cpu{.threads = -2}, 4, call),
                    "mlkit::value_error: cpu: threads = -2 is negative");
  // OpenMP would end the program where the system has no more threads to give.
  const int most = std::max(mlkit::most_threads, mlkit::detail::hardware_threads());
  for (const int many : {most + 1, 100'000, INT_MAX})
    for (const mlkit::index_t n : {1, 4, 1'000'000})
      CHECK_THROWS_WITH(
          mlkit::parallel_for(mlkit::cpu{.threads = many}, n, call),
          "mlkit::value_error: cpu: threads = " + std::to_string(many) + " is above " + std::to_string(most));
  mlkit::parallel_for(mlkit::cpu{.threads = 2}, 1, [&](mlkit::index_t) {  // nor from within a task
    CHECK_THROWS_AS(mlkit::parallel_for(mlkit::cpu{.threads = 100'000}, 4, call), mlkit::value_error);
  });
  CHECK_FALSE(called);
  mlkit::parallel_for(mlkit::cpu{.threads = most}, 8, call);
  CHECK(called);
}

TEST_CASE("a call inside a call runs on its own thread", "[executor]") {
  own_pool pool;
  for (const mlkit::cpu exec : {mlkit::cpu{.threads = 4}, mlkit::cpu{.pool = pool}}) {
    std::vector<std::atomic<int>> seen(64 * 64);
    std::atomic<int> wrong{0};
    mlkit::parallel_for(exec, 64, [&](mlkit::index_t i) {
      const auto self = std::this_thread::get_id();
      mlkit::parallel_for(exec, 64, [&](mlkit::index_t j) {
        wrong += std::this_thread::get_id() != self;
        ++seen[static_cast<std::size_t>(i * 64 + j)];
      });
    });
    CHECK(wrong == 0);
    CHECK(std::all_of(seen.begin(), seen.end(), [](const auto& s) { return s == 1; }));
  }
}

TEST_CASE("several threads may use the executor at once", "[executor]") {
  std::atomic<mlkit::index_t> total{0};
  std::vector<std::thread> users;
  for (int u = 0; u < 4; ++u)
    users.emplace_back([&, u] {
      for (int call = 0; call < 200; ++call)
        mlkit::parallel_for(mlkit::cpu{.threads = 1 + (u + call) % 5}, 100, [&](mlkit::index_t i) { total += i; });
    });
  for (std::thread& t : users) t.join();
  CHECK(total == 4 * 200 * 4950);
}

TEST_CASE("many short calls in a row, and after the threads have gone to sleep", "[executor]") {
  std::vector<int> data(8);
  for (int call = 0; call < 3000; ++call) {
    if (call % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    mlkit::parallel_for(mlkit::cpu{.threads = 1 + call % 4}, 8, [&](mlkit::index_t i) { ++data[i]; });
  }
  CHECK(data == std::vector<int>(8, 3000));
}

TEST_CASE("the caller waits for a slow thread without spinning for ever", "[executor]") {
  std::atomic<int> done{0};
  mlkit::parallel_for(mlkit::cpu{.threads = 2}, 2, [&](mlkit::index_t i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(i == 0 ? 5 : 30));
    ++done;
  });
  CHECK(done == 2);
}

TEST_CASE("exceptions reach the caller, that of the lowest range, after all ranges have ended", "[executor]") {
  own_pool pool;
  for (const mlkit::cpu exec : {mlkit::cpu{.threads = 1}, mlkit::cpu{.threads = 4}, mlkit::cpu{.pool = pool}})
    for (int repeat = 0; repeat < 50; ++repeat) {
      std::atomic<int> calls{0};
      const auto bad = [&](mlkit::index_t i) {
        ++calls;
        if (i % 3 == 1) throw std::out_of_range(std::to_string(i));
      };
      CHECK_THROWS_WITH(mlkit::parallel_for(exec, 12, bad), "1");
      check_each_once(exec, 12);  // and the executor works as before
    }
  std::atomic<int> ended{0};
  CHECK_THROWS_AS(mlkit::parallel_for(mlkit::cpu{.threads = 4}, 4,
                                      [&](mlkit::index_t i) {
                                        if (i == 0) throw std::runtime_error("at once");
                                        std::this_thread::sleep_for(std::chrono::milliseconds(2));
                                        ++ended;
                                      }),
                  std::runtime_error);
  CHECK(ended == 3);
}

TEST_CASE("a fixed partition gives the same bits for any number of threads", "[executor]") {
  std::vector<float> in(10007), reference;
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = 1.0f / static_cast<float>(i + 1);
  for (int threads = 1; threads <= 9; ++threads) {
    std::vector<float> sums(100);
    mlkit::parallel_for(mlkit::cpu{.threads = threads}, 100, [&](mlkit::index_t b) {
      for (std::size_t i = b * in.size() / 100; i < (b + 1) * in.size() / 100; ++i) sums[b] += in[i];
    });
    if (threads == 1) reference = sums;
    CHECK(sums == reference);
  }
}
