// Sequences of steps or tokens as arguments: [batch, time] in any layout, or packed; flags; when an episode is done.
#pragma once

#include <concepts>
#include <ranges>
#include <type_traits>

#include "../core/arguments.hpp"
#include "../core/starts.hpp"
#include "../core/tensor.hpp"
#include "mask.hpp"
#include "options.hpp"

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

/// Where packed sequences start: sequence b is tokens starts[b] to starts[b + 1] - 1; [batch + 1] of std::int32_t side
/// by side, from 0 to the number of tokens. It owns nothing.
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

  MLKIT_HOST_DEVICE explicit operator bool() const noexcept { return data != nullptr; }
  MLKIT_HOST_DEVICE T* at(index_t b, index_t t) const noexcept { return data + b * batch + t * time; }
};

inline void check_starts(std::string_view function, const tensor_view<const std::int32_t, 1>& v, index_t tokens) {
  mlkit::detail::check_starts(function, "cu_seqlens", v, "there are", tokens, "tokens");
}

// Of starts that are not on the host, what can be said without them.
inline void check_unread_starts(std::string_view function, const tensor_view<const std::int32_t, 1>& v) {
  check_view(function, "cu_seqlens", v);
  if (v.extent(0) == 0) fail_shape(function, ": cu_seqlens is empty; it has one element more than there are sequences");
}

// The steps of a sequence: `count` of them, the first in column `begin` of row `row`.
struct sequence_place {
  index_t row, begin, count;
};

// Each row of [batch, time] is a sequence, or a part of its only row is.
struct sequence_places {
  index_t sequences = 0, time = 0;
  const std::int32_t* starts = nullptr;

  sequence_place operator()(index_t b) const noexcept {
    if (!starts) return {b, 0, time};
    return {0, starts[b], starts[b + 1] - starts[b]};
  }
};

/// Where the sequences of operands of this shape are, of which `of` names the first. Starts that the host cannot look
/// at are for the kernels to keep within the tokens.
template <int Rank>
sequence_places check_sequences(arguments& call, std::string_view function, std::string_view of,
                                const extents_t<Rank>& shape, const sequence_starts& cu_seqlens, bool on_host = true) {
  const index_t rows = Rank == 1 ? 1 : shape[0], time = shape[Rank - 1];
  if (!cu_seqlens.data && cu_seqlens.extent(0) == 0) return {rows, time};
  if (rows != 1)
    fail_shape(function, ": ", of, " has shape ", shape_text<Rank>(shape),
               ", but cu_seqlens packs sequences of [tokens] alone");
  if (on_host)
    check_starts(function, cu_seqlens, time);
  else
    check_unread_starts(function, cu_seqlens);
  if (cu_seqlens.extent(0) > 1 && cu_seqlens.stride(0) != 1)
    fail_shape(function, ": cu_seqlens has a stride of ", cu_seqlens.stride(0), ", not 1");
  call.reads("cu_seqlens", cu_seqlens);
  return {cu_seqlens.extent(0) - 1, 0, cu_seqlens.data};
}

/// Checks operands of one call, [batch, time], which have the shape of the first of them, and hands them over.
class step_arguments {
 public:
  step_arguments(arguments& call, std::string_view function, bool on_host = true)
      : call_(call), function_(function), on_host_(on_host) {}

  /// The first; it is read or written as the others are.
  template <class U>
  const sequence_places& first(std::string_view name, const tensor_view<U, 2>& v, const sequence_starts& cu_seqlens) {
    check_view(function_, name, v);
    first_ = name, shape_ = v.extents;
    return places_ = check_sequences<2>(call_, function_, name, v.extents, cu_seqlens, on_host_);
  }
  template <class U>
  void read(std::string_view name, const tensor_view<U, 2>& v) {
    check_shape(name, v);
    call_.reads(name, v);
  }
  template <class U>
  void write(std::string_view name, const tensor_view<U, 2>& v) {
    check_shape(name, v);
    call_.writes(name, v);
  }
  template <class U>
  void read_optional(std::string_view name, const tensor_view<U, 2>& v) {
    if (is_given(v)) read(name, v);
  }
  template <class U>
  void write_optional(std::string_view name, const tensor_view<U, 2>& v) {
    if (is_given(v)) write(name, v);
  }
  /// An element for each sequence, of which `of` has as many.
  template <class U>
  void read_batch(std::string_view name, const tensor_view<U, 1>& v, std::string_view of = "the number of sequences") {
    check_batch(name, v, of);
    call_.reads(name, v);
  }
  template <class U>
  void write_batch(std::string_view name, const tensor_view<U, 1>& v, std::string_view of = "the number of sequences") {
    check_batch(name, v, of);
    call_.writes(name, v);
  }

  std::string_view first_name() const noexcept { return first_; }

 private:
  template <class U>
  void check_shape(std::string_view name, const tensor_view<U, 2>& v) const {
    check_same_shape<2>(function_, name, v.extents, first_, shape_);
    check_view(function_, name, v);
  }
  template <class U>
  void check_batch(std::string_view name, const tensor_view<U, 1>& v, std::string_view of) const {
    check_view(function_, name, v);
    check_extent(function_, name, "elements", v.extent(0), of, places_.sequences);
  }

  arguments& call_;
  std::string_view function_, first_;
  bool on_host_;
  extents_t<2> shape_{};
  sequence_places places_{};
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl
