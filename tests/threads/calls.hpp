// Every kernel that cuts work up over threads, once, from two threads of the user's at the same time: for
// ThreadSanitizer and for qemu, which are too slow for the families' own tests.
#pragma once

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <functional>
#include <mlkit/core/cpu.hpp>
#include <mlkit/core/random.hpp>
#include <mlkit/core/tensor.hpp>
#include <thread>
#include <vector>

namespace threads {

using mlkit::cpu;
using mlkit::index_t;
using mlkit::matrix;
using outputs = std::vector<float>;

template <std::size_t Rank>
mlkit::tensor<float, static_cast<int>(Rank)> noise(const std::array<index_t, Rank>& shape, std::uint64_t stream) {
  mlkit::tensor<float, static_cast<int>(Rank)> t(shape);
  for (index_t i = 0; i < t.size(); ++i)
    t.data()[i] = mlkit::random_stream{5, stream}.uniform(static_cast<std::uint64_t>(i)) - 0.5f;
  return t;
}
inline matrix<float> noise(index_t rows, index_t columns, std::uint64_t stream) {
  return noise(std::array{rows, columns}, stream);
}

inline void append(outputs& all, const auto& tensor) { all.insert(all.end(), tensor.begin(), tensor.end()); }

// call(exec) has the same bits on one thread and on several, also while another thread of the user's calls it.
inline void check(const std::function<outputs(const cpu&)>& call) {
  const outputs one = call(cpu{.threads = 1});
  outputs beside;
  std::thread other([&] { beside = call(cpu{.threads = 2}); });
  const outputs three = call(cpu{.threads = 3});
  other.join();
  CHECK(three == one);
  CHECK(beside == one);
}

}  // namespace threads

using namespace threads;
