// Many adapters in one batch, of mixed ranks: one for each row, or for each run of rows.
#include "lora/layer.hpp"

using Catch::Matchers::Contains;

namespace {

// Adapters over one layer. With `gap` elements behind each row of A and B, which are NaN.
template <class T>
struct batch : layer<T> {
  std::deque<test::operand<T, 2>> halves;
  std::vector<lora::adapter_view<T>> adapters;
  std::vector<mat> updates;
  placed_bytes ints{this->exec};

  batch(index_t tokens, index_t in, index_t out) : layer<T>(tokens, in, out, 4) {}
  batch(index_t tokens, index_t in, index_t out, std::initializer_list<index_t> ranks) : batch(tokens, in, out) {
    for (const index_t rank : ranks) add(rank, rank == 1 ? 0.0 : 0.5 + static_cast<double>(rank) / 32);
  }
  void add(index_t rank, double scale, index_t gap = 0) {
    const auto seed = static_cast<std::uint64_t>(20 + 2 * adapters.size());
    const auto a = normal<T>(rank, this->in, seed, 0.3f), b = normal<T>(this->out, rank, seed + 1, 0.3f);
    adapters.push_back({place(a, gap), place(b, gap), scale});
    updates.push_back(scaled(multiply(from(b), from(a)), scale));
  }
  mlkit::matrix_view<const T> place(const mlkit::matrix<T>& m, index_t gap) {
    const index_t rows = m.extent(0), cols = m.extent(1);
    mlkit::matrix<T> wide({rows, cols + gap});
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < cols + gap; ++j) wide(i, j) = j < cols ? m(i, j) : static_cast<T>(std::nanf(""));
    return {halves.emplace_back(test::on_device(this->exec, wide)).data(), {rows, cols}, {cols + gap, 1}};
  }
  mat want(const std::vector<int>& ids) const {
    mat y = this->base_y();
    for (index_t i = 0; i < y.rows; ++i) {
      const int id = ids[static_cast<std::size_t>(i)];
      if (id < 0) continue;
      for (index_t j = 0; j < y.cols; ++j)
        for (index_t k = 0; k < this->in; ++k)
          y(i, j) += this->x.values(i, k) * updates[static_cast<std::size_t>(id)](j, k);
    }
    return y;
  }
  template <class I>
  mat run(const std::vector<I>& ids) {
    auto y = this->result(this->tokens, this->out);
    lora::linear(this->exec, this->x, this->base(),
                 lora::per_row{adapters, ints.place(ids.data(), static_cast<index_t>(ids.size()))}, y);
    return this->read(y);
  }
  mat base_alone() const {
    auto y = this->result(this->tokens, this->out);
    lora::linear(this->exec, this->x, this->base(), y);
    return this->read(y);
  }
};

std::vector<double> row_of(const mat& m, index_t row) {
  return {m.v.begin() + row * m.cols, m.v.begin() + (row + 1) * m.cols};
}

}  // namespace

TEMPLATE_TEST_CASE("each row takes its own adapter, on every executor", "[lora][cuda]", float, bf16) {
  for (const shape& s : {shape{1, 64, 40, 0}, shape{7, 128, 300, 0}, shape{33, 72, 20, 0}, shape{5, 37, 21, 0}}) {
    INFO(s);
    batch<TestType> l(s.tokens, s.in, s.out, {4, 16, 1, 40});
    std::vector<int> ids;
    for (int i = 0; i < s.tokens; ++i) ids.push_back(i * 7 % 5 - 1);
    const mat have = l.run(ids), plain = l.base_alone();
    CHECK(difference(have, l.want(ids)) < tolerance<TestType>());
    for (index_t i = 0; i < s.tokens; ++i)  // without an adapter, and with one of scale 0
      if (ids[static_cast<std::size_t>(i)] == -1 || ids[static_cast<std::size_t>(i)] == 2)
        CHECK(row_of(have, i) == row_of(plain, i));

    const std::vector<int> starts = {0, static_cast<int>(s.tokens / 3), static_cast<int>(s.tokens / 3),
                                     static_cast<int>(s.tokens / 2), static_cast<int>(s.tokens)};
    for (int run = 0; run < 4; ++run)
      for (int i = starts[static_cast<std::size_t>(run)]; i < starts[static_cast<std::size_t>(run) + 1]; ++i)
        ids[static_cast<std::size_t>(i)] = run;
    auto y = l.result(s.tokens, s.out);
    lora::linear(l.exec, l.x, l.base(), lora::segments{l.adapters, l.ints.place(starts.data(), 5)}, y);
    CHECK(difference(l.read(y), l.want(ids)) < tolerance<TestType>());
  }
}

TEMPLATE_TEST_CASE("more adapters than rows of a tile, of ranks that fill no vector, on every executor", "[lora][cuda]",
                   float, bf16) {
  batch<TestType> l(45, 64, 72);
  for (int i = 0; i < 40; ++i) l.add(1 + i * 5 % 19, 0.7, i % 3 == 0 ? 0 : 8 - (1 + i * 5 % 19) % 8);
  std::vector<int> ids;
  for (int i = 0; i < 45; ++i) ids.push_back(i < 20 ? 39 - i : i < 32 ? 7 : i * 11 % 40);
  CHECK(difference(l.run(ids), l.want(ids)) < tolerance<TestType>());
}

TEMPLATE_TEST_CASE("a row's bits depend on its own adapter alone, on every executor", "[lora][cuda]", float, bf16) {
  batch<TestType> l(37, 72, 48, {16, 8, 5, 24});
  std::vector<int> ids;
  for (int i = 0; i < 37; ++i) ids.push_back(i % 3);
  const mat together = l.run(ids);
  CHECK(same_bits(together, l.run(ids)));
  for (int id = 0; id < 3; ++id) {
    const mat alone = l.run(std::vector<int>(37, id));
    for (index_t i = id; i < 37; i += 3) CHECK(row_of(together, i) == row_of(alone, i));
  }
  // What is not finite stays in the rows whose adapter has it.
  auto endless = l.result(48, 16);
  l.adapters[3] = {l.adapters[0].a, endless.view(), 1.0};
  for (int i = 1; i < 37; i += 4) ids[static_cast<std::size_t>(i)] = 3;
  const mat partly = l.run(ids);
  for (index_t i = 0; i < 37; ++i)
    if (i % 4 == 1)
      CHECK(std::isnan(partly(i, 47)));
    else
      CHECK(row_of(together, i) == row_of(partly, i));
}

TEST_CASE("a batch without rows, or without adapters, on every executor", "[lora][cuda]") {
  batch<bf16> none(0, 64, 40, {4, 16});
  CHECK(none.run(std::vector<int>{}).v.empty());
  batch<bf16> bare(5, 64, 40);
  const std::vector<int> nobody(5, -1), start{0};
  CHECK(same_bits(bare.run(nobody), bare.base_alone()));
  batch<bf16> l(5, 64, 40, {4, 16});
  CHECK(same_bits(l.run(nobody), l.base_alone()));
  CHECK(same_bits(l.run(std::vector<std::int8_t>{1, 0, -1, 1, 0}), l.run(std::vector<std::int64_t>{1, 0, -1, 1, 0})));
}

TEST_CASE("many adapters: what is refused leaves y as it was, on every executor", "[lora][cuda]") {
  batch<float> l(5, 16, 12, {2, 4});
  auto y = l.result(5, 12);
  const auto ids = [&](std::initializer_list<int> values) {
    return l.ints.place(std::data(values), static_cast<index_t>(values.size()));
  };
  const auto refused = [&](const char* text, auto&& many) {
    CHECK_THROWS_WITH(lora::linear(l.exec, l.x, l.base(), many, y), Contains(text));
    for (const double v : l.read(y).v) CHECK(std::isnan(v));
  };
  refused("lora::linear: ids has 4 elements, but x has 5", lora::per_row{l.adapters, ids({0, 1, 0, 1})});
  refused("lora::linear: starts has 4 elements, but 2 adapters need 3", lora::segments{l.adapters, ids({0, 1, 2, 5})});
  auto wrong = l.adapters;
  wrong[1] = {l.adapters[0].a, l.adapters[1].b, 1};
  refused("lora::linear: adapters[1].b has 4 columns, but adapters[1].a has 2 rows",
          lora::per_row{wrong, ids({0, 1, 0, 1, 0})});
  wrong[1] = {l.adapters[1].a, l.adapters[1].b, std::nan("")};
  refused("lora::linear: adapters[1] has scale nan, which is not finite", lora::per_row{wrong, ids({0, 1, 0, 1, 0})});
  if constexpr (test::on_cpu) {
    refused("lora::linear: ids[3] = 2 is outside [-1, 2)", lora::per_row{l.adapters, ids({0, 1, 0, 2, 0})});
    refused("lora::linear: starts[2] = 1 is less than starts[1] = 3", lora::segments{l.adapters, ids({0, 3, 1})});
  }
}

#if !defined(MLKIT_TEST_ON_CPU)

TEMPLATE_TEST_CASE("many adapters in low precision: at most twice the error of the plain algorithm on a GPU",
                   "[lora][cuda]", bf16, f16) {
  batch<TestType> l(40, 304, 88, {16, 24, 8});
  std::vector<int> ids;
  for (int i = 0; i < 40; ++i) ids.push_back(i % 3);
  const mat base = rounded<TestType>(l.base_y());
  mat naive(40, 88);
  for (int id = 0; id < 3; ++id) {
    const auto& p = l.adapters[static_cast<std::size_t>(id)];
    const auto host = [&](const mlkit::matrix_view<const TestType>& v) {
      test::operand<TestType, 2> copy(l.exec, v.extents);
      test::copy_bytes(l.exec, copy.data(), v.data, static_cast<std::size_t>(v.size()) * sizeof(TestType));
      return from(test::to_host(l.exec, copy));
    };
    const mat h = rounded<TestType>(multiply(l.x.values, transpose(host(p.a))));
    const mat up = rounded<TestType>(scaled(rounded<TestType>(multiply(h, transpose(host(p.b)))), p.scale));
    const mat y = rounded<TestType>(add(base, up));
    for (index_t i = id; i < 40; i += 3)
      for (index_t j = 0; j < 88; ++j) naive(i, j) = y(i, j);
  }
  const mat want = l.want(ids);
  CHECK(difference(l.run(ids), want) <= 2 * difference(naive, want));
}

TEMPLATE_TEST_CASE("lora on a GPU: a row whose adapter does not exist gets the base alone", "[lora][cuda]", float,
                   bf16) {
  batch<TestType> l(21, 64, 40, {16, 8});
  std::vector<std::int64_t> ids;
  const std::int64_t strange[] = {2, -2, std::int64_t{1} << 40, INT64_MIN, 1, 0, INT64_MAX};
  std::vector<int> meant;
  for (std::size_t i = 0; i < 21; ++i) {
    ids.push_back(strange[i % 7]);
    meant.push_back(i % 7 == 4 ? 1 : i % 7 == 5 ? 0 : -1);
  }
  CHECK(difference(l.run(ids), l.want(meant)) < tolerance<TestType>());
  // Runs that begin late, go back and end early.
  const std::vector<int> starts{3, 9, 6};
  auto y = l.result(21, 40);
  lora::linear(l.exec, l.x, l.base(), lora::segments{l.adapters, l.ints.place(starts.data(), 3)}, y);
  const mat have = l.read(y), plain = l.base_alone();
  for (index_t i = 0; i < 3; ++i) CHECK(row_of(have, i) == row_of(plain, i));
  for (const double v : have.v) CHECK_FALSE(std::isnan(v));

  if (l.exec.properties().reaches_host_memory) return;
  const std::vector<int> host_ids(21, 0);
  CHECK_THROWS_WITH(lora::linear(l.exec, l.x, l.base(), lora::per_row{l.adapters, host_ids}, y),
                    Contains("lora::linear: ids lies in host memory"));
}

#endif
