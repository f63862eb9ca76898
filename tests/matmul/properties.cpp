// Properties: the same bits for any number of threads and any pool, non-finite values where they belong, random shapes.
#include <thread>

#include "reference.hpp"

using namespace reference;
using mlkit::cpu;

namespace {

// A user's pool that runs tasks in reverse, on new threads.
struct reverse_pool {
  int threads;
  int size() const { return threads; }
  void run(int n, auto&& f) {
    std::vector<std::thread> workers;
    for (int i = n - 1; i > 0; --i) workers.emplace_back([&f, i] { f(i); });
    f(0);
    for (std::thread& t : workers) t.join();
  }
};

template <class T>
void check_threads(const shape& s) {
  for (layout l : {layout::rows, layout::columns}) {
    guarded<T> a(s.m, s.k, l), b(s.k, s.n, l);
    a.fill(1), b.fill(2);
    guarded<T> one(s.m, s.n, layout::rows);
    mlkit::matmul(cpu{.threads = 1}, a.view(), b.view(), one.view());
    const auto same = [&](const cpu& exec) {
      guarded<T> c(s.m, s.n, layout::rows);
      mlkit::matmul(exec, a.view(), b.view(), c.view());
      return std::memcmp(one.storage().data(), c.storage().data(), c.storage().size() * sizeof(T)) == 0;
    };
    for (int threads = 2; threads <= 8; ++threads) {
      INFO(s.m << " x " << s.n << " x " << s.k << ", " << threads << " threads");
      REQUIRE(same(cpu{.threads = threads}));
      reverse_pool pool{threads};
      REQUIRE(same(cpu{.pool = pool}));
    }
  }
}

constexpr shape around[] = {{30, 40, 25}, {3, 70, 41}, {70, 3, 41}, {1, 50, 19}, {90, 70, 513}, {8, 8, 8}};

}  // namespace

TEST_CASE("the same bits for 1 to 8 threads, of mlkit's and of a user's pool") {
  for_each_isa([] {
    for (const shape& s :
         {shape{203, 331, 260}, shape{5, 2100, 1030}, shape{3001, 9, 700}, shape{1, 4096, 2048}, shape{700, 700, 40}})
      check_threads<float>(s);
    check_threads<mlkit::bf16>({203, 331, 261});
  });
}

TEST_CASE("a NaN or an infinity reaches its row or column, and nothing else") {
  for_each_isa([] {
    for (const shape& s : around)
      for (int where = 0; where < 4; ++where)
        for (double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
          const auto l = static_cast<layout>(where);
          guarded<float> a(s.m, s.k, l), b(s.k, s.n, static_cast<layout>((where + 1) % 4)),
              c(s.m, s.n, layout::padded_rows);
          a.fill(1), b.fill(2);
          const index_t row = (s.m - 1) * where / 3, depth = (s.k - 1) * (3 - where) / 3, col = (s.n - 1) * where / 3;
          a.view()(row, depth) = static_cast<float>(bad);
          sums expected = naive(a.view(), b.view());
          mlkit::matmul(cpu{}, a.view(), b.view(), c.view());
          expect(c.view(), expected, "in a: " + describe(s, l, l, layout::padded_rows));
          a.fill(1);
          b.view()(depth, col) = static_cast<float>(bad);
          expected = naive(a.view(), b.view());
          mlkit::matmul(cpu{}, a.view(), b.view(), c.view());
          expect(c.view(), expected, "in b: " + describe(s, l, l, layout::padded_rows));
          a.view()(row, depth) = 0;  // zero times infinity is NaN
          expected = naive(a.view(), b.view());
          mlkit::matmul(cpu{}, a.view(), b.view(), c.view());
          expect(c.view(), expected, "zero times it: " + describe(s, l, l, layout::padded_rows));
        }
  });
}

TEST_CASE("random shapes, layouts and stages") {
  for_each_isa([] {
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
      const auto extent = [&](std::uint64_t counter) {
        return pick(seed, counter, pick(seed, counter + 10, 3) == 0 ? 300 : 40);
      };
      const shape s{extent(20), extent(21), extent(22)};
      const auto la = static_cast<layout>(pick(seed, 1, layouts)), lb = static_cast<layout>(pick(seed, 2, layouts)),
                 lc = static_cast<layout>(pick(seed, 3, layouts));
      guarded<float> a(s.m, s.k, la), b(s.k, s.n, lb), c(s.m, s.n, lc);
      a.fill(seed), b.fill(seed + 1000), c.fill(seed + 2000);
      std::vector<float> bias(static_cast<std::size_t>(s.n));
      for (index_t j = 0; j < s.n; ++j)
        bias[static_cast<std::size_t>(j)] = static_cast<float>(uniform(seed + 3000, static_cast<std::uint64_t>(j)));
      sums expected = naive(a.view(), b.view());
      for (index_t i = 0; i < s.m; ++i)
        for (index_t j = 0; j < s.n; ++j) {
          const double added = to_double(c.view()(i, j)) + bias[static_cast<std::size_t>(j)];
          expected(i, j) += added;
          expected.magnitude[static_cast<std::size_t>(i * s.n + j)] += 2;
        }
      mlkit::matmul(cpu{.threads = 1 + static_cast<int>(seed % 4)}, a.view(), b.view(), c.view(),
                    mlkit::epilogue{mlkit::accumulate{}, mlkit::add_bias{bias}});
      expect(c.view(), expected, "seed " + std::to_string(seed) + ": " + describe(s, la, lb, lc));
      REQUIRE(c.untouched_outside());
    }
  });
}

TEST_CASE("calls from many threads and from within tasks give the same product") {
  const shape s{120, 140, 160};
  guarded<float> a(s.m, s.k, layout::rows), b(s.k, s.n, layout::rows), c(s.m, s.n, layout::rows);
  a.fill(1), b.fill(2);
  mlkit::matmul(cpu{}, a.view(), b.view(), c.view());
  const auto same = [&] {
    mlkit::matrix<float> own({s.m, s.n});
    mlkit::matmul(cpu{.threads = 3}, a.view(), b.view(), own);
    return std::memcmp(own.data(), &c.view()(0, 0), static_cast<std::size_t>(own.size()) * sizeof(float)) == 0;
  };
  std::vector<char> good(16);
  mlkit::parallel_for(cpu{.threads = 4}, 8, [&](index_t i) { good[static_cast<std::size_t>(i)] = same(); });
  std::vector<std::thread> users;
  for (std::size_t i = 8; i < 16; ++i) users.emplace_back([&, i] { good[i] = same(); });
  for (std::thread& t : users) t.join();
  CHECK(std::count(good.begin(), good.end(), 1) == 16);
}
