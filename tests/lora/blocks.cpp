// Sizes beyond one block of whatever is worked on at once, and operands that do not lie by rows, against loops in f64.
#include <algorithm>
#include <catch2/catch.hpp>
#include <mlkit/lora.hpp>
#include <vector>

#include "reference.hpp"

namespace lora = mlkit::lora;
using mlkit::index_t;
using namespace reference;

namespace {

// ||W + s B A|| of every row.
std::vector<double> adapted_lengths(const mat& w, const mat& b, const mat& a, double s) {
  const mat adapted = add(w, multiply(b, a), s);
  std::vector<double> lengths;
  for (index_t i = 0; i < adapted.rows; ++i) {
    double square = 0;
    for (index_t k = 0; k < adapted.cols; ++k) square += adapted(i, k) * adapted(i, k);
    lengths.push_back(std::sqrt(square));
  }
  return lengths;
}

}  // namespace

TEST_CASE("more tokens than are taken at once, with dropout, plain and DoRA, h saved or not", "[lora][blocks]") {
  constexpr index_t tokens = 2 * 8192 + 3, in = 3, out = 4, rank = 2;
  REQUIRE(tokens > 2 * lora::detail::tokens_at_once);
  constexpr double s = 0.5, p = 0.25;
  const auto x = normal<double>(tokens, in, 1), w = normal<double>(out, in, 2), a = normal<double>(rank, in, 3),
             b = normal<double>(out, rank, 4), dyt = normal<double>(out, tokens, 5);
  const auto dy = mlkit::transposed(dyt.view());  // columns beside each other
  const auto m = normal_vector<double>(out, 6, 0.1f, 1);
  mat masked = from(x), mask(tokens, in);
  const mlkit::random_stream random{7, 8};
  for (index_t i = 0; i < tokens * in; ++i) {
    const bool kept = random.bits(static_cast<std::uint64_t>(i)) >= static_cast<std::uint32_t>(p * 0x1p32);
    const auto at = static_cast<std::size_t>(i);
    mask.v[at] = kept ? 1 / (1 - p) : 0;
    masked.v[at] *= mask.v[at];
  }
  const lora::adapter_view<double> adapter{a, b, s};
  const auto lengths = adapted_lengths(from(w), from(b), from(a), s);
  const mat h = scaled(multiply(masked, transpose(from(a))), s), up = multiply(h, transpose(from(b)));
  const mat through = multiply(masked, transpose(from(w)));
  for (const bool dora : {false, true})
    for (const bool save : {false, true}) {
      INFO("dora " << dora << ", h saved " << save);
      std::vector<double> g(out, 1), less(out, 0);
      for (std::size_t o = 0; dora && o < out; ++o) {
        g[o] = m.data()[o] / lengths[o];
        less[o] = g[o] - 1;
      }
      const mat y_want =
          add(add(multiply(from(x), transpose(from(w))), scale_columns(through, less)), scale_columns(up, g));
      const mat u = scale_columns(from(dy), g), gs = scaled(multiply(u, from(b)), s);
      const mat dx_want =
          add(multiply(from(dy), from(w)),
              times(add(multiply(gs, from(a)), multiply(scale_columns(from(dy), less), from(w))), mask));
      mlkit::matrix<double> y({tokens, out}), dx({tokens, in}), da({rank, in}), db({out, rank}), kept({tokens, rank});
      mlkit::vector<double> dm({out});
      lora::linear_options<double> o{.dropout = p, .seed = 7, .stream = 8};
      if (save) o.h = kept.view();
      if (dora) {
        const lora::dora d{adapter, m};
        lora::linear(mlkit::cpu{}, x, lora::dense{w}, d, y, o);
        lora::linear_backward(mlkit::cpu{}, x, lora::dense{w}, d, dy, lora::gradients{da, db, dm}, dx, o);
        for (index_t i = 0; i < out; ++i) {
          double sum = 0;
          for (index_t t = 0; t < tokens; ++t) sum += dy(t, i) * (through(t, i) + up(t, i));
          CHECK(dm(i) == Approx(sum / lengths[static_cast<std::size_t>(i)]).epsilon(1e-11));
        }
      } else {
        lora::linear(mlkit::cpu{}, x, lora::dense{w}, adapter, y, o);
        lora::linear_backward(mlkit::cpu{}, x, lora::dense{w}, adapter, dy, lora::gradients{da, db}, dx, o);
      }
      if (save) CHECK(difference(kept, h) < 1e-13);
      CHECK(difference(y, y_want) < 1e-13);
      CHECK(difference(dx, dx_want) < 1e-13);
      CHECK(difference(da, multiply(transpose(gs), masked)) < 1e-11);
      CHECK(difference(db, multiply(transpose(u), h)) < 1e-11);
    }
}

TEST_CASE("gradients in bf16 are rounded once, however many blocks they sum over", "[lora][blocks]") {
  // A block of 256 and four of 1 make 260; 257 would round to 256 each time.
  const index_t block = lora::detail::tokens_at_once, tokens = 5 * block;
  mlkit::matrix<mlkit::bf16> x({tokens, 1}), dy({tokens, 1}), w({1, 1}), a({1, 1}), b({1, 1}), da({1, 1}), db({1, 1});
  std::fill(x.begin(), x.end(), mlkit::bf16(1.0f));
  for (index_t i = 0; i < 5; ++i) dy(i * block, 0) = mlkit::bf16(i == 0 ? 256.0f : 1.0f);
  a(0, 0) = b(0, 0) = mlkit::bf16(1.0f);
  const lora::adapter_view<mlkit::bf16> p{a, b, 1};
  const mlkit::matrix_view<mlkit::bf16> no_dx;
  lora::linear_backward(mlkit::cpu{}, x, lora::dense{w}, p, dy, lora::gradients{da, db}, no_dx);
  CHECK(static_cast<float>(da(0, 0)) == 260);
  CHECK(static_cast<float>(db(0, 0)) == 260);
  mlkit::vector<mlkit::bf16> m({1}), dm({1});
  m(0) = mlkit::bf16(1.0f);  // ||w + b a|| = 1
  lora::linear_backward(mlkit::cpu{}, x, lora::dense{w}, lora::dora{p, m}, dy, lora::gradients{da, db, dm}, no_dx);
  CHECK(static_cast<float>(da(0, 0)) == 260);
  CHECK(static_cast<float>(db(0, 0)) == 260);
  CHECK(static_cast<float>(dm(0)) == 260);
}

TEST_CASE("scratch memory does not grow with tokens", "[lora][blocks]") {
  const mlkit::cpu exec{.threads = 1};
  constexpr index_t in = 8, out = 6, rank = 2;
  const auto w = normal<float>(out, in, 1), table = normal<float>(5, out, 2);
  const auto adapter = lora::make_adapter<float>({.in = in, .out = out, .rank = rank});
  const std::vector<lora::adapter_view<float>> adapters(2, adapter);
  const auto tokens_adapter = lora::make_adapter<float>({.in = 5, .out = out, .rank = rank, .embedding = true});
  const auto peak = [&](index_t tokens, auto&& call) {
    mlkit::matrix<float> x({tokens, in}), y({tokens, out}), dx({tokens, in}), da({rank, in}), db({out, rank});
    mlkit::release_workspace();
    mlkit::reset_workspace_peak();
    call(x, y, dx, lora::gradients{da, db});
    return mlkit::workspace_peak_bytes();
  };
  const auto independent = [&](const char* what, auto&& call) {
    INFO(what);
    const index_t tokens = 3 * lora::detail::tokens_at_once;
    CHECK(peak(tokens, call) == peak(2 * tokens, call));
  };
  independent("linear", [&](auto& x, auto& y, auto&, auto) { lora::linear(exec, x, lora::dense{w}, adapters[0], y); });
  independent("linear_backward", [&](auto& x, auto& y, auto& dx, auto g) {
    lora::linear_backward(exec, x, lora::dense{w}, adapters[0], y, g, dx);
  });
  independent("per_row", [&](auto& x, auto& y, auto&, auto) {
    std::vector<int> ids;
    for (index_t i = 0; i < x.extent(0); ++i) ids.push_back(static_cast<int>(i % 3) - 1);
    lora::linear(exec, x, lora::dense{w}, lora::per_row{adapters, ids}, y);
  });
  independent("segments", [&](auto& x, auto& y, auto&, auto) {
    const std::vector<index_t> starts{0, 5, x.extent(0)};
    lora::linear(exec, x, lora::dense{w}, lora::segments{adapters, starts}, y);
  });
  independent("embedding", [&](auto& x, auto& y, auto&, auto) {
    const std::vector<int> ids(static_cast<std::size_t>(x.extent(0)), 3);
    lora::embedding(exec, ids, table, tokens_adapter, y);
  });
}

TEST_CASE("norms of a weight that lies by columns, of more rows than a run", "[lora][blocks]") {
  const auto w = normal<double>(5, 1300, 1);
  const auto norms = lora::base_norms(mlkit::cpu{}, lora::dense<double>{mlkit::transposed(w.view())});
  for (index_t o = 0; o < 1300; ++o) {
    double square = 0;
    for (index_t k = 0; k < 5; ++k) square += w(k, o) * w(k, o);
    REQUIRE(norms.squares(o) == Approx(square).epsilon(1e-14));
  }
}

TEST_CASE("embeddings of more tokens than are taken at once, from a table that lies by columns", "[lora][blocks]") {
  constexpr index_t tokens = 8192 + 300, words = 11, width = 3, rank = 2;
  constexpr double s = 0.5;
  const auto wt = normal<double>(width, words, 1), a = normal<double>(rank, words, 2),
             b = normal<double>(width, rank, 3), dy = normal<double>(tokens, width, 4);
  const auto w = mlkit::transposed(wt.view());
  const auto m = normal_vector<double>(width, 5, 0.1f, 1);
  std::vector<int> ids;
  for (index_t t = 0; t < tokens; ++t) ids.push_back(static_cast<int>((t * t + t / 8192) % words));
  const lora::adapter_view<double> p{a, b, s};
  const auto lengths = adapted_lengths(from(wt), from(b), from(a), s);
  for (const bool dora : {false, true}) {
    INFO("dora " << dora);
    mat y_want(tokens, width), da_want(rank, words), db_want(width, rank), dm_want(width, 1);
    for (double& v : da_want.v) v = 1;
    for (double& v : db_want.v) v = 2;
    for (double& v : dm_want.v) v = 3;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t c = 0; c < width; ++c) {
        const index_t id = ids[static_cast<std::size_t>(t)];
        const double length = lengths[static_cast<std::size_t>(c)], g = dora ? m(c) / length : 1;
        double sum = w(id, c);
        for (index_t j = 0; j < rank; ++j) {
          sum += s * b(c, j) * a(j, id);
          da_want(j, id) += s * g * dy(t, c) * b(c, j);
          db_want(c, j) += s * g * dy(t, c) * a(j, id);
        }
        y_want(t, c) = g * sum;
        dm_want(c, 0) += dy(t, c) * sum / length;
      }
    mlkit::matrix<double> y({tokens, width}), da({rank, words}), db({width, rank});
    mlkit::vector<double> dm({width});
    std::fill(da.begin(), da.end(), 1.0);
    std::fill(db.begin(), db.end(), 2.0);
    std::fill(dm.begin(), dm.end(), 3.0);
    if (dora) {
      const lora::dora d{p, m};
      lora::embedding(mlkit::cpu{}, ids, w, d, y);
      lora::embedding_backward(mlkit::cpu{}, ids, w, d, dy, lora::gradients{da, db, dm}, true);
      for (index_t c = 0; c < width; ++c) CHECK(dm(c) == Approx(dm_want(c, 0)).epsilon(1e-10));
    } else {
      lora::embedding(mlkit::cpu{}, ids, w, p, y);
      lora::embedding_backward(mlkit::cpu{}, ids, w, p, dy, lora::gradients{da, db}, true);
    }
    CHECK(difference(y, y_want) < 1e-13);
    CHECK(difference(da, da_want) < 1e-11);
    CHECK(difference(db, db_want) < 1e-11);
  }
}

TEST_CASE("convolutions of a part of an image, with wide borders and steps, plain and DoRA", "[lora][blocks]") {
  const lora::conv_options o{.kernel = {2, 3}, .stride = {2, 3}, .padding = {3, 5}, .dilation = {2, 1}};
  constexpr index_t images = 2, channels = 2, height = 39, width = 50, out = 3, rank = 2;
  constexpr double s = 0.5;
  mlkit::tensor<double, 4> around({images, channels, height + 4, width + 6});
  const mlkit::random_stream random{3, 4};
  for (index_t i = 0; i < around.size(); ++i) around.data()[i] = random.normal(static_cast<std::uint64_t>(i));
  const mlkit::tensor_view<const double, 4> x(&around(0, 0, 2, 3), {images, channels, height, width},
                                              around.view().strides);
  const auto w = normal<double>(out, channels * 6, 1), a = normal<double>(rank, channels * 6, 2),
             b = normal<double>(out, rank, 3);
  const auto m = normal_vector<double>(out, 5, 0.1f, 1);
  const lora::adapter_view<double> p{a, b, s};
  const index_t high = o.positions(0, height), wide = o.positions(1, width);
  REQUIRE(high * wide > lora::detail::positions_at_once);
  mlkit::tensor<double, 4> y({images, out, high, wide}), dy({images, out, high, wide}), dx(x.extents);
  for (index_t i = 0; i < dy.size(); ++i) dy.data()[i] = random.normal(static_cast<std::uint64_t>(i) + 100000);
  const mat adapted = add(from(w), multiply(from(b), from(a)), s);
  const auto lengths = adapted_lengths(from(w), from(b), from(a), s);
  const auto flat = [](auto& t) { return mlkit::matrix_view<double>(t.data(), {t.extent(0), t.size() / t.extent(0)}); };
  for (const bool dora : {false, true}) {
    INFO("dora " << dora);
    mlkit::tensor<double, 4> y_want(y.extents()), dx_want(x.extents);
    mat dw(out, channels * 6);
    std::vector<double> dm_want(out, 3);
    for (index_t n = 0; n < images; ++n)
      for (index_t q = 0; q < out; ++q) {
        const double length = lengths[static_cast<std::size_t>(q)], g = dora ? m(q) / length : 1;
        for (index_t h = 0; h < high; ++h)
          for (index_t v = 0; v < wide; ++v) {
            double sum = 0;
            for (index_t k = 0; k < channels * 6; ++k) {
              const index_t c = k / 6, i = k / 3 % 2, j = k % 3;
              const index_t row = 2 * h - 3 + 2 * i, col = 3 * v - 5 + j;
              if (row < 0 || row >= height || col < 0 || col >= width) continue;
              sum += adapted(q, k) * x(n, c, row, col);
              dx_want(n, c, row, col) += g * adapted(q, k) * dy(n, q, h, v);
              dw(q, k) += g * dy(n, q, h, v) * x(n, c, row, col);
            }
            y_want(n, q, h, v) = g * sum;
            dm_want[static_cast<std::size_t>(q)] += dy(n, q, h, v) * sum / length;
          }
      }
    mlkit::matrix<double> da({rank, channels * 6}), db({out, rank});
    mlkit::vector<double> dm({out});
    std::fill(dm.begin(), dm.end(), 3.0);
    if (dora) {
      const lora::dora d{p, m};
      lora::conv2d(mlkit::cpu{}, x, lora::dense{w}, d, y, o);
      lora::conv2d_backward(mlkit::cpu{}, x, lora::dense{w}, d, dy, lora::gradients{da, db, dm}, dx, o, true);
      for (index_t q = 0; q < out; ++q)
        CHECK(dm(q) == Approx(dm_want[static_cast<std::size_t>(q)]).epsilon(1e-11).margin(1e-11));
    } else {
      lora::conv2d(mlkit::cpu{}, x, lora::dense{w}, p, y, o);
      lora::conv2d_backward(mlkit::cpu{}, x, lora::dense{w}, p, dy, lora::gradients{da, db}, dx, o, true);
    }
    CHECK(difference(flat(y), from(flat(y_want))) < 1e-12);
    CHECK(difference(flat(dx), from(flat(dx_want))) < 1e-12);
    CHECK(difference(da, scaled(multiply(transpose(from(b)), dw), s)) < 1e-11);
    CHECK(difference(db, scaled(multiply(dw, transpose(from(a))), s)) < 1e-11);
  }
}
