// A decoding step with an adapter as one kernel, whose blocks form clusters: a program of its own, since MLKIT_CLUSTERS
// is one for all of its files.
#define MLKIT_CLUSTERS 1
#include "lora/linear_cases.hpp"

namespace {

// Ranks up to 16 that fill vectors, and not; weights of whole clusters, and not; all row counts that are few.
constexpr shape shapes[] = {{1, 64, 48, 4},   {3, 256, 33, 16},   {8, 512, 64, 8},   {9, 128, 40, 5},
                            {16, 320, 95, 7}, {5, 1088, 128, 16}, {16, 320, 31, 24}, {5, 37, 70, 3}};

}  // namespace

TEMPLATE_TEST_CASE("decoding by clusters of blocks", "[lora][cuda]", bf16, f16) {
  for (const shape& s : shapes) linear_cases::check_forward<TestType>(s);
}

TEST_CASE("decoding by clusters of blocks: scale 0, the same bits, dora, low precision", "[lora][cuda]") {
  linear_cases::check_no_scale<bf16>({3, 128, 40, 8});
  linear_cases::check_low_precision<bf16>({4, 304, 88, 12});
  linear_cases::check_low_precision<f16>({12, 304, 88, 16});
  const layer<bf16> l(7, 320, 95, 12);
  auto y = l.result(7, 95), again = l.result(7, 95);
  lora::linear(l.exec, l.x, l.base(), l.adapter(), y);
  lora::linear(l.exec, l.x, l.base(), l.adapter(), again);
  CHECK(same_bits(l.read(y), l.read(again)));

  const auto magnitude = normal_vector<bf16>(95, 8, 0.2f, 1.5f);
  const auto placed_magnitude = test::on_device(l.exec, magnitude);
  lora::linear(l.exec, l.x, l.base(), lora::dora{l.adapter(), placed_magnitude}, y);
  std::vector<double> factors;
  const mat merged = l.merged();
  for (index_t i = 0; i < 95; ++i) {
    double square = 0;
    for (index_t k = 0; k < 320; ++k) square += merged(i, k) * merged(i, k);
    factors.push_back(static_cast<double>(magnitude(i)) / std::sqrt(square));
  }
  CHECK(difference(l.read(y), l.with_bias(scale_columns(multiply(l.x.values, transpose(merged)), factors))) <
        tolerance<bf16>());
}
