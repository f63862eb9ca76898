// Many adapters in one batch, of mixed ranks: one for each row, or for each run of rows.
#include "lora/layer.hpp"

namespace {

constexpr index_t ranks[] = {4, 16, 1, 40};

template <class T>
struct batch : layer<T> {
  std::deque<placed<T>> halves;
  std::vector<lora::adapter_view<T>> adapters;
  std::vector<mat> updates;
  placed_bytes ints{this->exec};

  batch(index_t tokens, index_t in, index_t out) : layer<T>(tokens, in, out, 4) {
    std::uint64_t seed = 20;
    for (const index_t rank : ranks) {
      placed<T>& a = halves.emplace_back(this->exec, normal<T>(rank, in, seed++, 0.3f));
      placed<T>& b = halves.emplace_back(this->exec, normal<T>(out, rank, seed++, 0.3f));
      const double scale = rank == 1 ? 0.0 : 0.5 + static_cast<double>(rank) / 32;
      adapters.push_back({a.view(), b.view(), scale});
      updates.push_back(scaled(multiply(b.values, a.values), scale));
    }
  }
  mat want(const std::vector<int>& ids) const {
    mat y = this->with_bias(multiply(this->x.values, transpose(this->w.values)));
    for (index_t i = 0; i < y.rows; ++i) {
      const int id = ids[static_cast<std::size_t>(i)];
      if (id < 0) continue;
      for (index_t j = 0; j < y.cols; ++j)
        for (index_t k = 0; k < this->in; ++k)
          y(i, j) += this->x.values(i, k) * updates[static_cast<std::size_t>(id)](j, k);
    }
    return y;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("each row takes its own adapter, on every executor", "[lora][cuda]", float, bf16) {
  for (const shape& s : {shape{1, 64, 40, 0}, shape{7, 128, 300, 0}, shape{33, 72, 20, 0}, shape{5, 37, 21, 0}}) {
    INFO(s);
    batch<TestType> l(s.tokens, s.in, s.out);
    std::vector<int> ids;
    for (int i = 0; i < s.tokens; ++i) ids.push_back(i * 7 % 5 - 1);
    auto y = l.result(s.tokens, s.out), base = l.result(s.tokens, s.out);
    lora::linear(l.exec, l.x.view(), l.base(), lora::per_row{l.adapters, l.ints.place(ids.data(), s.tokens)}, y.view());
    CHECK(difference(l.read(y), l.want(ids)) < tolerance<TestType>());
    lora::linear(l.exec, l.x.view(), l.base(), base.view());
    const mat have = l.read(y), plain = l.read(base);
    bool same = true;  // rows without an adapter, and with one of scale 0
    for (index_t i = 0; i < s.tokens; ++i)
      if (ids[static_cast<std::size_t>(i)] == -1 || ids[static_cast<std::size_t>(i)] == 2)
        for (index_t j = 0; j < s.out; ++j) same = same && have(i, j) == plain(i, j);
    CHECK(same);

    const std::vector<int> starts = {0, static_cast<int>(s.tokens / 3), static_cast<int>(s.tokens / 3),
                                     static_cast<int>(s.tokens / 2), static_cast<int>(s.tokens)};
    for (int run = 0; run < 4; ++run)
      for (int i = starts[static_cast<std::size_t>(run)]; i < starts[static_cast<std::size_t>(run) + 1]; ++i)
        ids[static_cast<std::size_t>(i)] = run;
    lora::linear(l.exec, l.x.view(), l.base(), lora::segments{l.adapters, l.ints.place(starts.data(), 5)}, y.view());
    CHECK(difference(l.read(y), l.want(ids)) < tolerance<TestType>());
  }
}
