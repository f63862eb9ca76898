// Rotary position embedding of queries and keys.
#pragma once

#include <cmath>
#include <span>

#include "../core/arguments.hpp"
#include "../core/dtype.hpp"
#include "../core/tensor.hpp"
#include "../matmul/run.hpp"
#include "../simd/vec.hpp"

namespace MLKIT_NAMESPACE::attention {

/// Which elements of a head are turned together; models are trained with one, and meaningless with the other.
enum class pairing {
  halves,    ///< element i with i + d / 2: GPT-NeoX, Llama in Hugging Face's layout
  adjacent,  ///< element 2 i with 2 i + 1: the paper's, GPT-J, Llama as published
};

/// What a rotary_table holds.
struct rotary_options {
  index_t positions = 0;                     ///< how many, from 0 on
  index_t d = 0;                             ///< elements of a head that are turned, an even number
  double base = 10000;                       ///< theta: pair i turns by base^(-2 i / d) a position
  double position_scale = 1;                 ///< positions times this: 1 / 4 stretches a context fourfold
  std::span<const double> frequencies = {};  ///< d / 2 of the user's own, in place of base's (NTK, YaRN, Llama 3)
};

/// Cosines and sines of rotary embedding for positions [0, positions), computed once in f64 and kept as A, float or
/// double. Movable, not copyable. Throws value_error for options out of range.
template <class A = float>
class rotary_table {
 public:
  using value_type = A;

  explicit rotary_table(const rotary_options& o) : d_(o.d), positions_(o.positions) {
    constexpr std::string_view function = "attention::rotary_table";
    using namespace mlkit::detail;
    if (o.positions < 0) fail_value(function, ": positions = ", o.positions, " is negative");
    if (o.d < 0 || o.d % 2 != 0) fail_value(function, ": d = ", o.d, " is not an even number of elements");
    if (!(std::isfinite(o.base) && o.base > 0)) fail_value(function, ": base = ", o.base, " is not positive");
    if (!std::isfinite(o.position_scale))
      fail_value(function, ": position_scale = ", o.position_scale, " is not finite");
    if (!o.frequencies.empty())
      check_extent(function, "frequencies", "elements", static_cast<index_t>(o.frequencies.size()), "half of d",
                   o.d / 2);
    table_ = matrix<A>({o.positions, o.d});
    A* at = table_.data();
    for (index_t i = 0; o.d > 0 && i < o.positions; ++i, at += o.d)
      for (index_t c = 0; c < o.d / 2; ++c) {
        const double frequency = o.frequencies.empty()
                                     ? std::pow(o.base, -2 * static_cast<double>(c) / static_cast<double>(o.d))
                                     : o.frequencies[static_cast<std::size_t>(c)];
        const double angle = static_cast<double>(i) * o.position_scale * frequency;
        if (!std::isfinite(angle))
          fail_value(function, ": pair ", c, " would be turned by ", angle, " at position ", i);
        at[c] = static_cast<A>(std::cos(angle));
        at[o.d / 2 + c] = static_cast<A>(std::sin(angle));
      }
  }
  rotary_table(rotary_table&&) noexcept = default;
  rotary_table& operator=(rotary_table&&) noexcept = default;

  index_t d() const noexcept { return d_; }
  index_t positions() const noexcept { return positions_; }
  /// d / 2 cosines, then d / 2 sines.
  const A* row(index_t position) const noexcept { return table_.data() + position * d_; }

 private:
  index_t d_, positions_;
  matrix<A> table_;
};

/// How rotate turns.
struct rotation {
  pairing pairs = pairing::halves;
  index_t first = 0;                               ///< the position of query or key 0, of those that follow one more
  matrix_view<const std::int32_t> positions = {};  ///< [batch or 1, n]: positions of one's own, in place of first
  bool back = false;                               ///< by the negative angle: what a gradient needs, and the inverse
};

namespace detail {

using namespace mlkit::detail;

// Refuses what cannot turn `name` [batch, heads, n, d].
template <class A>
void check_rotation(std::string_view function, std::string_view name, const rotary_table<A>& table, const rotation& how,
                    index_t batch, index_t n, index_t d) {
  if (table.d() > d) fail_shape(function, ": table turns ", table.d(), " elements, but ", name, " has ", d, " columns");
  const auto& at = how.positions;
  if (at.data || !at.empty()) {
    check_view(function, "positions", at);
    if (at.extent(0) != 1) check_extent(function, "positions", "rows", at.extent(0), message(name, "'s batch"), batch);
    check_extent(function, "positions", "columns", at.extent(1), name, n);
    for (index_t b = 0; b < at.extent(0); ++b)
      for (index_t i = 0; i < n; ++i)
        if (at(b, i) < 0 || at(b, i) >= table.positions())
          fail_value(function, ": positions[", b, ", ", i, "] = ", at(b, i), " is outside [0, ", table.positions(),
                     ")");
  } else if (how.first < 0 || how.first > table.positions() - n) {
    fail_value(function, ": positions ", how.first, " to ", how.first + n - 1, " are wanted, but table has ",
               table.positions());
  }
}

template <class T, class Out, class A>
struct rotary_problem {
  tensor_view<const T, 4> x;
  tensor_view<Out, 4> out;
  const rotary_table<A>* table;
  const rotation* how;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::attention

#define MLKIT_FOREACH "../attention/cpu/rotary-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::attention {

/// out = x [batch, heads, n, d], where each pair (a, b) of the first table.d() elements of position t becomes
///   (a cos(t f) - b sin(t f),  b cos(t f) + a sin(t f)),
/// and elements beyond are copied. out may be x. q and k are rotated alike before attention, and the gradients dq and
/// dk by `back`. The elements of a head lie beside each other. f32, f64, bf16 and f16, computed in f32 (f64 for f64).
/// Throws shape_error where extents do not fit, value_error for positions that the table has not, before out is
/// touched. Bound by memory: reads x and writes out once. Su et al.: "RoFormer", 2021, section 3.2.2.
template <executor Executor, viewable<4> X, class A, viewable<4> Out>
void rotate(const Executor& exec, const X& input, const rotary_table<A>& table, Out&& output,
            const rotation& how = {}) {
  constexpr std::string_view function = "attention::rotate";
  using T = element_t<const X>;
  using O = element_t<std::remove_reference_t<Out>>;
  static_assert(std::is_same_v<A, accumulator_t<T>>,
                "attention: a rotary_table<double> turns f64, one of float the rest");
  const tensor_view<const T, 4> x = as_view(input);
  const tensor_view<O, 4> out = as_view(output);
  detail::arguments call(function, exec);
  detail::check_view(function, "x", x);
  detail::check_output(function, "out", out);
  if (out.extents != x.extents)
    detail::fail_shape(function, ": out has shape ", detail::shape_text<4>(out.extents), ", but x has ",
                       detail::shape_text<4>(x.extents));
  const index_t batch = x.extent(0), heads = x.extent(1), n = x.extent(2), d = x.extent(3);
  detail::check_rotation(function, "x", table, how, batch, n, d);
  if ((d > 1 && x.strides[3] != 1) || (d > 1 && out.strides[3] != 1))
    detail::fail_shape(function, ": the elements of a head of x and out must lie beside each other");
  if (how.positions.data) call.reads("positions", how.positions);
  const bool in_place =
      static_cast<const void*>(x.data) == out.data && x.strides == out.strides && sizeof(T) == sizeof(O);
  if (!in_place) call.reads("x", x);
  call.writes("out", out);
  using Problem = detail::rotary_problem<T, O, A>;
  const Problem p{x, out, &table, &how};
  const auto kernel = MLKIT_SELECT_WITHOUT_BF16(rotary_entry<Problem>)();
  const index_t rows = batch * heads * n;
  const cpu limited = detail::limit_threads(exec, 4 * static_cast<double>(rows) * static_cast<double>(d));
  detail::parallel_ranges(limited, rows, [&](index_t begin, index_t end) { kernel(p, begin, end); });
}

}  // namespace MLKIT_NAMESPACE::attention
