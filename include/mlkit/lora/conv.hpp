// Adapted convolutions in two dimensions: products over patches that are cut out of the image as they are packed.
#pragma once

#include <array>

#include "dora.hpp"

namespace MLKIT_NAMESPACE::lora {

/// The geometry of a convolution, {height, width} each; one group.
struct conv_options {
  std::array<index_t, 2> kernel = {1, 1};
  std::array<index_t, 2> stride = {1, 1};
  std::array<index_t, 2> padding = {0, 0};
  std::array<index_t, 2> dilation = {1, 1};

  /// Output positions along dimension d for an input of the given size.
  index_t positions(int d, index_t size) const noexcept {
    const index_t span = size + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
    return span < 0 ? 0 : span / stride[d] + 1;
  }
};

namespace detail {

/// The patches of one image [channels, height, width] as a matrix [channels kh kw, positions]; zero where a patch
/// leaves the image.
template <class T>
struct patches {
  using value_type = T;
  tensor_view<const T, 3> image;
  conv_options o;
  index_t out_height, out_width;

  patches(const tensor_view<const T, 3>& x, const conv_options& options) noexcept
      : image(x), o(options), out_height(o.positions(0, x.extent(1))), out_width(o.positions(1, x.extent(2))) {}
  index_t rows() const noexcept { return image.extent(0) * o.kernel[0] * o.kernel[1]; }
  index_t cols() const noexcept { return out_height * out_width; }

  template <class U>
  void decode(index_t row, index_t col, int count, U* MLKIT_RESTRICT out) const noexcept {
    const index_t j = row % o.kernel[1], i = row / o.kernel[1] % o.kernel[0], c = row / (o.kernel[0] * o.kernel[1]);
    index_t oh = col / out_width, ow = col % out_width;
    const index_t step = o.stride[1] * image.stride(2);
    for (int at = 0; at < count; ow = 0, ++oh) {
      const index_t n = std::min<index_t>(out_width - ow, count - at);
      const index_t h = oh * o.stride[0] - o.padding[0] + i * o.dilation[0];
      const index_t w = ow * o.stride[1] - o.padding[1] + j * o.dilation[1];
      // The part [first, last) of the run that is inside of the image.
      index_t first = w < 0 ? std::min(n, ceil_div(-w, o.stride[1])) : 0;
      index_t last = w >= image.extent(2) ? 0 : std::min(n, (image.extent(2) - 1 - w) / o.stride[1] + 1);
      if (h < 0 || h >= image.extent(1) || last < first) first = last = 0;
      const T* p = image.data + c * image.stride(0) + h * image.stride(1) + w * image.stride(2);
      for (index_t l = 0; l < first; ++l) out[at + l] = static_cast<U>(0.0f);
      for (index_t l = first; l < last; ++l) out[at + l] = static_cast<U>(static_cast<accumulator_t<T>>(p[l * step]));
      for (index_t l = last; l < n; ++l) out[at + l] = static_cast<U>(0.0f);
      at += static_cast<int>(n);
    }
  }
};

/// Columns [first, first + count) of patches.
template <class T>
struct patch_block {
  using value_type = T;
  patches<T> source;
  index_t first, count;
  index_t rows() const noexcept { return source.rows(); }
  index_t cols() const noexcept { return count; }
  template <class U>
  void decode(index_t row, index_t col, int n, U* out) const noexcept {
    source.decode(row, first + col, n, out);
  }
};

template <class T>
tensor_view<T, 3> image_of(const tensor_view<T, 4>& x, index_t n) noexcept {
  return {x.data + n * x.stride(0), {x.extent(1), x.extent(2), x.extent(3)}, {x.stride(1), x.stride(2), x.stride(3)}};
}

// One image of the output as [channels, positions].
template <class T>
matrix_view<T> positions_of(const tensor_view<T, 4>& y, index_t n) noexcept {
  return {y.data + n * y.stride(0), {y.extent(1), y.extent(2) * y.extent(3)}, {y.stride(1), y.stride(3)}};
}

inline void check_geometry(std::string_view function, const conv_options& o) {
  constexpr index_t most = INT32_MAX;  // so that no position overflows
  const auto check = [&](std::string_view name, int d, index_t value, index_t least) {
    if (value < least)
      fail_value(function, ": ", name, "[", d, "] = ", value, least == 0 ? " is negative" : " is not positive");
    if (value > most) fail_value(function, ": ", name, "[", d, "] = ", value, " is above ", most);
  };
  for (int d = 0; d < 2; ++d) {
    check("kernel", d, o.kernel[d], 1);
    check("stride", d, o.stride[d], 1);
    check("dilation", d, o.dilation[d], 1);
    check("padding", d, o.padding[d], 0);
  }
}

// x and an output-shaped tensor against the base; the latter's positions must lie evenly.
template <class X, class Base, class Y>
void check_conv(std::string_view function, const tensor_view<const X, 4>& x, const Base& base, const conv_options& o,
                std::string_view name, const tensor_view<Y, 4>& y) {
  check_geometry(function, o);
  check_base(function, base);
  check_view(function, "x", x);
  check_view(function, name, y);
  index_t inputs = 0;
  if (__builtin_mul_overflow(x.extent(1), o.kernel[0] * o.kernel[1], &inputs))
    fail_shape(function, ": x has ", x.extent(1), " channels, too many for a kernel of ", o.kernel[0], " x ",
               o.kernel[1]);
  if (inputs != base.inputs())
    fail_shape(function, ": x has ", x.extent(1), " channels and ", inputs, " elements to a patch, but base has ",
               base.inputs(), " inputs");
  check_extent(function, name, "images", y.extent(0), "x", x.extent(0));
  check_extent(function, name, "channels", y.extent(1), "base", base.outputs());
  for (int d = 0; d < 2; ++d)
    check_extent(function, name, d == 0 ? "rows" : "columns", y.extent(2 + d), "the convolution",
                 o.positions(d, x.extent(2 + d)));
  if (y.extent(2) > 1 && y.extent(3) > 0 && y.stride(2) != y.extent(3) * y.stride(3))
    fail_shape(function, ": ", name, " has row stride ", y.stride(2),
               ", but its rows must follow each other: ", y.extent(3) * y.stride(3));
}

template <class X, class Base, class T>
void name_conv(arguments& call, const tensor_view<const X, 4>& x, const Base& base, const adapter_view<T>& p) {
  call.reads("x", x);
  name_base(call, base);
  name_adapter(call, p);
}

template <class X, class Base, class T, class Y, class A>
void run_conv(const cpu& exec, const tensor_view<const X, 4>& x, const Base& base, adapter_view<T> p, const A* factors,
              const conv_options& o, const tensor_view<Y, 4>& y) {
  using Bias = bias_t<Base>;
  if (y.empty()) return;
  p = effective(p);
  const index_t positions = y.extent(2) * y.extent(3);
  const workspace<A> memory(p.rank() * positions);
  const matrix_view<A> h(memory.data(), {p.rank(), positions});
  for (index_t n = 0; n < x.extent(0); ++n) {
    const operand<patches<X>> right{patches<X>(image_of(x, n), o), false};
    multiply<product_type_t<T, X>>(exec, left_of(p.a), right, nothing<T>(p.rank()), nothing<A>(positions), h,
                                   finish<A, Bias, A>{.value = static_cast<A>(p.scale)});
    multiply<product_type_t<typename Base::value_type, X>>(
        exec, left_operand(base.weight()), right, left_of(p.b), right_of(h), positions_of(y, n),
        finish<A, Bias, Y>{.rows = factors, .row_bias = base.bias.data});
  }
}

// Positions whose gradient by patches is held at once.
inline constexpr index_t positions_at_once = 256;

// image += the patches [first, first + count) of columns [channels kh kw, count]: each channel by itself.
template <class A>
void add_patches(const cpu& exec, const matrix_view<A>& columns, index_t first, const conv_options& o,
                 index_t out_width, const tensor_view<A, 3>& image) {
  const index_t taps = o.kernel[0] * o.kernel[1];
  const cpu limited = limit_threads(exec, 4 * static_cast<double>(columns.size()));
  parallel_ranges(limited, image.extent(0), [&](index_t begin, index_t end) {
    for (index_t c = begin; c < end; ++c)
      for (index_t tap = 0; tap < taps; ++tap) {
        const index_t i = tap / o.kernel[1], j = tap % o.kernel[1];
        for (index_t at = 0; at < columns.extent(1); ++at) {
          const index_t h = (first + at) / out_width * o.stride[0] - o.padding[0] + i * o.dilation[0];
          const index_t w = (first + at) % out_width * o.stride[1] - o.padding[1] + j * o.dilation[1];
          if (h >= 0 && h < image.extent(1) && w >= 0 && w < image.extent(2))
            image(c, h, w) += columns(c * taps + tap, at);
        }
      }
  });
}

// factors, and with them sums for the magnitude's gradient, are null for a plain adapter.
template <class X, class Base, class T, class D, class Dx, class A>
void run_conv_backward(const cpu& exec, const tensor_view<const X, 4>& x, const Base& base, const adapter_view<T>& p,
                       const A* factors, A* sums, const conv_options& o, const tensor_view<const D, 4>& dy,
                       const gradients<A>& grads, const tensor_view<Dx, 4>& dx) {
  using Bias = bias_t<Base>;
  const index_t out = base.outputs(), inputs = base.inputs(), rank = p.rank();
  const index_t positions = dy.extent(2) * dy.extent(3), width = dy.extent(3);
  if (dx.data)
    for (index_t n = 0; n < dx.extent(0); ++n)
      for (index_t c = 0; c < dx.extent(1); ++c)
        for (index_t i = 0; i < dx.extent(2); ++i)
          for (index_t j = 0; j < dx.extent(3); ++j) dx(n, c, i, j) = static_cast<Dx>(0.0f);
  if (dy.empty()) return;
  const index_t block = std::min(positions, positions_at_once);
  const index_t pixels = dx.data ? x.extent(1) * x.extent(2) * x.extent(3) : 0;
  const workspace<A> memory(out * rank + 2 * rank * positions + block * (out + inputs) + pixels);
  const matrix_view<A> b(memory.data(), {out, rank}), h(b.data + b.size(), {rank, positions});
  const matrix_view<A> g(h.data + h.size(), {rank, positions});
  A* scaled_memory = g.data + g.size();
  A* column_memory = scaled_memory + block * out;
  const tensor_view<A, 3> image(column_memory + block * inputs, {x.extent(1), x.extent(2), x.extent(3)});
  for (index_t c = 0; c < out; ++c)
    for (index_t j = 0; j < rank; ++j) b(c, j) = (factors ? factors[c] : A{1}) * static_cast<A>(p.b(c, j));

  for (index_t n = 0; n < x.extent(0); ++n) {
    const patches<X> source(image_of(x, n), o);
    const auto dys = positions_of(dy, n);  // [out, positions]
    multiply<product_type_t<T, X>>(exec, left_of(p.a), operand<patches<X>>{source, false}, nothing<T>(rank),
                                   nothing<A>(positions), h, finish<A, Bias, A>{.value = static_cast<A>(p.scale)});
    multiply<product_type_t<A, D>>(exec, left_of(transposed(b)), right_of(dys), nothing<A>(rank), nothing<A>(positions),
                                   g, finish<A, Bias, A>{.value = static_cast<A>(p.scale)});
    multiply<product_type_t<D, A>>(exec, left_of(dys), right_of(transposed(h)), nothing<A>(out), nothing<A>(rank),
                                   grads.db, finish<A, Bias, A>{.rows = factors}.adding(grads.db));
    multiply<product_type_t<A, X>>(exec, left_of(g), operand<patches<X>>{source, true}, nothing<A>(rank),
                                   nothing<A>(inputs), grads.da, finish<A, Bias, A>{}.adding(grads.da));
    if (!dx.data && !sums) continue;
    std::fill_n(image.data, pixels, A{});
    for (index_t first = 0; first < positions; first += block) {
      const index_t count = std::min(block, positions - first);
      const matrix_view<A> u(scaled_memory, {out, count}), columns(column_memory, {inputs, count});
      const matrix_view<A> hs(h.data + first, {rank, count}, {positions, 1});
      const matrix_view<A> gs(g.data + first, {rank, count}, {positions, 1});
      if (sums) {  // the output before its factors, again: patches by patches
        const patch_block<X> some{source, first, count};
        multiply<product_type_t<typename Base::value_type, X>>(exec, left_operand(base.weight()),
                                                               operand<patch_block<X>>{some, false}, left_of(p.b),
                                                               right_of(hs), u, finish<A, Bias, A>{});
        for (index_t c = 0; c < out; ++c) {
          double sum = 0;
          for (index_t i = 0; i < count; ++i)
            sum += static_cast<double>(dys(c, first + i)) * static_cast<double>(u(c, i));
          sums[c] += static_cast<A>(sum);
        }
      }
      for (index_t c = 0; c < out; ++c)
        for (index_t i = 0; i < count; ++i) u(c, i) = (factors ? factors[c] : A{1}) * static_cast<A>(dys(c, first + i));
      if (!dx.data) continue;
      multiply<sums_t<A>>(exec, left_operand(transposed(base.weight())), right_of(u), left_of(transposed(p.a)),
                          right_of(gs), columns, finish<A, Bias, A>{});
      add_patches(exec, columns, first, o, width, image);
    }
    if (!dx.data) continue;
    for (index_t c = 0; c < dx.extent(1); ++c)
      for (index_t i = 0; i < dx.extent(2); ++i)
        for (index_t j = 0; j < dx.extent(3); ++j) dx(n, c, i, j) = static_cast<Dx>(image(c, i, j));
  }
}

}  // namespace detail

/// y = conv(x, W) + bias + s conv1x1(conv(x, A), B): an adapted convolution, as PEFT has it. x [images, channels,
/// height, width]; the base is a weight seen as [out, channels kh kw] (a convolution's weight as it lies, dense or
/// quantised); adapter a [rank, channels kh kw], with the base's stride, padding and dilation, and b [out, rank]; y
/// [images, out, positions high, positions wide].
///
/// One product to an image, over [W | B] and [patches ; h]; patches are cut out while they are packed, and never
/// stored. Throws shape_error where extents do not fit, value_error for a geometry that is not positive; otherwise
/// types, errors and determinism as for linear. 2 positions (out channels kh kw + rank (channels kh kw + out)) flops to
/// an image.
template <executor Executor, viewable<4> X, linear_base Base, plain_adapter Adapter, viewable<4> Y>
void conv2d(const Executor& exec, const X& x, const Base& base, const Adapter& adapter, Y&& y,
            const conv_options& options) {
  detail::check_on_cpu<Executor>();
  constexpr std::string_view function = "lora::conv2d";
  using U = element_t<const X>;
  using T = typename Adapter::value_type;
  using A = accumulator_t<T>;
  const tensor_view<const U, 4> in = as_view(x);
  const adapter_view<T> p = as_adapter(adapter);
  const auto out = as_view(y);
  detail::check_types<U, typename Base::value_type, T, element_t<std::remove_reference_t<Y>>>();
  detail::check_output(function, "y", out);
  detail::check_conv(function, in, base, options, "y", out);
  detail::check_adapter(function, p, base.outputs(), base.inputs());
  detail::arguments call(function, exec);
  detail::name_conv(call, in, base, p);
  call.writes("y", out);
  detail::run_conv(exec, in, base, p, static_cast<const A*>(nullptr), options, out);
}

/// DoRA's convolution: y = g * (conv(x, W) + s conv1x1(conv(x, A), B)) + bias, one g for each output channel;
/// magnitude [out].
template <executor Executor, viewable<4> X, linear_base Base, class T, class M, viewable<4> Y>
void conv2d(const Executor& exec, const X& x, const Base& base, const dora<T, M>& adapter, Y&& y,
            const conv_options& options) {
  detail::check_on_cpu<Executor>();
  constexpr std::string_view function = "lora::conv2d";
  using U = element_t<const X>;
  using A = accumulator_t<T>;
  const tensor_view<const U, 4> in = as_view(x);
  const auto out = as_view(y);
  detail::check_types<U, typename Base::value_type, T, element_t<std::remove_reference_t<Y>>>();
  detail::check_output(function, "y", out);
  detail::check_conv(function, in, base, options, "y", out);
  detail::arguments call(function, exec);
  detail::check_dora(call, function, adapter, base.outputs(), base.inputs());
  detail::name_conv(call, in, base, adapter.adapter);
  call.writes("y", out);
  const detail::workspace<A> memory(2 * base.outputs());
  A* factors = memory.data() + base.outputs();
  detail::find_factors(adapter.magnitude, detail::find_norms(exec, base, adapter, memory.data()), factors);
  detail::run_conv(exec, in, base, adapter.adapter, static_cast<const A*>(factors), options, out);
}

namespace detail {

template <class X, class Base, class T, class D, class G, class Dx>
void check_conv_backward(arguments& call, std::string_view function, const tensor_view<const X, 4>& x, const Base& base,
                         const adapter_view<T>& p, const tensor_view<const D, 4>& dy, const gradients<G>& g,
                         const tensor_view<Dx, 4>& dx, const conv_options& o) {
  check_conv(function, x, base, o, "dy", dy);
  check_adapter(function, p, base.outputs(), base.inputs());
  name_conv(call, x, base, p);
  call.reads("dy", dy);
  check_gradients(call, function, p, g);
  if (!dx.data && dx.empty()) return;
  check_output(function, "dx", dx);
  if (dx.extents != x.extents)
    fail_shape(function, ": dx has shape ", shape_text<4>(dx.extents), ", but x has ", shape_text<4>(x.extents));
  call.writes("dx", dx);
}

}  // namespace detail

/// The gradients of conv2d: da, db, and dx unless it is an empty view. `accumulate` adds to da and db. The gradient by
/// patches is held for 256 positions at a time.
template <executor Executor, viewable<4> X, linear_base Base, plain_adapter Adapter, viewable<4> D, class G,
          viewable<4> Dx>
void conv2d_backward(const Executor& exec, const X& x, const Base& base, const Adapter& adapter, const D& dy,
                     const gradients<G>& grads, Dx&& dx, const conv_options& options, bool accumulate = false) {
  detail::check_on_cpu<Executor>();
  constexpr std::string_view function = "lora::conv2d_backward";
  using U = element_t<const X>;
  using V = element_t<const D>;
  using T = typename Adapter::value_type;
  using A = accumulator_t<T>;
  const tensor_view<const U, 4> in = as_view(x);
  const tensor_view<const V, 4> dout = as_view(dy);
  const adapter_view<T> p = as_adapter(adapter);
  const auto din = as_view(dx);
  detail::check_types<U, typename Base::value_type, T, V, G, element_t<std::remove_reference_t<Dx>>>();
  detail::check_no_magnitude(function, grads);
  detail::arguments call(function, exec);
  detail::check_conv_backward(call, function, in, base, p, dout, grads, din, options);
  detail::summed_as<A>(grads, accumulate, [&](const gradients<A>& summed) {
    detail::run_conv_backward(exec, in, base, p, static_cast<const A*>(nullptr), static_cast<A*>(nullptr), options,
                              dout, summed, din);
  });
}

/// DoRA's convolution, backward: also dmagnitude [out], with the norm held constant.
template <executor Executor, viewable<4> X, linear_base Base, class T, class M, viewable<4> D, class G, viewable<4> Dx>
void conv2d_backward(const Executor& exec, const X& x, const Base& base, const dora<T, M>& adapter, const D& dy,
                     const gradients<G>& grads, Dx&& dx, const conv_options& options, bool accumulate = false) {
  detail::check_on_cpu<Executor>();
  constexpr std::string_view function = "lora::conv2d_backward";
  using U = element_t<const X>;
  using V = element_t<const D>;
  using A = accumulator_t<T>;
  const tensor_view<const U, 4> in = as_view(x);
  const tensor_view<const V, 4> dout = as_view(dy);
  const auto din = as_view(dx);
  const index_t out = base.outputs();
  detail::check_types<U, typename Base::value_type, T, V, G, element_t<std::remove_reference_t<Dx>>>();
  detail::arguments call(function, exec);
  detail::check_conv_backward(call, function, in, base, adapter.adapter, dout, grads, din, options);
  detail::check_dora(call, function, adapter, out, base.inputs());
  detail::check_magnitude(call, function, grads, out);
  const detail::workspace<A> memory(3 * out);
  A* factors = memory.data() + out;
  A* sums = factors + out;
  const A* norms = detail::find_norms(exec, base, adapter, memory.data());
  detail::find_factors(adapter.magnitude, norms, factors);
  std::fill_n(sums, out, A{});
  detail::summed_as<A>(grads, accumulate, [&](const gradients<A>& summed) {
    detail::run_conv_backward(exec, in, base, adapter.adapter, static_cast<const A*>(factors), sums, options, dout,
                              summed, din);
  });
  detail::finish_magnitude(grads.dmagnitude, accumulate, static_cast<const A*>(sums), norms);
}

}  // namespace MLKIT_NAMESPACE::lora
