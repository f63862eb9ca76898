// tensor_view: a non-owning, strided view of any rank, and as_view, which makes one from what users already have.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <ranges>
#include <type_traits>

#include "config.hpp"
#include "dtype.hpp"
#include "error.hpp"

namespace MLKIT_NAMESPACE {

/// Extents or strides of a view.
template <int Rank>
using extents_t = std::array<index_t, Rank>;

namespace detail {

// Element d of extents or strides. std::array's own operator[] cannot be called in device code.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // there it is part of constant expressions alone
#endif
template <class Array>
MLKIT_HOST_DEVICE constexpr auto& at(Array& a, int d) noexcept {
#if defined(__CUDA_ARCH__)
  using element = std::conditional_t<std::is_const_v<Array>, const index_t, index_t>;
  if (!__builtin_is_constant_evaluated()) return reinterpret_cast<element*>(&a)[d];
#endif
  return a[static_cast<std::size_t>(d)];
}

// Shapes come from users before they are checked: a product too large wraps, and check_view refuses it.
MLKIT_HOST_DEVICE constexpr index_t wrapping_product(index_t a, index_t b) noexcept {
  return static_cast<index_t>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
}

template <int Rank>
MLKIT_HOST_DEVICE constexpr extents_t<Rank> row_major_strides(const extents_t<Rank>& extents) noexcept {
  extents_t<Rank> strides{};
  index_t step = 1;
  for (int d = Rank - 1; d >= 0; --d) {
    at(strides, d) = step;
    step = wrapping_product(step, at(extents, d));
  }
  return strides;
}

template <int Rank>
MLKIT_HOST_DEVICE constexpr index_t element_count(const extents_t<Rank>& extents) noexcept {
  index_t n = 1;
  for (int d = 0; d < Rank; ++d) n = wrapping_product(n, at(extents, d));
  return n;
}

// What std::mdspan and its look-alikes have.
template <class M>
concept mdspan_like = requires(const M& m) {
  { m.extent(0) } -> std::convertible_to<index_t>;
  { m.stride(0) } -> std::convertible_to<index_t>;
  {m.data_handle()};
  { M::rank() } -> std::convertible_to<int>;
};

}  // namespace detail

/// A non-owning view of `Rank` dimensions. Row-major by default; strides are in elements and may be anything.
/// Cheap to copy; passing one by value is the rule. It does not keep what it looks at alive. Its members can be called
/// in CUDA device code too.
template <class T, int Rank>
struct tensor_view {
  using value_type = std::remove_const_t<T>;
  using element_type = T;
  static constexpr int rank = Rank;

  T* data = nullptr;
  extents_t<Rank> extents{};
  extents_t<Rank> strides{};

  constexpr tensor_view() = default;
  MLKIT_HOST_DEVICE constexpr tensor_view(T* pointer, const extents_t<Rank>& shape) noexcept
      : data(pointer), extents(shape), strides(detail::row_major_strides<Rank>(shape)) {}
  MLKIT_HOST_DEVICE constexpr tensor_view(T* pointer, const extents_t<Rank>& shape,
                                          const extents_t<Rank>& steps) noexcept
      : data(pointer), extents(shape), strides(steps) {}

  /// A view of mutable elements converts to one of const elements.
  template <class U>
    requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>)
  MLKIT_HOST_DEVICE constexpr tensor_view(const tensor_view<U, Rank>& other) noexcept
      : data(other.data), extents(other.extents), strides(other.strides) {}

  MLKIT_HOST_DEVICE constexpr index_t extent(int d) const noexcept { return detail::at(extents, d); }
  MLKIT_HOST_DEVICE constexpr index_t stride(int d) const noexcept { return detail::at(strides, d); }
  MLKIT_HOST_DEVICE constexpr index_t size() const noexcept { return detail::element_count<Rank>(extents); }
  MLKIT_HOST_DEVICE constexpr bool empty() const noexcept {
    for (int d = 0; d < Rank; ++d)
      if (extent(d) == 0) return true;
    return false;
  }

  /// The element at the given indices, unchecked.
  template <std::convertible_to<index_t>... I>
    requires(sizeof...(I) == Rank)
  MLKIT_HOST_DEVICE constexpr T& operator()(I... indices) const noexcept {
    const index_t index[] = {static_cast<index_t>(indices)...};
    index_t offset = 0;
    for (int d = 0; d < Rank; ++d) offset += index[d] * stride(d);
    return data[offset];
  }

  /// Whether the elements stand one after another in row-major order.
  MLKIT_HOST_DEVICE constexpr bool contiguous() const noexcept {
    index_t step = 1;
    for (int d = Rank - 1; d >= 0; --d) {
      if (extent(d) != 1 && stride(d) != step) return false;
      step = detail::wrapping_product(step, extent(d));
    }
    return true;
  }
};

template <class T, std::size_t N>
tensor_view(T*, const std::array<index_t, N>&) -> tensor_view<T, static_cast<int>(N)>;

template <class T>
using vector_view = tensor_view<T, 1>;
template <class T>
using matrix_view = tensor_view<T, 2>;

/// The same elements with the last two dimensions exchanged; nothing is copied.
template <class T, int Rank>
  requires(Rank >= 2)
MLKIT_HOST_DEVICE constexpr tensor_view<T, Rank> transposed(tensor_view<T, Rank> v) noexcept {
  const index_t extent = v.extent(Rank - 1), stride = v.stride(Rank - 1);
  detail::at(v.extents, Rank - 1) = v.extent(Rank - 2);
  detail::at(v.strides, Rank - 1) = v.stride(Rank - 2);
  detail::at(v.extents, Rank - 2) = extent;
  detail::at(v.strides, Rank - 2) = stride;
  return v;
}

namespace detail {

template <class T>
inline constexpr bool is_tensor_view = false;
template <class T, int Rank>
inline constexpr bool is_tensor_view<tensor_view<T, Rank>> = true;

// The difference between a view that outlives the expression and one that does not is left to the caller, as in
// f(as_view(make())): what as_view gets, it never copies.
template <class R>
concept viewable_range = std::ranges::contiguous_range<R> && storage<std::ranges::range_value_t<R>>;

}  // namespace detail

/// Anything that owns or looks at elements and can say so: has a `view()` that is a tensor_view.
template <class X>
concept has_view = requires(X& x) {
  requires detail::is_tensor_view<std::remove_cvref_t<decltype(x.view())>>;
};

/// A view stays as it is.
template <class T, int Rank>
constexpr tensor_view<T, Rank> as_view(tensor_view<T, Rank> v) noexcept {
  return v;
}

/// An owning tensor gives its view: of const elements, if it is const. A temporary must live as long as its view is
/// used.
template <has_view X>
constexpr auto as_view(X&& x) noexcept {
  return x.view();
}

/// A contiguous container (std::vector, std::array, std::span, ...) gives a view of rank 1, as for tensors.
template <detail::viewable_range R>
  requires(!has_view<R>)
constexpr auto as_view(R&& r) noexcept {
  using T = std::remove_reference_t<std::ranges::range_reference_t<R>>;
  return tensor_view<T, 1>(std::ranges::data(r), {static_cast<index_t>(std::ranges::size(r))});
}

/// Anything with mdspan's members gives a view of its rank, with its strides.
template <detail::mdspan_like M>
constexpr auto as_view(const M& m) noexcept {
  constexpr int rank = static_cast<int>(M::rank());
  using T = std::remove_pointer_t<std::remove_cvref_t<decltype(m.data_handle())>>;
  tensor_view<T, rank> v;
  v.data = m.data_handle();
  for (int d = 0; d < rank; ++d) {
    v.extents[d] = static_cast<index_t>(m.extent(d));
    v.strides[d] = static_cast<index_t>(m.stride(d));
  }
  return v;
}

/// What as_view accepts with the given rank.
template <class X, int Rank>
concept viewable = requires(X& x) {
  requires std::remove_cvref_t<decltype(as_view(x))>::rank == Rank;
};

/// The element type (without const) of what as_view makes of X.
template <class X>
using element_t = typename std::remove_cvref_t<decltype(as_view(std::declval<X&>()))>::value_type;

template <has_view X>
constexpr auto transposed(X&& x) noexcept {
  return transposed(x.view());
}

namespace detail {

// A view without its types, so that checks are compiled once.
struct any_view {
  static constexpr int most_dimensions = 8;
  const void* data;
  index_t element;  // bytes
  int rank;
  const index_t* extents;
  const index_t* strides;

  template <class T, int Rank>
  MLKIT_ALWAYS_INLINE explicit any_view(const tensor_view<T, Rank>& v) noexcept
      : data(v.data), element(sizeof(T)), rank(Rank), extents(v.extents.data()), strides(v.strides.data()) {
    static_assert(Rank <= most_dimensions, "mlkit: views have at most 8 dimensions");
  }
  bool empty() const noexcept { return std::find(extents, extents + rank, 0) != extents + rank; }
  // The distance, in elements, from one index of dimension d to the next.
  index_t step(int d) const noexcept { return strides[d] < 0 ? -strides[d] : strides[d]; }
};

inline std::string list_text(const index_t* values, int count) {
  std::string s = "[";
  for (int i = 0; i < count; ++i) s += (i ? ", " : "") + std::to_string(values[i]);
  return s + "]";
}

template <int Rank>
std::string shape_text(const extents_t<Rank>& extents) {
  return list_text(extents.data(), Rank);
}

template <int Rank>
void check_same_shape(std::string_view function, std::string_view name, const extents_t<Rank>& have,
                      std::string_view other, const extents_t<Rank>& want) {
  if (have != want)
    fail_shape(function, ": ", name, " has shape ", shape_text<Rank>(have), ", but ", other, " has ",
               shape_text<Rank>(want));
}

// The address range [first, last] that a view can touch, as integers; empty views touch nothing.
struct byte_range {
  std::uintptr_t first = 1, last = 0;
  bool empty() const noexcept { return first > last; }
  bool overlaps(const byte_range& other) const noexcept {
    return !empty() && !other.empty() && first <= other.last && other.first <= last;
  }
};

// A view as rows of `length` bytes that start `period` bytes apart (0 if there is but one), along its largest stride.
struct byte_rows {
  std::uintptr_t first = 0, length = 0, period = 0;

  // Whether no row of one shares a byte with a row of the other, modulo a period that both have; as for the column
  // blocks of one matrix. False where that is not known.
  bool apart(const byte_rows& other) const noexcept {
    const std::uintptr_t p = period ? period : other.period;
    if (p == 0 || (other.period && other.period != p) || length > p || other.length > p) return false;
    const std::uintptr_t shift = other.first >= first ? (other.first - first) % p : (p - (first - other.first) % p) % p;
    return shift >= length && shift + other.length <= p;
  }
};

// The addresses that a view touches, as if dimension `without` had one index.
MLKIT_ALWAYS_INLINE byte_range touched_range(const any_view& v, int without = -1) noexcept {
  index_t low = 0, high = 0;
  for (int d = 0; d < v.rank; ++d) {
    if (v.extents[d] == 0) return {};
    if (d != without) (v.strides[d] < 0 ? low : high) += v.strides[d] * (v.extents[d] - 1);
  }
  const auto at = [&](index_t offset) {
    return reinterpret_cast<std::uintptr_t>(v.data) + static_cast<std::uintptr_t>(offset * v.element);
  };
  return {at(low), at(high) + static_cast<std::uintptr_t>(v.element) - 1};
}

// What of the memory a view touches.
struct touched_memory {
  byte_range all;
  byte_rows rows;

  explicit touched_memory(const any_view& v) noexcept {
    if (v.empty()) return;
    int outer = -1;
    for (int d = 0; d < v.rank; ++d)
      if (v.extents[d] > 1 && (outer < 0 || v.step(d) > v.step(outer))) outer = d;
    all = touched_range(v);
    const byte_range row = touched_range(v, outer);
    rows = {row.first, row.last - row.first + 1,
            outer < 0 ? 0 : static_cast<std::uintptr_t>(v.step(outer) * v.element)};
  }

  bool disjoint(const touched_memory& other) const noexcept {
    if (!all.overlaps(other.all)) return true;
    const byte_rows one{all.first, all.last - all.first + 1, 0};
    const byte_rows other_one{other.all.first, other.all.last - other.all.first + 1, 0};
    return rows.apart(other.rows) || one.apart(other.rows) || rows.apart(other_one);
  }
};

// More elements than any memory holds. Strides of zero can name them all the same, and sizes of scratch memory, which
// are small multiples of this, must not overflow.
inline constexpr index_t most_elements = index_t{1} << 46;

// Refuses negative extents, shapes that do not fit into index_t, and null data where there are elements.
inline void check_any_view(std::string_view function, std::string_view name, const any_view& v) {
  for (int d = 0; d < v.rank; ++d)
    if (v.extents[d] < 0)
      fail_shape(function, ": ", name, " has the negative extent ", v.extents[d], " in dimension ", d);
  if (v.empty()) return;
  index_t count = 1, reach = 1;
  bool fits = true;
  for (int d = 0; d < v.rank && fits; ++d) {
    index_t step = 0;
    fits = !__builtin_mul_overflow(count, v.extents[d], &count) && count <= most_elements && v.strides[d] > INT64_MIN &&
           !__builtin_mul_overflow(v.step(d), v.extents[d] - 1, &step) && !__builtin_add_overflow(reach, step, &reach);
  }
  index_t bytes = 0;
  if (!fits || __builtin_mul_overflow(reach, v.element, &bytes))
    fail_shape(function, ": ", name, " of shape ", list_text(v.extents, v.rank), " and strides ",
               list_text(v.strides, v.rank), " is too large");
  if (!v.data) fail_value(function, ": ", name, " is null, but has shape ", list_text(v.extents, v.rank));
}

// Sizes that nothing can be wrong with, known after a few instructions: small products are checked as fast as they are
// computed.
template <class T, int Rank>
MLKIT_ALWAYS_INLINE bool plainly_valid(const tensor_view<T, Rank>& v) noexcept {
  constexpr std::uint64_t most = Rank <= 2 ? 1 << 23 : Rank <= 4 ? 1 << 11 : 1;
  bool good = v.data != nullptr;
  for (int d = 0; d < Rank; ++d)
    good =
        good && static_cast<std::uint64_t>(v.extents[d]) < most && static_cast<std::uint64_t>(v.strides[d]) < 1u << 31;
  return good;
}

/// Refuses negative extents, shapes that do not fit into index_t, and null data where there are elements.
template <class T, int Rank>
MLKIT_ALWAYS_INLINE void check_view(std::string_view function, std::string_view name, const tensor_view<T, Rank>& v) {
  if (!plainly_valid(v)) check_any_view(function, name, any_view(v));
}

inline void check_any_output(std::string_view function, std::string_view name, const any_view& v) {
  check_any_view(function, name, v);
  if (v.empty()) return;
  // Dimensions by growing stride; each must step over all that came before.
  index_t reach = 1, last_step = -1;
  int last = -1;
  for (int n = 0; n < v.rank; ++n) {
    int next = -1;
    for (int d = 0; d < v.rank; ++d) {
      const bool after = v.step(d) > last_step || (v.step(d) == last_step && d > last);
      if (after && (next < 0 || v.step(d) < v.step(next))) next = d;
    }
    last = next;
    last_step = v.step(next);
    if (v.extents[next] == 1) continue;
    if (last_step < reach)
      fail_shape(function, ": ", name, " of shape ", list_text(v.extents, v.rank), " has overlapping strides ",
                 list_text(v.strides, v.rank));
    reach += last_step * (v.extents[next] - 1);
  }
}

/// check_view for an output: also refuses strides that make two indices name the same element.
template <class T, int Rank>
MLKIT_ALWAYS_INLINE void check_output(std::string_view function, std::string_view name, const tensor_view<T, Rank>& v) {
  static_assert(!std::is_const_v<T>, "an output must be a view of mutable elements");
  if (!plainly_valid(v) || !v.contiguous()) check_any_output(function, name, any_view(v));
}

inline void check_any_disjoint(std::string_view function, std::string_view output_name, const any_view& output,
                               std::string_view name, const any_view& other) {
  if (!touched_memory(output).disjoint(touched_memory(other)))
    fail_shape(function, ": ", output_name, " ", list_text(output.extents, output.rank), " overlaps ", name, " ",
               list_text(other.extents, other.rank));
}

/// Refuses an output that shares memory with another argument. Blocks of columns of one matrix share none; other ways
/// in which two views can interleave without touching are refused.
template <class T, int R, class U, int S>
MLKIT_ALWAYS_INLINE void check_disjoint(std::string_view function, std::string_view output_name,
                                        const tensor_view<T, R>& output, std::string_view name,
                                        const tensor_view<U, S>& other) {
  if (!touched_range(any_view(output)).overlaps(touched_range(any_view(other)))) return;
  check_any_disjoint(function, output_name, any_view(output), name, any_view(other));
}

inline void check_extent(std::string_view function, std::string_view name, std::string_view unit, index_t have,
                         std::string_view other, index_t want) {
  if (have != want) fail_shape(function, ": ", name, " has ", have, " ", unit, ", but ", other, " has ", want);
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE
