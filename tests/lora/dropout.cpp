// The scalar forms of LoRA's own stages: one element at a time, as device code calls them.
#include <mlkit/lora/dropout.hpp>
#include <mlkit/lora/products.hpp>

#include <catch2/catch.hpp>
#include <vector>

using namespace mlkit;
using lora::detail::dropout_mask;

TEST_CASE("dropout: a mask on one element is the mask that products use, and drops its share") {
  constexpr index_t rows = 37, columns = 75;
  const dropout_mask mask = dropout_mask::make(0.25, 7, 3, columns).from(5);
  const random_stream random{7, 3};
  index_t dropped = 0;
  // With k = 0 an epilogue sees zeros, and what a bias of ones makes of them.
  const std::vector<float> ones(columns, 1);
  matrix<float> a({rows, 0}), b({0, columns}), c({rows, columns});
  matmul(cpu{.threads = 1}, a, b, c, epilogue{add_bias{ones}, lora::detail::mask_output{mask}});
  for (index_t i = 0; i < rows; ++i)
    for (index_t j = 0; j < columns; ++j) {
      const auto index = static_cast<std::uint64_t>((5 + i) * columns + j);
      const bool drop = static_cast<double>(random.bits(index)) < 0.25 * 4294967296.0;
      dropped += drop;
      const float want = drop ? 0.0f : 4.0f / 3.0f;
      REQUIRE(mask(1.0f, i, j) == want);
      REQUIRE(lora::detail::mask_output{mask}(1.0f, i, j) == want);
      REQUIRE(mask(1.0, i, j) == Approx(drop ? 0 : 4.0 / 3.0).epsilon(1e-15));
      REQUIRE(c(i, j) == want);
    }
  REQUIRE(dropped > rows * columns / 5);
  REQUIRE(dropped < rows * columns * 3 / 10);
}

TEST_CASE("how LoRA's products end, on one element") {
  const std::vector<float> rows{2, 3}, columns{4, 5, 6}, last{0.5f, 1};
  const std::vector<bf16> bias{bf16(1), bf16(2), bf16(3)}, row_bias{bf16(10), bf16(20)};
  const std::vector<f16> add{f16(100), f16(200), f16(300), f16(400), f16(500), f16(600)};  // [3, 2], read transposed
  std::vector<float> kept(8);
  const lora::detail::finish<float, bf16, f16> all{.value = 0.25f,
                                                   .rows = rows.data(),
                                                   .columns = columns.data(),
                                                   .bias = bias.data(),
                                                   .add = add.data(),
                                                   .add_row = 1,
                                                   .add_column = 2,
                                                   .last = last.data(),
                                                   .row_bias = row_bias.data(),
                                                   .kept = kept.data(),
                                                   .kept_row = 4};
  for (index_t i = 0; i < 2; ++i)
    for (index_t j = 0; j < 3; ++j) {
      const double product = 8 * 0.25 * (i == 0 ? 2 : 3);
      const double want =
          product * static_cast<double>(4 + j) + static_cast<double>(1 + j + 10 * (i + 1) + 100 * (2 * j + i + 1));
      REQUIRE(all(8.0f, i, j) == (i == 0 ? 0.5 : 1.0) * want);
      REQUIRE(kept[static_cast<std::size_t>(4 * i + j)] == product);
    }
  REQUIRE(lora::detail::finish<double, double, double>{}(3.5, 9, 9) == 3.5);

  const std::vector<int> ids{2, 0};
  const std::vector<float> table{1, 2, 3, 4, 5, 6};  // [3, 2]
  const lora::detail::add_token_rows<float, int, float> plain{{table.data(), {3, 2}}, ids.data()};
  REQUIRE(plain(1.0f, 0, 1) == 7);
  const lora::detail::add_token_rows<float, int, float> scaled{{table.data(), {3, 2}}, ids.data(), columns.data()};
  REQUIRE(scaled(1.0f, 1, 0) == 8);
}
