// Workspace: aligned, reused, counted, and separate for each thread.
#include <mlkit/core/memory.hpp>

#include <catch2/catch.hpp>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

using mlkit::detail::workspace;

TEST_CASE("workspace is aligned and reused by the next call on the thread", "[memory]") {
  const void* first;
  {
    const workspace<float> a(1000);
    first = a.data();
    REQUIRE(reinterpret_cast<std::uintptr_t>(first) % 64 == 0);
  }
  const workspace<float> b(900);
  CHECK(b.data() == first);
  const workspace<double> c(10);  // while b is held, another block
  CHECK(static_cast<const void*>(c.data()) != first);
  const workspace<double> none(0);
  CHECK(none.data() != nullptr);
}

TEST_CASE("the peak counts what was held at once", "[memory]") {
  mlkit::reset_workspace_peak();
  const mlkit::index_t before = mlkit::workspace_peak_bytes();
  {
    const workspace<float> a(1000);
    { const workspace<double> b(500); }
    { const workspace<double> b(250); }
  }
  CHECK(mlkit::workspace_peak_bytes() - before == 8000);
  mlkit::reset_workspace_peak();
  CHECK(mlkit::workspace_peak_bytes() == before);
}

TEST_CASE("the peak is over all threads, whose blocks are their own", "[memory]") {
  mlkit::reset_workspace_peak();
  const mlkit::index_t before = mlkit::workspace_peak_bytes();
  std::vector<std::thread> threads;
  std::atomic<int> holding{0}, wrong{0};
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int round = 0; round < 200; ++round) {
        const workspace<int> w(100 + round);
        for (int i = 0; i < 100; ++i) w.data()[i] = t;
        std::this_thread::yield();
        for (int i = 0; i < 100; ++i) wrong += w.data()[i] != t;
      }
      const workspace<int> w(1000);
      ++holding;
      while (holding < 4) std::this_thread::yield();
    });
  for (std::thread& t : threads) t.join();
  CHECK(wrong == 0);
  CHECK(mlkit::workspace_peak_bytes() - before == 16000);
}

TEST_CASE("memory that cannot be had is std::bad_alloc", "[memory]") {
  CHECK_THROWS_AS(mlkit::detail::aligned_allocate(SIZE_MAX - 10), std::bad_alloc);
  mlkit::release_workspace();
  const workspace<float> again(10);
  CHECK(again.data() != nullptr);
}
