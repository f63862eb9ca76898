// Matrix products: c = epilogue(a b).
#pragma once

#include "packed.hpp"
#include "run.hpp"

namespace MLKIT_NAMESPACE {
namespace detail {

template <class C, class A>
void check_operand_disjoint(std::string_view function, const C& c, std::string_view name, const A& a) {
  if constexpr (viewable<const A, 2>)
    check_disjoint(function, "c", c, name, as_view(a));
  else if constexpr (is_transposed<A>)
    check_operand_disjoint(function, c, name, a.source);
  else if constexpr (requires { a.each_view([](std::string_view, const auto&) {}); })
    a.each_view([&](std::string_view part, const auto& v) {
      check_disjoint(function, "c", c, part.empty() ? std::string(name) : message(name, "'s ", part), v);
    });
}

template <class A, class B, class C, class Epilogue>
void check_matmul(std::string_view function, const A& a, const B& b, const C& c, const Epilogue& e) {
  const auto left = left_operand(a);
  const auto right = right_operand(b);
  check_operand(function, "a", a);
  check_operand(function, "b", b);
  check_output(function, "c", c);
  if (left.depth() != right.depth())
    fail_shape(function, ": a has ", left.depth(), " columns, but b has ", right.depth(), " rows");
  check_extent(function, "c", "rows", c.extent(0), "a", left.lines());
  check_extent(function, "c", "columns", c.extent(1), "b", right.lines());
  e.check(function, c.extent(0), c.extent(1));
  check_operand_disjoint(function, c, "a", a);
  check_operand_disjoint(function, c, "b", b);
  check_epilogue_disjoint(function, c, e);
}

// matmul without its checks.
template <class A, class B, class C, class... Stages>
void multiply(const cpu& exec, const A& a, const B& b, const matrix_view<C>& c, const epilogue<Stages...>& e) {
  using E = product_type_t<typename operand_value<const A>::type, typename operand_value<const B>::type>;
  static_assert(std::is_same_v<C, double> == std::is_same_v<E, double>, "matmul: f64 operands give f64 outputs only");
  static_assert(
      !is_packed<B> || std::is_same_v<E, typename operand_value<const B>::type>,
      "matmul: b was packed for products in another type; pack<float>(exec, b) is for operands of mixed types");
  const auto left = left_operand(a);
  const auto right = right_operand(b);
  using Segment = segment<typename decltype(left)::source_type, typename decltype(right)::source_type>;
  const auto p = make_product(c, e, Segment{left, right, packed_panels(b)});
  if (!run_small<E>(exec, p)) run_product<E>(exec, p);
}

}  // namespace detail

/// c = epilogue(a b), with a [m, k], b [k, n], c [m, n].
///
/// Operands are views or tensors with any strides (a transpose is a view: `transposed(w)`), or sources that produce
/// their elements as they are packed (`prologue`); b may be a packed_matrix. f32, f64, bf16 and f16, mixed as you like
/// except that f64 goes with f64; sums are f32 (f64 for f64) and rounded once, after the epilogue. c is overwritten;
/// `epilogue{accumulate{}}` adds to it. k = 0 gives epilogue(0).
///
/// Throws shape_error where extents do not fit, c's strides overlap or c overlaps an operand, and value_error for null
/// data or a b packed for another instruction set, before c is touched. The same bits for any number of threads; 2 m n
/// k flops, at most about 8 MiB + 2 MiB per thread of scratch, whatever the shape.
template <executor Executor, detail::matmul_operand A, detail::right_matmul_operand B, viewable<2> C, class... Stages>
void matmul(const Executor& exec, const A& a, const B& b, C&& c, const epilogue<Stages...>& e = {}) {
  const auto out = as_view(c);
  detail::check_matmul("matmul", a, b, out, e);
  detail::multiply(exec, a, b, out, e);
}

}  // namespace MLKIT_NAMESPACE
