// Quantised bases: NF4 (also with double quantisation) and int8 weights, decoded while they are multiplied.
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <span>

#include "../core/cpu.hpp"
#include "../core/memory.hpp"
#include "../core/tensor.hpp"
#include "../matmul/matmul.hpp"
#include "../simd/math.hpp"
#include "base.hpp"

namespace MLKIT_NAMESPACE::detail {

// The signed 8-bit dynamic map: seven decades, decade i with 2^i fractions evenly between 0.1 and 1, of both signs,
// and 0 and 1. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, appendix F.
struct dynamic_map_table {
  float values[256];
  dynamic_map_table() noexcept {
    constexpr double decades[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    int n = 0;
    for (int i = 0; i < 7; ++i) {
      const int fractions = 1 << i;
      const float first = 0.1f, step = (1.0f - first) / static_cast<float>(fractions);
      // Both halves of the boundaries are counted from their own end, which is what decides the last bit.
      const auto boundary = [&](int j) {
        return static_cast<float>(2 * j < fractions + 1 ? static_cast<double>(first) + static_cast<double>(step) * j
                                                        : 1.0 - static_cast<double>(step) * (fractions - j));
      };
      for (int j = 0; j < fractions; ++j) {
        const float mean = (boundary(j) + boundary(j + 1)) / 2.0f;
        const float value = static_cast<float>(decades[i]) * mean;
        values[n++] = value;
        values[n++] = -value;
      }
    }
    values[n++] = 0.0f;
    values[n++] = 1.0f;
    std::sort(values, values + 256);
  }
};

inline int checked_log2(std::string_view function, std::string_view name, index_t value, index_t least, index_t most) {
  if (value < least || value > most || !std::has_single_bit(static_cast<std::uint64_t>(value)))
    fail_value(function, ": ", name, " = ", value, " is no power of two in [", least, ", ", most, "]");
  return std::countr_zero(static_cast<std::uint64_t>(value));
}

inline index_t checked_size(std::string_view function, const extents_t<2>& shape) {
  if (shape[0] < 0 || shape[1] < 0) fail_shape(function, ": shape ", shape_text<2>(shape), " has a negative extent");
  if (shape[0] > 0 && shape[1] > INT64_MAX / 8 / shape[0])
    fail_shape(function, ": shape ", shape_text<2>(shape), " is too large");
  return shape[0] * shape[1];
}

template <class T, std::size_t N>
void check_span(std::string_view function, std::string_view name, std::string_view unit, std::span<T, N> s,
                const extents_t<2>& shape, index_t want) {
  const index_t have = static_cast<index_t>(s.size());
  if (have != want)
    fail_shape(function, ": ", name, " has ", have, " ", unit, ", but shape ", shape_text<2>(shape), " needs ", want);
  if (!s.data() && want > 0) fail_value(function, ": ", name, " is null, but has ", want, " ", unit);
}

}  // namespace MLKIT_NAMESPACE::detail

namespace MLKIT_NAMESPACE::lora {

/// The values of NF4 before scaling: quantiles of a normal distribution, normed to [-1, 1], with an exact zero.
/// Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, appendix E.
inline constexpr float nf4_levels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

/// The code book of double quantisation: the signed 8-bit dynamic map, 256 values in ascending order.
inline std::span<const float, 256> dynamic_map() noexcept {
  static const mlkit::detail::dynamic_map_table table;
  return table.values;
}

/// The block factors of a doubly quantised matrix: factor i is code_book[codes[i]] * absmax[i / block] + offset.
struct nf4_nested {
  std::span<const std::uint8_t> codes;               ///< a byte per block of weights
  std::span<const float> absmax;                     ///< a factor per `block` codes
  float offset = 0;                                  ///< the mean of the factors
  std::span<const float> code_book = dynamic_map();  ///< 256 values
  int block = 256;                                   ///< codes that share a factor, a power of two
};

/// A weight [outputs, inputs] in NF4, not owned. Element i of the row-major weight is nf4_levels[code i] * factor
/// [i / block], where two codes share a byte, the first in the high nibble: the layout of bitsandbytes' Linear4bit.
/// Blocks run on from row to row. A matrix_source: `matmul(exec, x, transposed(view), y)` works as well.
struct nf4_view {
  /// Counts as the narrowest type, so that the activations choose what to multiply in: f32 ones meet the values
  /// unrounded.
  using value_type = bf16;

  const std::uint8_t* packed = nullptr;
  const float* absmax = nullptr;  ///< a factor per block, or null where they are quantised too
  const std::uint8_t* absmax_codes = nullptr;
  const float* nested_absmax = nullptr;
  const float* code_book = nullptr;
  float offset = 0;
  int block_log2 = 6;
  int nested_block_log2 = 8;
  index_t outputs = 0;
  index_t inputs = 0;

  nf4_view() = default;
  /// packed [ceil(outputs * inputs / 2)], absmax [ceil(outputs * inputs / block)]; block a power of two in [32, 4096].
  /// Throws shape_error for other sizes, value_error for null data or another block.
  nf4_view(const extents_t<2>& shape, std::span<const std::uint8_t> bytes, std::span<const float> factors,
           index_t block = 64)
      : nf4_view(shape, bytes, block) {
    mlkit::detail::check_span("lora::nf4_view", "absmax", "elements", factors, shape, blocks());
    absmax = factors.data();
  }
  /// The same with factors that are themselves quantised: `nested.codes` has a byte per block.
  nf4_view(const extents_t<2>& shape, std::span<const std::uint8_t> bytes, const nf4_nested& nested, index_t block = 64)
      : nf4_view(shape, bytes, block) {
    nested_block_log2 =
        mlkit::detail::checked_log2("lora::nf4_view", "nested.block", nested.block, 1, index_t{1} << 20);
    mlkit::detail::check_span("lora::nf4_view", "nested.codes", "elements", nested.codes, shape, blocks());
    mlkit::detail::check_span("lora::nf4_view", "nested.absmax", "elements", nested.absmax, shape, nested_blocks());
    if (nested.code_book.size() != 256)
      mlkit::detail::fail_shape("lora::nf4_view: nested.code_book has ", nested.code_book.size(),
                                " elements, but needs 256");
    if (!std::isfinite(nested.offset)) mlkit::detail::fail_value("lora::nf4_view: nested.offset is not finite");
    absmax_codes = nested.codes.data();
    nested_absmax = nested.absmax.data();
    code_book = nested.code_book.data();
    offset = nested.offset;
  }

  index_t rows() const noexcept { return outputs; }
  index_t cols() const noexcept { return inputs; }
  index_t size() const noexcept { return outputs * inputs; }
  index_t block() const noexcept { return index_t{1} << block_log2; }
  index_t blocks() const noexcept { return mlkit::detail::ceil_div(size(), block()); }
  bool double_quantised() const noexcept { return absmax_codes != nullptr; }
  index_t nested_blocks() const noexcept { return mlkit::detail::ceil_div(blocks(), index_t{1} << nested_block_log2); }
  /// What the weight takes in memory, in bytes: about 4.5 bits a weight, or 4.127 doubly quantised.
  index_t bytes() const noexcept {
    const index_t factors = double_quantised() ? blocks() + 4 * nested_blocks() + 4 : 4 * blocks();
    return mlkit::detail::ceil_div(size(), 2) + factors;
  }
  /// f(name, view) for all memory that is read.
  template <class F>
  void each_view(F&& f) const {
    const auto part = [&](std::string_view name, const auto* data, index_t count) {
      if (data) f(name, vector_view<std::remove_reference_t<decltype(*data)>>(data, {count}));
    };
    part("packed", packed, mlkit::detail::ceil_div(size(), 2));
    part("absmax", absmax, blocks());
    part("nested.codes", absmax_codes, blocks());
    part("nested.absmax", nested_absmax, nested_blocks());
    part("nested.code_book", code_book, 256);
  }

 private:
  nf4_view(const extents_t<2>& shape, std::span<const std::uint8_t> bytes, index_t block) {
    const index_t n = mlkit::detail::checked_size("lora::nf4_view", shape);
    block_log2 = mlkit::detail::checked_log2("lora::nf4_view", "block", block, 32, 4096);
    mlkit::detail::check_span("lora::nf4_view", "packed", "bytes", bytes, shape, mlkit::detail::ceil_div(n, 2));
    packed = bytes.data();
    outputs = shape[0];
    inputs = shape[1];
  }
};

/// A weight [outputs, inputs] in int8, not owned: element [o, i] is codes[o * inputs + i] * scales[o].
/// bitsandbytes' int8 weights are this with scales = SCB / 127.
struct int8_view {
  using value_type = bf16;  ///< as nf4_view's

  const std::int8_t* codes = nullptr;
  const float* scales = nullptr;
  index_t outputs = 0;
  index_t inputs = 0;

  int8_view() = default;
  /// Throws shape_error for sizes that do not fit the shape, value_error for null data.
  int8_view(const extents_t<2>& shape, std::span<const std::int8_t> bytes, std::span<const float> factors) {
    const index_t n = mlkit::detail::checked_size("lora::int8_view", shape);
    mlkit::detail::check_span("lora::int8_view", "codes", "bytes", bytes, shape, n);
    mlkit::detail::check_span("lora::int8_view", "scales", "elements", factors, shape, shape[0]);
    codes = bytes.data();
    scales = factors.data();
    outputs = shape[0];
    inputs = shape[1];
  }

  index_t rows() const noexcept { return outputs; }
  index_t cols() const noexcept { return inputs; }
  index_t size() const noexcept { return outputs * inputs; }
  index_t bytes() const noexcept { return size() + 4 * outputs; }
  /// f(name, view) for all memory that is read.
  template <class F>
  void each_view(F&& f) const {
    f("codes", vector_view<const std::int8_t>(codes, {size()}));
    f("scales", vector_view<const float>(scales, {outputs}));
  }
};

}  // namespace MLKIT_NAMESPACE::lora

namespace MLKIT_NAMESPACE::detail {

// A quantised weight whose elements count as T.
template <class View, storage T>
struct quantised_source {
  using value_type = T;
  View view;
  index_t rows() const noexcept { return view.rows(); }
  index_t cols() const noexcept { return view.cols(); }
  template <class F>
  void each_view(F&& f) const {
    view.each_view(f);
  }
};

template <class View>
concept quantised_view = std::same_as<View, lora::nf4_view> || std::same_as<View, lora::int8_view>;

// Midpoints between neighbours of NF4: a value belongs to the level after the last midpoint below it.
struct nf4_midpoints {
  float values[15] = {};
  constexpr nf4_midpoints() noexcept {
    for (int i = 0; i < 15; ++i) values[i] = (lora::nf4_levels[i] + lora::nf4_levels[i + 1]) / 2;
  }
};
inline constexpr nf4_midpoints nf4_bounds;

struct quantised_access;

}  // namespace MLKIT_NAMESPACE::detail

#define MLKIT_FOREACH "../lora/cpu/quantised-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::lora {

/// An owning weight [out, in] in NF4, made by quantise_nf4. Movable.
class nf4_matrix {
 public:
  nf4_matrix() = default;
  nf4_matrix(nf4_matrix&& other) noexcept { *this = std::move(other); }
  nf4_matrix& operator=(nf4_matrix&& other) noexcept {
    view_ = std::exchange(other.view_, {});
    packed_ = std::move(other.packed_);
    codes_ = std::move(other.codes_);
    absmax_ = std::move(other.absmax_);
    return *this;
  }
  const nf4_view& view() const noexcept { return view_; }
  index_t rows() const noexcept { return view_.rows(); }
  index_t cols() const noexcept { return view_.cols(); }
  index_t bytes() const noexcept { return view_.bytes(); }

 private:
  friend struct mlkit::detail::quantised_access;
  nf4_view view_;
  mlkit::detail::aligned_ptr<std::uint8_t> packed_, codes_;
  mlkit::detail::aligned_ptr<float> absmax_;
};

/// An owning weight [out, in] in int8, made by quantise_int8. Movable.
class int8_matrix {
 public:
  int8_matrix() = default;
  int8_matrix(int8_matrix&& other) noexcept { *this = std::move(other); }
  int8_matrix& operator=(int8_matrix&& other) noexcept {
    view_ = std::exchange(other.view_, {});
    codes_ = std::move(other.codes_);
    scales_ = std::move(other.scales_);
    return *this;
  }
  const int8_view& view() const noexcept { return view_; }
  index_t rows() const noexcept { return view_.rows(); }
  index_t cols() const noexcept { return view_.cols(); }
  index_t bytes() const noexcept { return view_.bytes(); }

 private:
  friend struct mlkit::detail::quantised_access;
  int8_view view_;
  mlkit::detail::aligned_ptr<std::int8_t> codes_;
  mlkit::detail::aligned_ptr<float> scales_;
};

/// How quantise_nf4 stores a weight.
struct nf4_options {
  bool double_quantise = false;  ///< quantise the block factors too: 4.127 bits a weight instead of 4.5
  index_t block = 64;            ///< weights that share a factor, a power of two in [32, 4096]
};

}  // namespace MLKIT_NAMESPACE::lora

namespace MLKIT_NAMESPACE::detail {

// The owning weights' members, for the functions that fill them.
struct quantised_access {
  static auto members(lora::nf4_matrix& m) noexcept { return std::tie(m.view_, m.packed_, m.codes_, m.absmax_); }
  static auto members(lora::int8_matrix& m) noexcept { return std::tie(m.view_, m.codes_, m.scales_); }
};

template <class T>
[[noreturn]] void fail_not_finite(std::string_view function, const matrix_view<const T>& w, index_t at) {
  fail_value(function, ": w[", at / w.extent(1), ", ", at % w.extent(1), "] is not finite in f32");
}

/// Quantises block factors in place of nested codes: code_book index of (absmax - offset) / nested absmax.
inline void quantise_factors(const float* factors, index_t count, float offset, float* nested,
                             std::uint8_t* codes) noexcept {
  constexpr index_t block = 256;
  const auto book = lora::dynamic_map();
  float bounds[255];
  for (int i = 0; i < 255; ++i) bounds[i] = (book[i] + book[i + 1]) / 2;
  for (index_t first = 0; first < count; first += block) {
    const index_t last = std::min(first + block, count);
    float largest = 0;
    for (index_t i = first; i < last; ++i) largest = std::max(largest, std::fabs(factors[i] - offset));
    nested[first / block] = largest;
    const float inverse = largest > 0 ? 1 / std::max(largest, 1e-38f) : 0;
    for (index_t i = first; i < last; ++i) {
      const float x = std::clamp((factors[i] - offset) * inverse, -1.0f, 1.0f);
      codes[i] = static_cast<std::uint8_t>(std::lower_bound(bounds, bounds + 255, x) - bounds);
    }
  }
}

}  // namespace MLKIT_NAMESPACE::detail

namespace MLKIT_NAMESPACE::lora {

/// w [out, in], any strides and dtype, as NF4: factor = max |w| of a block, code = the level nearest to w / factor.
///
/// Codes and factors are the bits that bitsandbytes 0.50 makes of the same weight in f32; with `double_quantise` the
/// factors less their mean are rounded to the nearest of dynamic_map(), 256 of them to a factor, as its CUDA kernels do
/// (its CPU kernel looks that up on a grid of 2^16 points). Throws value_error that names the first weight that is not
/// finite, or for a block that is no power of two in [32, 4096]. The same bits for any number of threads and on every
/// instruction set. Reads w once; holds nothing but the result (and its factors in f32 until they are quantised).
template <viewable<2> W>
nf4_matrix quantise_nf4(const cpu& exec, const W& w, const nf4_options& options = {}) {
  constexpr auto function = "lora::quantise_nf4";
  const auto view = as_view(w);
  using T = typename decltype(view)::value_type;
  const matrix_view<const T> weight(view);
  mlkit::detail::check_view(function, "w", weight);
  const index_t n = mlkit::detail::checked_size(function, weight.extents);
  const int block_log2 = mlkit::detail::checked_log2(function, "block", options.block, 32, 4096);

  nf4_matrix m;
  auto [v, packed, codes, absmax] = mlkit::detail::quantised_access::members(m);
  v.block_log2 = block_log2;
  v.outputs = weight.extent(0);
  v.inputs = weight.extent(1);
  const index_t blocks = v.blocks();
  packed = mlkit::detail::make_aligned<std::uint8_t>(mlkit::detail::ceil_div(n, 2));
  absmax = mlkit::detail::make_aligned<float>(blocks);
  const auto quantise = MLKIT_SELECT(quantise_nf4_blocks<T>);
  mlkit::detail::parallel_ranges(
      exec, blocks, [&, bytes = packed.get(), factors = absmax.get()](index_t begin, index_t end) {
        mlkit::detail::workspace<float> scratch(index_t{2} << block_log2);
        const index_t bad = quantise(weight, block_log2, begin, end, bytes, factors, scratch.data());
        if (bad >= 0) mlkit::detail::fail_not_finite(function, weight, bad);
      });
  v.packed = packed.get();
  if (options.double_quantise) {
    double sum = 0;
    for (index_t i = 0; i < blocks; ++i) sum += absmax[i];
    v.offset = blocks > 0 ? static_cast<float>(sum / static_cast<double>(blocks)) : 0.0f;
    auto nested = mlkit::detail::make_aligned<float>(v.nested_blocks());
    codes = mlkit::detail::make_aligned<std::uint8_t>(blocks);
    mlkit::detail::quantise_factors(absmax.get(), blocks, v.offset, nested.get(), codes.get());
    absmax = std::move(nested);
    v.absmax_codes = codes.get();
    v.nested_absmax = absmax.get();
    v.code_book = dynamic_map().data();
  } else {
    v.absmax = absmax.get();
  }
  return m;
}

/// w [out, in], any strides and dtype, as int8: scale = max |w| / 127 of a row, code = w / scale rounded to nearest
/// even. Throws value_error that names the first weight that is not finite. The same bits for any number of threads and
/// on every instruction set.
template <viewable<2> W>
int8_matrix quantise_int8(const cpu& exec, const W& w) {
  constexpr auto function = "lora::quantise_int8";
  const auto view = as_view(w);
  using T = typename decltype(view)::value_type;
  const matrix_view<const T> weight(view);
  mlkit::detail::check_view(function, "w", weight);
  const index_t n = mlkit::detail::checked_size(function, weight.extents);
  int8_matrix m;
  auto [v, codes, scales] = mlkit::detail::quantised_access::members(m);
  codes = mlkit::detail::make_aligned<std::int8_t>(n);
  scales = mlkit::detail::make_aligned<float>(weight.extent(0));
  const auto quantise = MLKIT_SELECT(quantise_int8_rows<T>);
  mlkit::detail::parallel_ranges(exec, weight.extent(0),
                                 [&, bytes = codes.get(), factors = scales.get()](index_t begin, index_t end) {
                                   mlkit::detail::workspace<float> scratch(weight.extent(1));
                                   const index_t bad = quantise(weight, begin, end, bytes, factors, scratch.data());
                                   if (bad >= 0) mlkit::detail::fail_not_finite(function, weight, bad);
                                 });
  v = {weight.extents,
       {codes.get(), static_cast<std::size_t>(n)},
       {scales.get(), static_cast<std::size_t>(weight.extent(0))}};
  return m;
}

/// The weight as a dense matrix: out [out, in], any strides. Products in f32, rounded once to out's type. Only for
/// those who want it: products decode as they go. Throws shape_error if the shapes differ or out's strides overlap,
/// value_error for null data.
template <mlkit::detail::quantised_view View, viewable<2> Out>
void dequantise(const cpu& exec, const View& w, Out&& out) {
  const auto o = as_view(out);
  using T = typename decltype(o)::value_type;
  mlkit::detail::check_output("lora::dequantise", "out", o);
  mlkit::detail::check_extent("lora::dequantise", "out", "rows", o.extent(0), "the weight", w.outputs);
  mlkit::detail::check_extent("lora::dequantise", "out", "columns", o.extent(1), "the weight", w.inputs);
  w.each_view([&](std::string_view part, const auto& v) {
    mlkit::detail::check_disjoint("lora::dequantise", "out", o, mlkit::detail::message("the weight's ", part), v);
  });
  const auto decode = MLKIT_SELECT(dequantise_rows<View, T>);
  mlkit::detail::parallel_ranges(exec, o.extent(0), [&](index_t begin, index_t end) { decode(w, o, begin, end); });
}
template <viewable<2> Out>
void dequantise(const cpu& exec, const nf4_matrix& w, Out&& out) {
  dequantise(exec, w.view(), out);
}
template <viewable<2> Out>
void dequantise(const cpu& exec, const int8_matrix& w, Out&& out) {
  dequantise(exec, w.view(), out);
}

/// A base in NF4: `nf4{blocks}` or `nf4{blocks, bias}`, of an nf4_matrix or an nf4_view; the bias is [out].
///
/// Products decode the weight while they pack or stream it: it stays at 4 bits, and scratch does not grow with it.
/// f32 and f16 activations are multiplied in f32 by the values unrounded; bf16 ones, where the machine multiplies bf16
/// natively, by the values rounded to bf16. For f64 activations name the type: `nf4<double>{blocks}`.
template <storage T = bf16, storage B = accumulator_t<T>>
struct nf4 {
  using value_type = T;
  nf4_view blocks;
  vector_view<const B> bias = {};

  explicit nf4(const nf4_view& w) noexcept : blocks(w) {}
  explicit nf4(const nf4_matrix& w) noexcept : blocks(w.view()) {}
  template <viewable<1> V>
  nf4(const nf4_view& w, V&& b) : blocks(w), bias(as_view(b)) {}
  template <viewable<1> V>
  nf4(const nf4_matrix& w, V&& b) : blocks(w.view()), bias(as_view(b)) {}

  index_t outputs() const noexcept { return blocks.outputs; }
  index_t inputs() const noexcept { return blocks.inputs; }
  mlkit::detail::quantised_source<nf4_view, T> weight() const noexcept { return {blocks}; }
};
nf4(const nf4_view&)->nf4<>;
nf4(const nf4_matrix&)->nf4<>;
template <viewable<1> V>
nf4(const nf4_view&, V&&) -> nf4<bf16, element_t<std::remove_reference_t<V>>>;
template <viewable<1> V>
nf4(const nf4_matrix&, V&&) -> nf4<bf16, element_t<std::remove_reference_t<V>>>;

/// A base in int8: `int8{rows}` or `int8{rows, bias}`, of an int8_matrix or an int8_view. As nf4 in everything else.
template <storage T = bf16, storage B = accumulator_t<T>>
struct int8 {
  using value_type = T;
  int8_view codes;
  vector_view<const B> bias = {};

  explicit int8(const int8_view& w) noexcept : codes(w) {}
  explicit int8(const int8_matrix& w) noexcept : codes(w.view()) {}
  template <viewable<1> V>
  int8(const int8_view& w, V&& b) : codes(w), bias(as_view(b)) {}
  template <viewable<1> V>
  int8(const int8_matrix& w, V&& b) : codes(w.view()), bias(as_view(b)) {}

  index_t outputs() const noexcept { return codes.outputs; }
  index_t inputs() const noexcept { return codes.inputs; }
  mlkit::detail::quantised_source<int8_view, T> weight() const noexcept { return {codes}; }
};
int8(const int8_view&)->int8<>;
int8(const int8_matrix&)->int8<>;
template <viewable<1> V>
int8(const int8_view&, V&&) -> int8<bf16, element_t<std::remove_reference_t<V>>>;
template <viewable<1> V>
int8(const int8_matrix&, V&&) -> int8<bf16, element_t<std::remove_reference_t<V>>>;

}  // namespace MLKIT_NAMESPACE::lora
