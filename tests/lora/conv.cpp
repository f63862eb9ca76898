#include <catch2/catch.hpp>
#include <cstring>
#include <mlkit/io/safetensors.hpp>
#include <mlkit/lora.hpp>
#include <string>

#include "reference.hpp"
#include "test_data.hpp"

namespace lora = mlkit::lora;
using mlkit::index_t;
using namespace reference;

namespace {

// Any tensor as a matrix with its first extent for rows.
template <class T>
mlkit::matrix_view<const T> flat(const mlkit::tensor_view<const T, 4>& v) {
  return {v.data, {v.extent(0), v.extent(0) ? v.size() / v.extent(0) : 0}};
}
template <class T>
mlkit::matrix_view<const T> flat(const mlkit::tensor<T, 4>& t) {
  return flat(t.view());
}

}  // namespace

TEST_CASE("PEFT's and torch's convolutions, forward and backward", "[lora][conv]") {
  for (const char* name : {"peft_conv_lora", "peft_conv_dora", "torch_conv_dilated"}) {
    INFO(name);
    const auto file = mlkit::io::safetensors::open(test_data(std::string(name) + ".safetensors"));
    const auto x = file.view<float, 4>("x"), w = file.view<float, 4>("w"), dy = file.view<float, 4>("dy");
    const auto pair = [&](const char* key) {
      const auto v = file.view<std::int64_t, 1>(key);
      return std::array<index_t, 2>{v(0), v(1)};
    };
    const lora::conv_options options{.kernel = {w.extent(2), w.extent(3)},
                                     .stride = pair("stride"),
                                     .padding = pair("padding"),
                                     .dilation = pair("dilation")};
    const lora::dense base{flat(w), file.view<float, 1>("bias")};
    const lora::adapter_view<float> adapter{flat(file.view<float, 4>("a")), flat(file.view<float, 4>("b")),
                                            file.at("scale").scalar()};
    mlkit::tensor<float, 4> y(dy.extents), dx(x.extents);
    mlkit::matrix<float> da(adapter.a.extents), db(adapter.b.extents), merged(base.w.extents);
    mlkit::vector<float> dm({10});
    std::copy_n(w.data, w.size(), merged.data());
    if (file.find("m")) {
      const lora::dora dora{adapter, mlkit::vector_view<const float>(file.view<float, 4>("m").data, {10})};
      lora::conv2d(mlkit::cpu{}, x, base, dora, y, options);
      lora::conv2d_backward(mlkit::cpu{}, x, base, dora, dy, lora::gradients{da, db, dm}, dx, options);
      const auto want = file.view<double, 4>("dm");
      for (index_t i = 0; i < 10; ++i) CHECK(dm(i) == Approx(want(0, i, 0, 0)).epsilon(1e-5).margin(1e-5));
      lora::merge(mlkit::cpu{}, merged, dora);
    } else {
      lora::conv2d(mlkit::cpu{}, x, base, adapter, y, options);
      lora::conv2d_backward(mlkit::cpu{}, x, base, adapter, dy, lora::gradients{da, db}, dx, options);
      lora::merge(mlkit::cpu{}, merged, adapter);
    }
    CHECK(difference(flat(y), from(flat(file.view<double, 4>("y")))) < 1e-6);
    CHECK(difference(da, from(flat(file.view<double, 4>("da")))) < 1e-6);
    CHECK(difference(db, from(flat(file.view<double, 4>("db")))) < 1e-6);
    CHECK(difference(flat(dx), from(flat(file.view<double, 4>("dx")))) < 1e-6);
    CHECK(difference(merged, from(flat(file.view<double, 4>("merged")))) < 1e-6);
  }
}

TEST_CASE("convolutions larger than a block of positions, by loops", "[lora][conv]") {
  const lora::conv_options o{.kernel = {3, 3}, .stride = {1, 2}, .padding = {1, 0}, .dilation = {1, 1}};
  const index_t images = 2, channels = 3, height = 25, width = 47, out = 5, rank = 2;
  mlkit::tensor<double, 4> x({images, channels, height, width});
  const mlkit::random_stream random{3, 4};
  for (index_t i = 0; i < x.size(); ++i) x.data()[i] = random.normal(static_cast<std::uint64_t>(i));
  const auto w = normal<double>(out, channels * 9, 1), a = normal<double>(rank, channels * 9, 2),
             b = normal<double>(out, rank, 3);
  const lora::adapter_view<double> p{a, b, 0.5};
  const index_t high = o.positions(0, height), wide = o.positions(1, width);
  REQUIRE(high * wide > lora::detail::positions_at_once);
  mlkit::tensor<double, 4> y({images, out, high, wide}), dy({images, out, high, wide}),
      dx({images, channels, height, width});
  for (index_t i = 0; i < dy.size(); ++i) dy.data()[i] = random.normal(static_cast<std::uint64_t>(i) + 100000);
  const mat merged = add(from(w), multiply(from(b), from(a)), 0.5);
  mlkit::matrix<double> da({rank, channels * 9}), db({out, rank});
  lora::conv2d(mlkit::cpu{}, x, lora::dense{w}, p, y, o);
  lora::conv2d_backward(mlkit::cpu{}, x, lora::dense{w}, p, dy, lora::gradients{da, db}, dx, o);
  mlkit::tensor<double, 4> want_y(y.extents()), want_dx(x.extents());
  mat dw(out, channels * 9);
  for (index_t n = 0; n < images; ++n)
    for (index_t q = 0; q < out; ++q)
      for (index_t h = 0; h < high; ++h)
        for (index_t v = 0; v < wide; ++v)
          for (index_t c = 0; c < channels; ++c)
            for (index_t i = 0; i < 3; ++i)
              for (index_t j = 0; j < 3; ++j) {
                const index_t r = h - 1 + i, s = 2 * v + j, k = c * 9 + i * 3 + j;
                if (r < 0 || r >= height || s >= width) continue;
                want_y(n, q, h, v) += merged(q, k) * x(n, c, r, s);
                want_dx(n, c, r, s) += merged(q, k) * dy(n, q, h, v);
                dw(q, k) += dy(n, q, h, v) * x(n, c, r, s);
              }
  CHECK(difference(flat(y), from(flat(want_y))) < 1e-12);
  CHECK(difference(flat(dx), from(flat(want_dx))) < 1e-12);
  CHECK(difference(da, scaled(multiply(transpose(from(b)), dw), 0.5)) < 1e-12);
  CHECK(difference(db, scaled(multiply(dw, transpose(from(a))), 0.5)) < 1e-12);
}
