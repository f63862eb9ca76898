// Attention layers in each dtype: the error against f64 is at most twice that of loops in the same dtype.
#include "layer.hpp"

using namespace layer_reference;

namespace {

// A unit in the last place of one.
template <class T>
constexpr double last_place = std::is_same_v<T, float>         ? 0x1p-23
                              : std::is_same_v<T, mlkit::bf16> ? 0x1p-7
                                                               : 0x1p-10;

// Root mean squares of what should be there and of the error: the largest error of few numbers is a matter of luck.
std::pair<double, double> mean_of(const std::vector<double>& want, const std::vector<double>& have) {
  REQUIRE(want.size() == have.size());
  double size = 0, error = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    size += want[i] * want[i];
    error += (want[i] - have[i]) * (want[i] - have[i]);
  }
  const auto mean = [&](double sum) { return std::sqrt(sum / static_cast<double>(want.size())); };
  return {mean(size), mean(error)};
}

template <class T, bool Self, bool Rotary>
void check_dtype(const layer_shape& s) {
  using enum kind;
  layer_problem<T, Self, Rotary> p(s, lora, plain, lora, lora);
  const results ours = p.template run<lora, plain, lora, lora>();
  const results want = p.template naive<double, double>(), loops = p.template naive<float, T>();
  REQUIRE(ours.size() == want.size());
  for (const auto& entry : want) {
    const auto ours_of = mean_of(entry.second, ours.at(entry.first));
    const double of_loops = mean_of(entry.second, loops.at(entry.first)).second;
    INFO(entry.first << " of size " << ours_of.first << ", " << s.queries << " queries, self " << Self);
    CHECK(ours_of.first > 1e-3);
    CHECK(ours_of.second <= 2 * of_loops + last_place<T> / 4 * ours_of.first);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("a layer's error is at most twice that of loops in the same dtype", "[attention][layer]", float,
                   mlkit::bf16, mlkit::f16) {
  for (const layer_shape& s : {layer_shape{}, layer_shape{2, 65, 77, 4, 2, 40, 24, 96, 80, 64, far, 0},
                               layer_shape{1, 9, 130, 2, 2, 16, 16, 32, 48, 33}}) {
    check_dtype<TestType, false, false>(s);
    check_dtype<TestType, true, true>(s);
  }
}
