// Attention maps in loops: every probability is stored.
#pragma once

#include "reference.hpp"

namespace attention_reference {

// [batch, heads, queries, keys], doubles.
struct stored_maps {
  index_t batch, heads, queries, keys;
  std::vector<double> of = std::vector<double>(static_cast<std::size_t>(batch * heads * queries * keys));
  double& operator()(index_t b, index_t h, index_t i, index_t j) {
    return of.at(static_cast<std::size_t>(((b * heads + h) * queries + i) * keys + j));
  }
  double mean(index_t b, index_t i, index_t j) {
    double sum = 0;
    for (index_t h = 0; h < heads; ++h) sum += (*this)(b, h, i, j);
    return sum / static_cast<double>(heads);
  }
};

// softmax(scores(q k^T)) with sums in Sum and scores and probabilities rounded to Stored: <double, double> is what is
// right.
template <class Sum, class Stored, class T>
stored_maps naive_maps(const mlkit::tensor<T, 4>& q, const mlkit::tensor<T, 4>& k, const meaning& m) {
  stored_maps maps{q.extent(0), q.extent(1), q.extent(2), k.extent(2)};
  const auto stored = [](auto x) { return static_cast<Sum>(static_cast<Stored>(static_cast<Sum>(x))); };
  const auto at = [](index_t j) { return static_cast<std::size_t>(j); };
  std::vector<Sum> s(at(maps.keys));
  for (index_t b = 0; b < maps.batch; ++b)
    for (index_t h = 0; h < maps.heads; ++h)
      for (index_t i = 0; i < maps.queries; ++i) {
        const Sum sink = static_cast<Sum>(m.sink(h)), infinity = static_cast<Sum>(inf);
        Sum top = sink, total = 0;
        for (index_t j = 0; j < maps.keys; ++j) {
          Sum dot = 0;
          for (index_t c = 0; c < q.extent(3); ++c)
            dot += static_cast<Sum>(q(b, h, i, c)) * static_cast<Sum>(k(b, h / (maps.heads / k.extent(1)), j, c));
          s[at(j)] = stored(m.score(static_cast<double>(stored(dot)), b, h, i, j));
          top = std::max(top, s[at(j)]);
        }
        if (top == -infinity) continue;
        for (Sum& x : s) total += x = std::exp(x - top);
        if (sink != -infinity) total += std::exp(sink - top);
        for (index_t j = 0; j < maps.keys; ++j)
          maps(b, h, i, j) =
              static_cast<double>(stored(static_cast<Sum>(m.factor(b, h, i, j)) * stored(s[at(j)] / total)));
      }
  return maps;
}

}  // namespace attention_reference
