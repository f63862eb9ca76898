// Which elements of a batch count, and how rl's elementwise kernels walk over strided batches.
#pragma once

#include <concepts>
#include <ranges>

#include "../core/arguments.hpp"
#include "../core/memory.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

using namespace mlkit::detail;

template <class U>
concept byte_element = std::integral<U> && sizeof(U) == 1;
template <class R>
concept contiguous_bytes = std::ranges::contiguous_range<R> && byte_element<std::ranges::range_value_t<R>>;

template <class U>
const std::uint8_t* as_bytes(const U* p) noexcept {
  return reinterpret_cast<const std::uint8_t*>(p);
}

// Whether an operand that may be left out is there.
template <class T, int Rank>
constexpr bool is_given(const tensor_view<T, Rank>& v) noexcept {
  return v.data != nullptr || v.extents != extents_t<Rank>{};
}

}  // namespace detail

/// Which elements count: those whose byte is not 0. A view of std::uint8_t, bool or char of the shape of what it masks,
/// or, of rank 1, a contiguous container of them; made from nothing, all count. What does not count is never read into
/// a result, so that padding may hold anything, NaN too. It owns nothing.
template <int Rank>
struct mask_view {
  tensor_view<const std::uint8_t, Rank> values;

  constexpr mask_view() = default;
  template <detail::byte_element U>
  mask_view(const tensor_view<U, Rank>& v) noexcept : values(detail::as_bytes(v.data), v.extents, v.strides) {}
  template <detail::contiguous_bytes R>
    requires(Rank == 1)
  mask_view(const R& r)
  noexcept : values(detail::as_bytes(std::ranges::data(r)), {static_cast<index_t>(std::ranges::size(r))}) {}

  /// Whether there is a mask.
  constexpr explicit operator bool() const noexcept { return detail::is_given(values); }
};

/// What rl's elementwise functions take: [n], or [batch, time].
template <class X>
concept batch_viewable = viewable<X, 1> || viewable<X, 2>;

namespace detail {

// Whether what a call is given lies where this thread can look at it before it begins.
template <class Executor>
inline constexpr bool looks_at_data = std::is_same_v<Executor, cpu>;

// Refuses, when it is compiled, another executor than the CPU.
template <class Executor>
constexpr void only_on_cpu() noexcept {
  static_assert(std::is_same_v<Executor, cpu>,
                "rl: this function runs on mlkit::cpu alone; docs/support.md says which run on a GPU");
}

// The first argument of what each executor has its own of: it brings in, by argument-dependent lookup, those that are
// declared behind the call.
struct by_executor {};

// What a function returns where it is said to return a small T: what is made on a device stays there until it is asked
// for.
template <class Executor, class T>
struct result_of {
  using type = T;
};
template <class Executor, class T>
using result_t = typename result_of<Executor, T>::type;

template <class X>
inline constexpr int rank_of = std::remove_cvref_t<decltype(as_view(std::declval<X&>()))>::rank;

template <int Rank>
void check_mask(arguments& call, std::string_view function, const mask_view<Rank>& mask, std::string_view other,
                const std::type_identity_t<extents_t<Rank>>& want) {
  if (!mask) return;
  check_same_shape<Rank>(function, "mask", mask.values.extents, other, want);
  check_view(function, "mask", mask.values);
  call.reads("mask", mask.values);
}

/// Whether each element of out is stored where that of x is, so that a kernel which reads before it writes may do both.
template <class T, class Out, int Rank>
bool same_elements(const tensor_view<T, Rank>& x, const tensor_view<Out, Rank>& out) noexcept {
  return static_cast<const void*>(x.data) == out.data && x.strides == out.strides && sizeof(T) == sizeof(Out);
}

/// A view of rank 1 or 2 as rows of columns, or one row of another operand of the same shape.
template <class T>
struct plane {
  T* data = nullptr;
  index_t row_stride = 0, col_stride = 0;

  T* at(index_t row, index_t col) const noexcept { return data + row * row_stride + col * col_stride; }
};

/// The order in which elements of several operands of one shape are visited: the first operand's order in memory. Where
/// all operands allow it, there is but one row.
struct plane_shape {
  index_t rows = 1, cols = 0;
  bool turned = false;
};

template <class T>
plane<T> plane_of(const tensor_view<T, 1>& v, const plane_shape& s) noexcept {
  return {v.data, v.strides[0] * s.cols, v.strides[0]};
}
template <class T>
plane<T> plane_of(const tensor_view<T, 2>& v, const plane_shape& s) noexcept {
  if (s.rows == 1)
    return {v.data, 0, v.extents[s.turned ? 0 : 1] > 1 ? v.strides[s.turned ? 0 : 1] : v.strides[s.turned ? 1 : 0]};
  return s.turned ? plane<T>{v.data, v.strides[1], v.strides[0]} : plane<T>{v.data, v.strides[0], v.strides[1]};
}

template <class T, class... Others>
plane_shape shape_of_planes(const tensor_view<T, 1>& first, const Others&...) noexcept {
  return {1, first.extents[0]};
}
template <class T, class... Others>
plane_shape shape_of_planes(const tensor_view<T, 2>& first, const Others&... others) noexcept {
  const auto step = [](index_t stride) { return stride < 0 ? -stride : stride; };
  const bool turned = first.extents[0] > 1 && step(first.strides[0]) < step(first.strides[1]);
  const int outer = turned ? 1 : 0, inner = 1 - outer;
  const index_t rows = first.extents[static_cast<std::size_t>(outer)],
                cols = first.extents[static_cast<std::size_t>(inner)];
  const auto one_row = [&](const auto& v) {
    const auto at = [](int d) { return static_cast<std::size_t>(d); };
    return v.data == nullptr || rows == 1 || cols == 1 || v.strides[at(outer)] == cols * v.strides[at(inner)];
  };
  if (one_row(first) && (one_row(others) && ...)) return {1, rows * cols, turned};
  return {rows, cols, turned};
}

// Calls f(row, col, count, offset) for the pieces of rows that elements [begin, end) of all rows consist of; offset
// counts from begin.
template <class F>
MLKIT_ALWAYS_INLINE void each_row_piece(const plane_shape& s, index_t begin, index_t end, F&& f) noexcept {
  for (index_t i = begin; i < end;) {
    const index_t row = i / s.cols, col = i - row * s.cols, count = std::min(end - i, s.cols - col);
    f(row, col, count, i - begin);
    i += count;
  }
}

// Elements that a thread must have to be worth its start.
inline constexpr index_t elements_per_thread = 1 << 15;

inline cpu threads_for(const cpu& exec, index_t elements) {
  cpu limited = exec;
  const index_t useful = std::max<index_t>(1, elements / elements_per_thread);
  if (useful == 1)
    limited.threads = 1;
  else
    limited.threads = static_cast<int>(std::min<index_t>(useful, concurrency(exec)));
  return limited;
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl
