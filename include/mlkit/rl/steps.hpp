// Sequences of steps or tokens as arguments: [batch, time] in any layout, or packed; flags; when an episode is done.
#pragma once

#include <concepts>
#include <ranges>
#include <type_traits>

#include "../core/arguments.hpp"
#include "../core/starts.hpp"
#include "../core/tensor.hpp"

namespace MLKIT_NAMESPACE::rl {

/// A value for each step of each sequence, [batch, time]: from a matrix or a view of one with any strides (where
/// storage is time-major, the view is `transposed(x)`), or from a vector, a container or a view of one dimension:
/// [tokens], one sequence, or packed ones. It owns nothing.
template <class T>
struct sequence_view : tensor_view<T, 2> {
  constexpr sequence_view() = default;
  template <class X>
    requires(!std::same_as<std::remove_cvref_t<X>, sequence_view> && (viewable<X, 1> || viewable<X, 2>))
  constexpr sequence_view(X&& x) noexcept : tensor_view<T, 2>(matrix(as_view(x))) {}

 private:
  template <class U>
  static constexpr tensor_view<T, 2> matrix(const tensor_view<U, 2>& v) noexcept {
    return v;
  }
  template <class U>
  static constexpr tensor_view<T, 2> matrix(const tensor_view<U, 1>& v) noexcept {
    return tensor_view<T, 2>(v.data, {1, v.extents[0]}, {0, v.strides[0]});
  }
};

/// A value for each sequence, [batch]: from a vector, a container or a view of one dimension. It owns nothing.
template <class T>
struct batch_view : tensor_view<T, 1> {
  constexpr batch_view() = default;
  template <class X>
    requires(!std::same_as<std::remove_cvref_t<X>, batch_view> && viewable<X, 1>)
  constexpr batch_view(X&& x) noexcept : tensor_view<T, 1>(as_view(x)) {}
};

namespace detail {

using namespace mlkit::detail;

template <class R>
concept contiguous_bytes = std::ranges::contiguous_range<R> && std::integral<std::ranges::range_value_t<R>> &&
                           sizeof(std::ranges::range_value_t<R>) == 1;

template <class U>
concept byte_element = std::integral<U> && sizeof(U) == 1;

template <class U>
const std::uint8_t* as_bytes(const U* p) noexcept {
  return reinterpret_cast<const std::uint8_t*>(p);
}

}  // namespace detail

/// A flag for each step of each sequence, [batch, time]: views of one or two dimensions and containers of bool,
/// std::uint8_t or char; what is not 0 is set. It owns nothing.
struct flag_view : tensor_view<const std::uint8_t, 2> {
  constexpr flag_view() = default;
  template <detail::byte_element U>
  flag_view(const tensor_view<U, 2>& v) noexcept : tensor_view(detail::as_bytes(v.data), v.extents, v.strides) {}
  template <detail::byte_element U>
  flag_view(const tensor_view<U, 1>& v) noexcept
      : tensor_view(detail::as_bytes(v.data), {1, v.extents[0]}, {0, v.strides[0]}) {}
  template <detail::contiguous_bytes R>
  flag_view(const R& r) noexcept
      : tensor_view(detail::as_bytes(std::ranges::data(r)), {1, static_cast<index_t>(std::ranges::size(r))}) {}
};

/// A flag for each sequence, [batch]; else as flag_view.
struct batch_flags : tensor_view<const std::uint8_t, 1> {
  constexpr batch_flags() = default;
  template <detail::byte_element U>
  batch_flags(const tensor_view<U, 1>& v) noexcept : tensor_view(detail::as_bytes(v.data), v.extents, v.strides) {}
  template <detail::contiguous_bytes R>
  batch_flags(const R& r) noexcept
      : tensor_view(detail::as_bytes(std::ranges::data(r)), {static_cast<index_t>(std::ranges::size(r))}) {}
};

/// Where packed sequences start: sequence b is tokens starts[b] to starts[b + 1] - 1; [batch + 1] of std::int32_t, from
/// 0 to the number of tokens. It owns nothing.
struct sequence_starts : tensor_view<const std::int32_t, 1> {
  constexpr sequence_starts() = default;
  sequence_starts(const tensor_view<const std::int32_t, 1>& v) noexcept : tensor_view(v) {}
  template <std::ranges::contiguous_range R>
    requires(std::same_as<std::ranges::range_value_t<R>, std::int32_t>)
  sequence_starts(const R& r)
  noexcept : tensor_view(std::ranges::data(r), {static_cast<index_t>(std::ranges::size(r))}) {}
};

/// What terminated[b, t] and truncated[b, t] say: that step t ended an episode, as Gymnasium's step returns it. What
/// follows t in the window belongs to the next episode.
struct done_ends {
  static constexpr bool begins = false;
};

/// What terminated[b, t] and truncated[b, t] say: that step t began an episode, so that the step before it ended one,
/// as in loops that store the done flag that came with the observation (CleanRL, Stable-Baselines3's episode_starts).
/// Whether the window's last step ended one is then in last_terminated and last_truncated; at t = 0 the flags say
/// nothing. A final value is still that of the step that ended: final_values[b, t].
struct done_begins {
  static constexpr bool begins = true;
};

template <class Done>
concept done_convention = requires {
  { Done::begins } -> std::convertible_to<bool>;
};

namespace detail {

// A matrix of the problem: element (b, t) is data[b * batch + t * time]; null if it was not given.
template <class T>
struct stream {
  T* data = nullptr;
  index_t batch = 0, time = 0;

  stream() = default;
  // A dimension of one index takes the stride that serves best.
  stream(const tensor_view<T, 2>& v) noexcept
      : data(v.empty() ? nullptr : v.data),
        batch(v.extents[0] == 1 ? 0 : v.strides[0]),
        time(v.extents[1] == 1 ? 1 : v.strides[1]) {}
  stream(const tensor_view<T, 1>& v) noexcept : data(v.empty() ? nullptr : v.data), batch(v.strides[0]) {}

  explicit operator bool() const noexcept { return data != nullptr; }
  T* at(index_t b, index_t t) const noexcept { return data + b * batch + t * time; }
};

inline void check_unit_interval(std::string_view function, std::string_view name, double value) {
  if (!(value >= 0 && value <= 1)) fail_value(function, ": ", name, " = ", value, " is outside [0, 1]");
}
// Infinity is no bound.
inline void check_bound(std::string_view function, std::string_view name, double value) {
  if (!(value >= 0)) fail_value(function, ": ", name, " = ", value, " is negative or NaN");
}

inline void check_starts(std::string_view function, const tensor_view<const std::int32_t, 1>& v, index_t tokens) {
  mlkit::detail::check_starts(function, "cu_seqlens", v, "there are", tokens, "tokens");
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl
