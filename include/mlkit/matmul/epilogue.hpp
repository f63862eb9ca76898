// Epilogues: what happens to each sum of a matrix product on its way into the output, as types that compose.
#pragma once

#include <concepts>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "../core/view.hpp"
#include "../simd/math.hpp"

namespace MLKIT_NAMESPACE {
namespace detail {

// Rows of factors and biases are read as vectors.
template <class T>
void check_row(std::string_view function, std::string_view name, const vector_view<T>& v, index_t want) {
  check_view(function, name, v);
  check_extent(function, name, "elements", v.extent(0), "the output", want);
  if (want > 1 && v.stride(0) != 1) fail_shape(function, ": ", name, " has stride ", v.stride(0), ", but must have 1");
}

}  // namespace detail

/// Where in the output a run of `count` elements stands: c[row, col .. col + count).
struct output_position {
  index_t row = 0;
  index_t col = 0;
  int count = 1;
};

/// x + c[row, col]: adds what the output held before the call. `epilogue{accumulate{}}` is c += a b.
struct accumulate {
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr A operator()(A x, A before) const noexcept {
    return x + before;
  }
};

namespace detail {

template <class Stage>
void check_stage(std::string_view function, const Stage& stage, index_t m, index_t n) {
  if constexpr (requires { stage.check(function, m, n); }) stage.check(function, m, n);
}

/// One stage on one element, in scalar arithmetic; `before` is what the output held there.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // a user's callable need only be callable where the chain is called
#endif
template <class Stage, std::floating_point A>
MLKIT_HOST_DEVICE constexpr A finish_element(const Stage& stage, A x, index_t row, index_t col, A before) {
  if constexpr (std::is_same_v<Stage, accumulate>)
    return stage(x, before);
  else if constexpr (std::is_invocable_v<const Stage&, A, index_t, index_t>)
    return static_cast<A>(stage(x, row, col));
  else
    return static_cast<A>(stage(x));
}

template <std::size_t I, class Stage>
struct stage_slot {
  Stage stage;
};

template <class Indices, class... Stages>
struct stage_slots;

// std::tuple, but usable in device code too.
template <std::size_t... I, class... Stages>
struct stage_slots<std::index_sequence<I...>, Stages...> : stage_slot<I, Stages>... {
  // f(stage...). Inlined, as f may be compiled for another instruction set.
  template <class F>
  MLKIT_ALWAYS_INLINE constexpr decltype(auto) apply(F&& f) const {
    return f(static_cast<const stage_slot<I, Stages>&>(*this).stage...);
  }
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr A finish(A x, [[maybe_unused]] index_t row, [[maybe_unused]] index_t col,
                                       [[maybe_unused]] A before) const {
    ((x = finish_element(static_cast<const stage_slot<I, Stages>&>(*this).stage, x, row, col, before)), ...);
    return x;
  }
};

template <class Stage>
inline constexpr bool is_epilogue = false;

}  // namespace detail

/// A chain of stages, applied in the order of their declaration to every element before it is rounded and stored.
///
/// A stage is one of mlkit's (add_bias, scale_columns, scale_rows, add, accumulate, the activations of functors.hpp) or
/// any callable of the user's: `float(float)`, or `float(float, index_t row, index_t col)`. It sees sums in the
/// accumulator type (f32, or f64 for f64 outputs) and is inlined into the kernel of each instruction set. A callable is
/// called through const, from several threads at once, and must not throw: an exception ends the program.
///
/// Stages and chains can also be called on one element, x = e(x, row, col), on the host and in CUDA device code;
/// nothing is checked there. A chain with `accumulate` takes what the output held as well: x = e(x, row, col, before).
template <class... Stages>
struct epilogue {
  static_assert((!detail::is_epilogue<Stages> && ...),
                "epilogue: a chain is no stage; write all stages into one chain");

  detail::stage_slots<std::index_sequence_for<Stages...>, Stages...> stages;

  epilogue() = default;
  constexpr explicit epilogue(Stages... s) requires(sizeof...(Stages) > 0) : stages{{std::move(s)}...} {}

  template <std::floating_point A>
    requires(!std::is_same_v<Stages, accumulate> && ...)
  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t row, index_t col) const {
    return stages.finish(x, row, col, x);
  }
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t row, index_t col, std::type_identity_t<A> before) const {
    return stages.finish(x, row, col, before);
  }

  void check(std::string_view function, index_t m, index_t n) const {
    stages.apply([&](const auto&... stage) { (detail::check_stage(function, stage, m, n), ...); });
  }
};
template <class... Stages>
epilogue(Stages...) -> epilogue<Stages...>;

template <class... Stages>
inline constexpr bool detail::is_epilogue<epilogue<Stages...>> = true;

/// x + b[col]: a bias per output column, [n]. f32, f64, bf16 or f16.
template <class T>
struct add_bias {
  vector_view<const T> bias;
  template <viewable<1> B>
  explicit add_bias(B&& b) : bias(as_view(b)) {}
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t, index_t col) const noexcept {
    return x + static_cast<A>(bias(col));
  }

  void check(std::string_view function, index_t, index_t n) const { detail::check_row(function, "bias", bias, n); }
  template <class Function>
  void each_view(Function&& f) const {
    f("bias", bias);
  }
};
template <viewable<1> B>
add_bias(B&&) -> add_bias<element_t<std::remove_reference_t<B>>>;

/// x * g[col]: a factor per output column, [n].
template <class T>
struct scale_columns {
  vector_view<const T> factors;
  template <viewable<1> B>
  explicit scale_columns(B&& b) : factors(as_view(b)) {}
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t, index_t col) const noexcept {
    return x * static_cast<A>(factors(col));
  }

  void check(std::string_view function, index_t, index_t n) const {
    detail::check_row(function, "column factors", factors, n);
  }
  template <class Function>
  void each_view(Function&& f) const {
    f("column factors", factors);
  }
};
template <viewable<1> B>
scale_columns(B&&) -> scale_columns<element_t<std::remove_reference_t<B>>>;

/// x * g[row]: a factor per output row, [m].
template <class T>
struct scale_rows {
  vector_view<const T> factors;
  template <viewable<1> B>
  explicit scale_rows(B&& b) : factors(as_view(b)) {}
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t row, index_t) const noexcept {
    return x * static_cast<A>(factors(row));
  }

  void check(std::string_view function, index_t m, index_t) const {
    detail::check_row(function, "row factors", factors, m);
  }
  template <class Function>
  void each_view(Function&& f) const {
    f("row factors", factors);
  }
};
template <viewable<1> B>
scale_rows(B&&) -> scale_rows<element_t<std::remove_reference_t<B>>>;

/// x + r[row, col]: a residual of the output's shape, [m, n], rows contiguous.
template <class T>
struct add {
  matrix_view<const T> residual;
  template <viewable<2> B>
  explicit add(B&& b) : residual(as_view(b)) {}
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t row, index_t col) const noexcept {
    return x + static_cast<A>(residual(row, col));
  }

  void check(std::string_view function, index_t m, index_t n) const {
    detail::check_view(function, "residual", residual);
    detail::check_extent(function, "residual", "rows", residual.extent(0), "the output", m);
    detail::check_extent(function, "residual", "columns", residual.extent(1), "the output", n);
    if (n > 1 && residual.stride(1) != 1)
      detail::fail_shape(function, ": residual has column stride ", residual.stride(1), ", but must have 1");
  }
  template <class Function>
  void each_view(Function&& f) const {
    f("residual", residual);
  }
};
template <viewable<2> B>
add(B&&) -> add<element_t<std::remove_reference_t<B>>>;

namespace detail {

// What an epilogue reads must not be what the product writes.
template <class C, class... Stages>
void check_epilogue_disjoint(std::string_view function, const C& c, const epilogue<Stages...>& e) {
  const auto one = [&](const auto& stage) {
    if constexpr (requires { stage.each_view([](std::string_view, const auto&) {}); })
      stage.each_view([&](std::string_view name, const auto& v) { check_disjoint(function, "c", c, name, v); });
  };
  e.stages.apply([&](const auto&... stage) { (one(stage), ...); });
}

// Functors that simd/math-inl.hpp evaluates on registers; all others are called element by element.
template <class Stage>
concept vectorizable = requires {
  typename Stage::has_register_form;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE
